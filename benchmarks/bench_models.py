"""Speed of zoo models against every peer at its best setting, in turn on pinned cores.

    python benchmarks/bench_models.py [--models bert-mini,distilbert] [--blocks dense,4x1,32x1]
                                      [--sparsities 80,90] [--shapes 1x32,1x128] [--threads 1,2]
    python benchmarks/bench_models.py --precision fp32|bf16

A cell is a model, a shape and a number of threads, measured in one fresh process. There all our
libraries and all the peers take turns of some runs, each after one run that is not timed, so that
noise of the machine hits all alike and no engine finds its caches cold. Peers run
the dense file: zeros in the weights change nothing for them here. The time of a peer is that of
the fastest of its settings; `ratio` is the median of the best peer over ours. Models and libraries
stay in --folder. With --resume a cell that --json has, of these sources, is not measured again.
On a busy machine wall times flatter the faster engine: measure one thread with --clock cpu then.
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
from dataclasses import dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
from bench_files import Library, Side, build, peers, progress, source_digest
from rich.console import Console
from rich.table import Table

import sparsec
from sparsec.errors import CompilerError, InvalidInput
from sparsec.models.registry import MODELS, find_model
from sparsec.models.weights import Pruning
from sparsec.target import Target
from sparsec.tools.inputs import random_inputs
from sparsec.tools.peers import PEERS, onnxruntime_runner, openvino_runner
from sparsec.tools.turns import in_turns, summary

Arrays = dict[str, np.ndarray[Any, Any]]
DEFAULTS = {  # per precision: models, blocks, shapes
    "int8": ("bert-mini,distilbert", "dense,4x1,16x1,32x1,16x4", "1x32,1x128,1x384"),
    "bf16": ("bert-mini,distilbert", "dense,4x1,16x1", "1x128"),
    "fp32": ("bert-mini,minilm-l6,distilbert", "dense", "1x128"),
}
ALL_SHAPES = "1x32,1x128,1x384,8x128"
# oneDNN, inside OpenVINO, then uses all of AVX-512 but no AMX.
WITHOUT_AMX = ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
GOALS_AMX = {80: 6.0, 90: 8.0}  # of the best block, by per cent of zeros
GOAL_WITHOUT_AMX = 3.0
GOAL_EASIEST = 2.5  # 4x1 with 80 % zeros, and no zeros at all
IDENTITY = ("model", "precision", "batch", "seq", "threads", "block", "sparsity")
Identity = tuple[Any, ...]
CPUINFO = Path("/proc/cpuinfo")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, slots=True)
class Cell:
    """What one process measures."""

    batch: int
    seq: int
    threads: int
    seconds: float
    clock: str
    libraries: tuple[Library, ...]
    peers: tuple[Side, ...]


def main() -> int:
    """Measure, print and return the exit status."""
    options = parse_arguments()
    if options.without_amx:
        os.environ.setdefault(*WITHOUT_AMX)
    records: list[dict[str, Any]] = []
    try:
        installed = installed_peers(options.peers)
        about = machine(options, installed)
        known = read_records(options.json, about) if options.resume else {}
        for record, is_new in measure_all(options, installed, known):
            records.append({**record, **about})
            if options.json is not None and is_new:
                with options.json.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
    except CompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_tables(records, about)
    return 0


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
    add("--peers", default="onnxruntime,openvino", metavar="NAME,...", help="default: both")
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
    options: argparse.Namespace, installed: list[str], known: dict[Identity, dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield a record per row of the table, and whether it is new: not of a cell in `known`."""
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
                built = libraries, tuple(peers(spec, options, installed))
            cell = Cell(batch, seq, threads, options.seconds, options.clock, *built)
            progress.print(f"{spec.name} {batch}x{seq}, {threads} threads")
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                times = process.submit(measure, cell).result()
            for record in rows(cell, times):
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


def installed_peers(text: str) -> list[str]:
    """Those of the named peers that can be imported."""
    names = text.split(",") if text else []
    for name in names:
        if name not in PEERS:
            raise InvalidInput(f"--peers {name}: known are {', '.join(PEERS)}")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        progress.print(f"not installed and left out: {', '.join(missing)}")
    return [name for name in names if name not in missing]


def prunings(options: argparse.Namespace) -> Iterator[Pruning | None]:
    """What is to be compiled; None is dense."""
    for block in options.blocks.split(","):
        if block == "dense":
            yield None
            continue
        height, width = parse_shape(block)
        for percent in integers(options.sparsities, "sparsities"):
            yield Pruning(percent / 100, height, width)


def measure(cell: Cell) -> list[list[float]]:
    """Seconds of each run of each side, ours first; runs in a process of its own."""
    cores = sorted(os.sched_getaffinity(0))
    if cell.threads > len(cores):
        raise InvalidInput(f"{cell.threads} threads: this process may use {len(cores)} cores only")
    os.sched_setaffinity(0, cores[: cell.threads])  # before any engine starts its threads
    models = [sparsec.load(library.path, threads=cell.threads) for library in cell.libraries]
    arrays = random_inputs(models[0], cell.batch, cell.seq, seed=0, padding=False)
    runs: list[Callable[[Arrays], Any]] = [*models]
    for side in cell.peers:
        if side.group.startswith("ORT"):
            runs.append(onnxruntime_runner(side.path, cell.threads)[1])
        else:
            runs.append(openvino_runner(side.path, cell.threads, precision=side.precision)[1])
    return in_turns([partial(run, arrays) for run in runs], cell.seconds, CLOCKS[cell.clock])


def rows(cell: Cell, times: list[list[float]]) -> Iterator[dict[str, Any]]:
    """A record per library of ours, each with the peers of its cell."""
    figures = [summary(taken) for taken in times]
    own, others = figures[: len(cell.libraries)], figures[len(cell.libraries) :]
    settings: list[dict[str, Any]] = [
        {"group": side.group, "setting": side.setting, **figure}
        for side, figure in zip(cell.peers, others, strict=True)
    ]
    best: dict[str, dict[str, Any]] = {}
    for s in sorted(settings, key=lambda s: float(s["median_ms"])):
        best.setdefault(s["group"], s)
    fastest = min((s["median_ms"] for s in settings), default=None)
    for library, figure in zip(cell.libraries, own, strict=True):
        yield {
            "batch": cell.batch,
            "seq": cell.seq,
            "threads": cell.threads,
            "block": library.block,
            "sparsity": library.sparsity,
            "sparsec": figure,
            "peers": best,
            "settings": settings,
            "ratio": fastest / figure["median_ms"] if fastest else None,
            **library.accuracy,
        }


def machine(options: argparse.Namespace, installed: list[str]) -> dict[str, Any]:
    """What the numbers were taken on, and what was compared."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    modules = [sparsec, *(importlib.import_module(name) for name in installed)]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cpu_isa": Target.host().isas[-1].value,
        "clock": options.clock,
        "seconds": options.seconds,
        "target": options.target,
        "target_isa": Target.named(options.target).isas[-1].value,
        "peers_without_amx": options.without_amx,
        "sources": source_digest(),
        "versions": {m.__name__: m.__version__.split("-")[0] for m in modules},
    }


def print_tables(records: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Print the table for people on standard output."""
    out = Console(width=None if sys.stdout.isatty() else 140)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    compiled = f"compiled for {about['target']} ({about['target_isa']})"
    limited = "; OpenVINO without AMX" if about["peers_without_amx"] else ""
    out.print(about["cpu"], about["cpu_isa"], compiled, versions + limited, sep="; ")
    groups = list(dict.fromkeys(side["group"] for side in records[0]["settings"]))
    table = Table(
        title=f"median ms ({about['clock']} clock), in turns; ratio: best peer / sparsec"
    )
    for column in ("model", "BxS", "threads", "block", "zeros", "sparsec", *groups, "ratio"):
        table.add_column(column)
    table.add_column("max error" if records[0]["precision"] == "fp32" else "cosine")
    for record in records:
        table.add_row(*cells(record, groups))
    out.print(table)
    if records[0]["precision"] == "int8" and any(record["ratio"] for record in records):
        out.print(summary_table(records))


def summary_table(records: list[dict[str, Any]]) -> Table:
    """Geometric means of the ratio over all shapes, per model and threads, with the goals."""
    title = "geometric means of best peer / sparsec; in brackets the goal"
    table = Table(title=title)
    kinds = list(dict.fromkeys((r["block"], r["sparsity"]) for r in records))
    best = [("best block", level) for level in dict.fromkeys(k[1] for k in kinds) if level]
    table.add_column("model")
    table.add_column("threads")
    for block, sparsity in (*kinds, *best):
        wanted = goal(block, sparsity, records[0]["target_isa"])
        name = f"{block} {sparsity} %" if sparsity else block
        table.add_column(f"{name} ({wanted:g}x)" if wanted else name)
    for model, threads in dict.fromkeys((r["model"], r["threads"]) for r in records):
        own = [r for r in records if (r["model"], r["threads"]) == (model, threads)]
        ratios = {kind: [r["ratio"] for r in own if (r["block"], r["sparsity"]) == kind]
                  for kind in kinds}  # fmt: skip
        for kind in best:
            columns = [v for k, v in ratios.items() if k[1] == kind[1] and k not in best]
            ratios[kind] = [max(cell) for cell in zip(*columns, strict=True)]
        texts = [f"{geometric_mean(ratios[kind]):.2f}" for kind in (*kinds, *best)]
        table.add_row(model, str(threads), *texts)
    return table


def goal(block: str, sparsity: int, target_isa: str) -> float | None:
    """How many times as fast as the best peer this should be."""
    if block == "best block":
        return GOALS_AMX.get(sparsity) if target_isa == "amx" else GOAL_WITHOUT_AMX
    return GOAL_EASIEST if (block, sparsity) in (("dense", 0), ("4x1", 80)) else None


def cells(record: dict[str, Any], groups: list[str]) -> list[str]:
    """The texts of one row."""
    fp32 = record["precision"] == "fp32"
    medians = [record["sparsec"], *(record["peers"].get(group) for group in groups)]
    return [
        record["model"],
        f"{record['batch']}x{record['seq']}",
        str(record["threads"]),
        record["block"],
        f"{record['sparsity']} %",
        *(f"{figure['median_ms']:.3f}" if figure else "-" for figure in medians),
        f"{record['ratio']:.2f}" if record["ratio"] else "-",
        f"{record['max_abs_error']:.1e}" if fp32 else f"{record['cosine']:.4f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
