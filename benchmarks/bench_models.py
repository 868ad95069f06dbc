"""Speed of zoo models against every peer at its best setting, in turn on pinned cores.

    python benchmarks/bench_models.py [--models bert-mini,distilbert] [--blocks dense,4x1,32x1]
                                      [--sparsities 80,90] [--shapes 1x32,1x128] [--threads 1,2]
    python benchmarks/bench_models.py --precision fp32|bf16
    python benchmarks/bench_models.py --deepsparse-python VENV/bin/python --itrex-python ...

A cell is a model, a shape and a number of threads, measured in one fresh process. There all our
libraries and all the peers take turns of some runs, each after one run that is not timed, so that
noise of the machine hits all alike and no engine finds its caches cold. The time of a peer is that
of the fastest of its settings; `ratio` is the median of the best peer over ours. Zeros in the
weights change nothing for ONNX Runtime and OpenVINO, which run the dense file; DeepSparse and
ITREX, each in a worker process, also run files pruned in their own blocks (docs/benchmarks.md).
Models and libraries stay in --folder. With --resume a cell that --json has, of these sources, is
not measured again. On a busy machine wall times flatter the faster engine: measure one thread with
--clock cpu then.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import numpy as np
from bench_files import Library, Side, build, peers, progress, source_digest
from model_tables import print_tables
from onednn import WITHOUT_AMX
from remote import Remote
from sparse_peers import SPARSE_ENGINES, add_python_options, installed_version, sparse_peers

import sparsec
from sparsec.errors import CompilerError, InvalidInput
from sparsec.models.registry import MODELS, ModelSpec, find_model
from sparsec.models.weights import Pruning
from sparsec.target import Target, core_cpus, cpu_fields
from sparsec.tools.inputs import random_inputs
from sparsec.tools.peers import PEERS, onnxruntime_runner, openvino_runner
from sparsec.tools.turns import Function, Timed, in_turns, summary

Arrays = dict[str, np.ndarray[Any, Any]]
DEFAULTS = {  # per precision: models, blocks, shapes
    "int8": ("bert-mini,distilbert", "dense,4x1,16x1,32x1,16x4", "1x32,1x128,1x384"),
    "bf16": ("bert-mini,distilbert", "dense,4x1,16x1", "1x128"),
    "fp32": ("bert-mini,minilm-l6,distilbert", "dense", "1x128"),
}
ALL_SHAPES = "1x32,1x128,1x384,8x128"
IDENTITY = ("model", "precision", "batch", "seq", "threads", "block", "sparsity")
Identity = tuple[Any, ...]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, slots=True)
class Cell:
    """What one process measures, with the workers that it starts."""

    batch: int
    seq: int
    threads: int
    seconds: float
    clock: str
    libraries: tuple[Library, ...]
    peers: tuple[Side, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds of each run of an engine, or why they do not count."""

    seconds: list[float]
    failure: str | None = None


def main() -> int:
    """Measure, print and return the exit status."""
    options = parse_arguments()
    if options.without_amx:
        os.environ.setdefault(*WITHOUT_AMX)
    records: list[dict[str, Any]] = []
    lost: list[str] = []
    try:
        installed = installed_peers(options)
        about = machine(options, installed)
        known = read_records(options.json, about) if options.resume else {}
        for record, is_new in measure_all(options, installed, known, lost):
            records.append({**record, **about})
            if options.json is not None and is_new:
                with options.json.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
    except CompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if records:
        print_tables(records, about)
    for title in lost:
        print(
            f"{title}: killed; for want of memory? Measure fewer --peers at once", file=sys.stderr
        )
    return 1 if lost else 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="zoo models against the peers")
    add = parser.add_argument
    add("--precision", choices=list(DEFAULTS), default="int8")
    add("--models", metavar="NAME,...", help=f"of {', '.join(MODELS)}")
    add("--blocks", metavar="RxC,...", help="output x input, or dense")
    add("--sparsities", default="80,90", metavar="PERCENT,...", help="default 80,90")
    add("--shapes", metavar="BxS,...", help="batch x sequence")
    add("--threads", default="1", metavar="N,...", help="default 1")
    add("--all", action="store_true", help=f"all models but minilm, {ALL_SHAPES}, 1 and 2 threads")
    names = ",".join((*PEERS, *SPARSE_ENGINES))
    add("--peers", default=names, metavar="NAME,...", help=f"default: {names}")
    add_python_options(parser)
    add("--seconds", type=float, default=2.0, help="of each engine and setting in each cell")
    add("--clock", choices=list(CLOCKS), default="wall", help="cpu: of the whole process")
    add("--target", default="native", help="target to compile for; default: this machine")
    add("--without-amx", action="store_true", help="keep OpenVINO from using AMX")
    add("--folder", type=Path, default=Path("out/bench"), metavar="DIR", help="models, libraries")
    add("--json", type=Path, metavar="FILE", help="append a JSON line per row to this file")
    add("--resume", action="store_true", help="leave out the cells that the --json file has")
    options = parser.parse_args()
    if options.resume and options.json is None:
        parser.error("--resume needs --json FILE")
    models, blocks, shapes = DEFAULTS[options.precision]
    if options.all:
        models = ",".join(name for name in MODELS if name != "minilm-l6")
        shapes, options.threads = ALL_SHAPES, "1,2"
    options.models = options.models or models
    options.blocks = options.blocks or blocks
    options.shapes = options.shapes or shapes
    return options


def measure_all(
    options: argparse.Namespace, installed: dict[str, str],
    known: dict[Identity, dict[str, Any]], lost: list[str],
) -> Iterator[tuple[dict[str, Any], bool]]:  # fmt: skip
    """Yield a record per row of the table, and whether it is new: not of a cell in `known`.

    A cell whose process is killed goes to `lost`.
    """
    shapes = [parse_shape(text) for text in options.shapes.split(",")]
    specs = [find_model(name) for name in options.models.split(",")]
    wanted, counts = list(prunings(options)), integers(options.threads, "threads")
    for spec in specs:
        built: tuple[tuple[Library, ...], tuple[Side, ...]] | None = None
        for (batch, seq), threads in product(shapes, counts):
            names = [
                (spec.name, options.precision, batch, seq, threads, *described(pruning))
                for pruning in wanted
            ]
            if all(name in known for name in names):
                yield from ((known[name], False) for name in names)
                continue
            if built is None:
                libraries = tuple(build(spec, options, pruning) for pruning in wanted)
                built = libraries, all_peers(spec, options, installed, wanted)
            cell = Cell(batch, seq, threads, options.seconds, options.clock, *built)
            title = f"{spec.name} {batch}x{seq}, {threads} threads"
            progress.print(title)
            try:
                with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as process:
                    outcomes = process.submit(measure, cell).result()
            except BrokenProcessPool:
                lost.append(title)
                continue
            for side, outcome in zip(cell.peers, outcomes[len(cell.libraries) :], strict=True):
                if outcome.failure is not None:
                    what = f"{side.group}, {side.setting}, does not count: {outcome.failure}"
                    progress.print(what, markup=False)
            for record in rows(cell, outcomes):
                yield {"model": spec.name, "precision": options.precision, **record}, True


def described(pruning: Pruning | None) -> tuple[str, int]:
    """Block and per cent of zeros, as a record has them."""
    return str(pruning or "dense"), round(pruning.sparsity * 100) if pruning else 0


def identity(record: dict[str, Any]) -> Identity:
    """What tells a row from the others of the same machine and sources."""
    return tuple(record[name] for name in IDENTITY)


def read_records(path: Path, about: dict[str, Any]) -> dict[Identity, dict[str, Any]]:
    """The newest record of each row that was measured with all that `about` says."""
    if not path.exists():
        return {}
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            if all(record.get(name) == value for name, value in about.items()):
                found[identity(record)] = record
        except (ValueError, KeyError, AttributeError):
            raise InvalidInput(
                f"{path}, line {number}: it is no record of this benchmark; give another --json"
            ) from None
    return found


def parse_shape(text: str) -> tuple[int, int]:
    """Read `1x128`."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidInput(f"shape {text!r}: wanted AxB, for example 1x128")
    return int(parts[0]), int(parts[1])


def integers(text: str, what: str) -> list[int]:
    """Read `80,90`."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidInput(f"--{what} {text}: wanted numbers from 1 with commas between them")
    return [int(part) for part in parts]


def installed_peers(options: argparse.Namespace) -> dict[str, str]:
    """Version of each of the named peers that can be measured; the others are said."""
    found = {}
    for name in options.peers.split(",") if options.peers else []:
        if name in PEERS:
            if importlib.util.find_spec(name) is None:
                progress.print(f"not installed and left out: {name}")
                continue
            module = importlib.import_module(name)
            found[name] = module.__version__.split("-")[0]
        elif name in SPARSE_ENGINES:
            if options.precision != "int8":
                title = SPARSE_ENGINES[name].title
                progress.print(f"{title} is left out: it is measured in int8 only")
            elif (version := installed_version(name, options)) is not None:
                found[name] = version
        else:
            known = ", ".join((*PEERS, *SPARSE_ENGINES))
            raise InvalidInput(f"--peers {name}: known are {known}")
    return found


def all_peers(
    spec: ModelSpec,
    options: argparse.Namespace,
    installed: dict[str, str],
    wanted: list[Pruning | None],
) -> tuple[Side, ...]:
    """All settings of all peers for these rows, with their files made."""
    levels = sorted({round(pruning.sparsity * 100) for pruning in wanted if pruning})
    here = [name for name in installed if name in PEERS]
    remote = [name for name in installed if name in SPARSE_ENGINES]
    return (*peers(spec, options, here), *sparse_peers(spec, options, remote, levels))


def prunings(options: argparse.Namespace) -> Iterator[Pruning | None]:
    """What is to be compiled; None is dense."""
    for block in options.blocks.split(","):
        if block == "dense":
            yield None
            continue
        height, width = parse_shape(block)
        for percent in integers(options.sparsities, "sparsities"):
            yield Pruning(percent / 100, height, width)


def end_with_parent() -> None:
    """A benchmark that is killed leaves nothing behind that takes time from the next one."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def measure(cell: Cell) -> list[Outcome]:
    """What each side took, ours first; runs in a process of its own."""
    cpus = core_cpus()
    if cell.threads > len(cpus):
        raise InvalidInput(f"{cell.threads} threads: this process may use {len(cpus)} cores only")
    # Before any engine starts its threads; workers inherit it.
    os.sched_setaffinity(0, cpus[: cell.threads])
    models = [sparsec.load(library.path, threads=cell.threads) for library in cell.libraries]
    arrays = random_inputs(models[0], cell.batch, cell.seq, seed=0, padding=False)
    with ExitStack() as stack:
        inputs = Path(stack.enter_context(TemporaryDirectory()), "inputs.npz")
        np.savez(inputs, allow_pickle=False, **arrays)
        engines: list[Timed] = [
            Function(partial(model, arrays), CLOCKS[cell.clock]) for model in models
        ]
        for side in cell.peers:
            if side.worker is None:
                run = partial(local_runner(side, cell.threads), arrays)
                engines.append(Function(run, CLOCKS[cell.clock]))
                continue
            remote = stack.enter_context(closing(Remote(side.worker)))
            remote.load(
                path=str(side.path), inputs=str(inputs), threads=cell.threads, clock=cell.clock
            )
            engines.append(remote)
        times = in_turns(engines, cell.seconds)
        failures = [getattr(engine, "failure", None) for engine in engines]
    return [Outcome(*both) for both in zip(times, failures, strict=True)]


def local_runner(side: Side, threads: int) -> Callable[[Arrays], Any]:
    """A peer that runs in this process."""
    if side.group.startswith("ORT"):
        return onnxruntime_runner(side.path, threads)[1]
    return openvino_runner(side.path, threads, precision=side.precision)[1]


def rows(cell: Cell, outcomes: list[Outcome]) -> Iterator[dict[str, Any]]:
    """A record per library of ours, each with the peers that count for it.

    A peer counts for a row with its dense files and with those that have as many zeros.
    """
    own, others = outcomes[: len(cell.libraries)], outcomes[len(cell.libraries) :]
    settings: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for side, outcome in zip(cell.peers, others, strict=True):
        about = {"group": side.group, "setting": side.setting, "sparsity": side.sparsity}
        if outcome.failure is None:
            settings.append({**about, **summary(outcome.seconds)})
        else:
            failures.append({**about, "reason": outcome.failure})
    for library, outcome in zip(cell.libraries, own, strict=True):
        figure = summary(outcome.seconds)
        zeros = (0, library.sparsity)
        fit = [s for s in settings if s["sparsity"] in zeros]
        best: dict[str, dict[str, Any]] = {}
        for s in sorted(fit, key=lambda s: float(s["median_ms"])):
            best.setdefault(s["group"], s)
        fastest = min((s["median_ms"] for s in fit), default=None)
        yield {
            "batch": cell.batch,
            "seq": cell.seq,
            "threads": cell.threads,
            "block": library.block,
            "sparsity": library.sparsity,
            "sparsec": figure,
            "peers": best,
            "settings": fit,
            "failures": [f for f in failures if f["sparsity"] in zeros],
            "ratio": fastest / figure["median_ms"] if fastest else None,
            **library.accuracy,
        }


def machine(options: argparse.Namespace, installed: dict[str, str]) -> dict[str, Any]:
    """What the numbers were taken on, and what was compared."""
    return {
        "cpu": cpu_fields().get("model name", platform.machine()),
        "cpu_isa": Target.host().isas[-1].value,
        "clock": options.clock,
        "seconds": options.seconds,
        "target": options.target,
        "target_isa": Target.named(options.target).isas[-1].value,
        "peers_without_amx": options.without_amx,
        "sources": source_digest(),
        "versions": {"sparsec": sparsec.__version__, **installed},
    }


if __name__ == "__main__":
    sys.exit(main())
