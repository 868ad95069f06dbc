"""Fills the tuning log that the package ships: the best schedules of the zoo on this machine.

    python benchmarks/make_default_log.py [--minutes 3] [--models bert-mini,...] [--work FILE]

Every model is tuned dense and pruned to 80 % in blocks of 4x1, 16x1 and 32x1. All trials go to
the work log, from which a run that was stopped goes on. Then the best of each workload replace
this CPU's records in compiler/tuning/default_log.jsonl; those of other CPUs stay unless their
kernels have changed. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sparsec.codegen.kernels.revision import revision
from sparsec.models.build import build_file
from sparsec.models.registry import find_model
from sparsec.models.weights import Pruning
from sparsec.options import Calibration, CompileOptions
from sparsec.target import Isa, Target
from sparsec.tools.tune import TuneOptions, tune
from sparsec.tuning import log_files
from sparsec.tuning.log import TuningLog
from sparsec.tuning.lookup import DEFAULT_LOG
from sparsec.tuning.record import Machine, TuningRecord

MODELS = "bert-mini,minilm-l6,distilbert,bert-base"
SPARSITY = 0.8
BLOCKS = (None, (4, 1), (16, 1), (32, 1))
LAYERS = 2  # of each model: the others have the same shapes as the last


def main() -> int:
    args = _arguments()
    tokens = tuple(int(n) for n in args.tokens.split(","))
    options = TuneOptions(args.work, tokens, minutes=args.minutes)
    compile_options = CompileOptions(
        target=Target.host(),
        isa=Isa(args.isa) if args.isa else None,
        precision=args.precision,
        calibration=Calibration(random=True) if args.precision == "int8" else None,
    )
    with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
        for name, path in _models(args.models.split(","), Path(folder)):
            results = tune(path, compile_options, options, quiet=not sys.stdout.isatty())
            notes = [f"; {r.task}: {r.note}" for r in results if r.note]
            print(f"{name}: {len(results)} workloads{''.join(notes)}", flush=True)
    kept = merge_into(DEFAULT_LOG, TuningLog.read(args.work), Machine.of(Target.host()))
    print(f"{DEFAULT_LOG}: {kept} records, {DEFAULT_LOG.stat().st_size / 1e3:.0f} kB")
    return 0


def merge_into(path: Path, work: TuningLog, here: Machine) -> int:
    """Put the best records of `work` into the log at `path`; returns how many it has then."""
    fresh = [r for r in work.records if not log_files.is_stale(r, revision)]

    def records() -> list[TuningRecord]:
        known = TuningLog.read(path).records
        others = [r for r in known if r.machine.cpu != here.cpu]
        others = [r for r in others if not log_files.is_stale(r, revision)]
        return [*others, *map(log_files.condensed, log_files.best(fresh))]

    return log_files.write(path, records)


def _models(names: list[str], folder: Path) -> Iterator[tuple[str, Path]]:
    for name in names:
        for block in BLOCKS:
            pruning = None if block is None else Pruning(SPARSITY, *block)
            path = folder / "model.onnx"
            build_file(replace(find_model(name), layers=LAYERS), path, pruning=pruning)
            yield f"{name} {pruning or 'dense'}", path


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--models", default=MODELS)
    p.add_argument("--tokens", default="32,128,384")
    p.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="int8")
    p.add_argument("--isa", help="as for `sparsec tune`")
    p.add_argument("--minutes", type=float, help="per model and pruning (default: no limit)")
    p.add_argument("--work", type=Path, default=Path("out/default_log_work.jsonl"))
    args = p.parse_args()
    args.work.parent.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    sys.exit(main())
