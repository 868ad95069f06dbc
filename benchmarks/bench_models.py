"""Speed of zoo models against every peer at its best setting, in turn on pinned cores.

    python benchmarks/bench_models.py [--models bert-mini,distilbert] [--blocks dense,4x1,32x1]
                                      [--sparsities 80,90] [--shapes 1x32,1x128] [--threads 1,2]
    python benchmarks/bench_models.py --precision fp32|bf16

A cell is a model, a shape and a number of threads, measured in one fresh process. There all our
libraries and all the peers take turns of some runs, each after one run that is not timed, so that
noise of the machine hits all alike and no engine finds its caches cold. Peers run
the dense file: zeros in the weights change nothing for them here. The time of a peer is that of
the fastest of its settings; `ratio` is the median of the best peer over ours. Models and libraries
stay in --folder, and are made again when the sources of sparsec are newer.
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
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import sparsec
from sparsec.errors import CompilerError, InvalidInput
from sparsec.models.build import build_file
from sparsec.models.registry import MODELS, ModelSpec, find_model
from sparsec.models.weights import Pruning
from sparsec.options import Calibration
from sparsec.target import Target
from sparsec.tools.inputs import random_inputs
from sparsec.tools.peer_models import quantize_dynamic, quantize_static
from sparsec.tools.peers import PEERS, onnxruntime_runner, openvino_has_bf16, openvino_runner
from sparsec.tools.turns import in_turns, summary
from sparsec.tools.verify import verify

Arrays = dict[str, np.ndarray[Any, Any]]
DEFAULTS = {  # per precision: models, blocks, shapes
    "int8": ("bert-mini,distilbert", "dense,4x1,16x1,32x1,16x4", "1x32,1x128,1x384"),
    "bf16": ("bert-mini,distilbert", "dense,4x1,16x1", "1x128"),
    "fp32": ("bert-mini,minilm-l6,distilbert", "dense", "1x128"),
}
ALL_SHAPES = "1x32,1x128,1x384,8x128"
SAMPLES = (16, 64)  # of random tokens, for the ranges of activations: ours and the peers'
# oneDNN, inside OpenVINO, then uses all of AVX-512 but no AMX.
WITHOUT_AMX = ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
CPUINFO = Path("/proc/cpuinfo")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
progress = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Side:
    """One engine with one file: `group` is its column in the table."""

    group: str
    setting: str
    path: Path
    precision: str | None = None  # of OpenVINO's layers that are not quantised


@dataclass(frozen=True, slots=True)
class Library:
    """One of our libraries, and how near its answers are to the fp32 file's."""

    block: str
    sparsity: int
    path: Path
    accuracy: dict[str, float]


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
        for record in measure_all(options, installed):
            records.append({**record, **about})
            if options.json is not None:
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
    options = parser.parse_args()
    models, blocks, shapes = DEFAULTS[options.precision]
    if options.all:
        models = ",".join(name for name in MODELS if name != "minilm-l6")
        shapes, options.threads = ALL_SHAPES, "1,2"
    options.models = options.models or models
    options.blocks = options.blocks or blocks
    options.shapes = options.shapes or shapes
    return options


def measure_all(options: argparse.Namespace, installed: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a record per row of the table."""
    shapes = [parse_shape(text) for text in options.shapes.split(",")]
    specs = [find_model(name) for name in options.models.split(",")]
    wanted, counts = list(prunings(options)), integers(options.threads, "threads")
    for spec in specs:
        libraries = tuple(build(spec, options, pruning) for pruning in wanted)
        sides = tuple(peers(spec, options, installed))
        for batch, seq in shapes:
            for threads in counts:
                how = (batch, seq, threads, options.seconds, options.clock)
                cell = Cell(*how, libraries, sides)
                progress.print(f"{spec.name} {batch}x{seq}, {threads} threads")
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    times = process.submit(measure, cell).result()
                for record in rows(cell, times):
                    yield {"model": spec.name, "precision": options.precision, **record}


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


def build(spec: ModelSpec, options: argparse.Namespace, pruning: Pruning | None) -> Library:
    """Compile a model, unless the folder has it."""
    sparsity = round(pruning.sparsity * 100) if pruning else 0
    variant = f"{pruning}_{sparsity}" if pruning else "dense"
    onnx_path = options.folder / spec.name / f"{variant}.onnx"
    library = onnx_path.with_name(f"{variant}_{options.precision}_{options.target}.so")
    onnx_path.parent.mkdir(parents=True, exist_ok=True)
    if not onnx_path.exists():
        progress.print(f"{spec.name} {variant}: building")
        build_file(spec, onnx_path, pruning=pruning)
    if not library.exists() or library.stat().st_mtime < newest_source():
        progress.print(f"{spec.name} {variant}: compiling")
        data = samples(spec, onnx_path)
        sparsec.compile_model(
            onnx_path,
            library,
            target=options.target,
            precision=options.precision,
            calibration=Calibration(data=data) if options.precision == "int8" else None,
        )
    return Library(str(pruning or "dense"), sparsity, library, accuracy(library, onnx_path))


def newest_source() -> float:
    """When a file that a library is made from last changed."""
    folders = [Path(folder) for folder in sparsec.__path__]
    for package in ("passes", "codegen", "runtime"):
        spec = importlib.util.find_spec(f"sparsec.{package}")
        folders += [Path(f) for f in (spec.submodule_search_locations or [])] if spec else []
    files = [path for folder in folders for path in folder.rglob("*.[pch]*") if path.is_file()]
    return max(path.stat().st_mtime for path in files if path.suffix in {".py", ".c", ".h"})


def samples(spec: ModelSpec, beside: Path) -> Path:
    """An npz of random tokens: good for measuring speed and nothing else."""
    path = beside.with_name("samples.npz")
    tokens = np.random.default_rng(7).integers(0, spec.vocab, SAMPLES)
    arrays = {"input_ids": tokens, "attention_mask": np.ones(SAMPLES, np.int64)}
    if spec.has_token_types:
        arrays["token_type_ids"] = np.zeros(SAMPLES, np.int64)
    np.savez(path, allow_pickle=False, **arrays)
    return path


def accuracy(library: Path, onnx_path: Path) -> dict[str, float]:
    """Worst figures against the fp32 file over all outputs, on inputs with padding."""
    found = verify(
        library,
        onnx_path,
        shapes=[(1, 32), (2, 33)],
        threads=1,
        tolerance=0.0,
        seed=0,
        progress=lambda stage: None,
    )["outputs"].values()
    return {
        "max_abs_error": max(float(figures["max_abs_error"]) for figures in found),
        "cosine": min(float(figures["cosine"]) for figures in found),
    }


def peers(spec: ModelSpec, options: argparse.Namespace, installed: list[str]) -> list[Side]:
    """All settings of the installed peers, with their files made."""
    folder = options.folder / spec.name
    dense = folder / "dense.onnx"
    sides = []
    if not dense.exists():
        build_file(spec, dense)
    if "onnxruntime" in installed:
        sides.append(Side("ORT fp32", "fp32", dense))
    if "openvino" in installed:
        sides.append(Side("OV fp32", "fp32", dense, "f32"))
    if options.precision == "fp32":
        return sides
    if "openvino" in installed and openvino_has_bf16():
        sides.append(Side("OV bf16", "bf16", dense, "bf16"))
    if options.precision == "bf16":
        return sides
    for setting, make in int8_files(dense, samples(spec, dense)).items():
        path = folder / f"peer_{setting.replace(' ', '_')}.onnx"
        if not path.exists():
            progress.print(f"{spec.name} for the peers: {setting}")
            make(path)
        if "onnxruntime" in installed:
            sides.append(Side("ORT int8", setting, path))
        if "openvino" in installed and setting != "dynamic":
            sides.append(Side("OV int8", setting, path))
    return sides


def int8_files(dense: Path, calibration: Path) -> dict[str, Callable[[Path], None]]:
    """Makers of the int8 files by setting."""
    tokens: Arrays = dict(np.load(calibration))
    return {
        "static linear": lambda path: quantize_static(dense, path, tokens, attention=False),
        "static all": lambda path: quantize_static(dense, path, tokens, attention=True),
        "dynamic": lambda path: quantize_dynamic(dense, path),
    }


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
        "target": options.target,
        "target_isa": Target.named(options.target).isas[-1].value,
        "peers_without_amx": options.without_amx,
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
