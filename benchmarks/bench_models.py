"""fp32 speed of zoo models against ONNX Runtime, run in turn on pinned cores.

    python benchmarks/bench_models.py [--models bert-mini,minilm-l6] [--shapes 1x128,1x32]

One JSON line per model and shape on standard output (or in --output): median, p10 and p90 in ms of
each engine, `ratio` (the peer's median over ours, above 1: ours is faster) and `max_abs_error`
against the peer on inputs with padding.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import sparsec
from sparsec.errors import CompilerError, InvalidInput
from sparsec.models.build import build_file
from sparsec.models.registry import find_model
from sparsec.tools.bench import bench
from sparsec.tools.verify import verify

MODELS = "bert-mini,minilm-l6,distilbert"
CPUINFO = Path("/proc/cpuinfo")
console = Console(stderr=True)


def main() -> int:
    """Measure, print and return the exit status."""
    options = parse_arguments()
    try:
        records = list(measure_all(options))
    except CompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(records)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="zoo models against ONNX Runtime, fp32")
    add = parser.add_argument
    add("--models", default=MODELS, metavar="NAME,...", help=f"default {MODELS}")
    add("--shapes", default="1x128", metavar="BxS,...", help="batch x sequence; default 1x128")
    add("--threads", type=int, default=1)
    add("--seconds", type=float, default=10.0, help="how long to measure each model and shape")
    add("--target", help="target to compile for; default: this machine")
    add("--folder", type=Path, metavar="DIR", help="keep the models and libraries there")
    add("--output", type=Path, metavar="FILE", help="append the JSON lines to this file")
    return parser.parse_args()


def measure_all(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a record per model and shape, written as a JSON line as soon as it is there."""
    shapes = [parse_shape(text) for text in options.shapes.split(",")]
    with tempfile.TemporaryDirectory() as scratch, console.status("") as status:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.models.split(","):
            onnx_path, library = folder / f"{name}.onnx", folder / f"{name}.so"
            status.update(f"{name}: building and compiling")
            build_file(find_model(name), onnx_path)
            compiled = sparsec.compile_model(onnx_path, library, target=options.target)
            for batch, seq in shapes:
                status.update(f"{name} {batch}x{seq}")
                record = {
                    "model": name,
                    "compile_seconds": round(sum(compiled.seconds.values()), 2),
                    **measure(onnx_path, library, batch, seq, options),
                    "max_abs_error": max_abs_error(onnx_path, library, batch, seq, options),
                    **machine(),
                }
                write(record, options.output)
                yield record


def parse_shape(text: str) -> tuple[int, int]:
    """Read `1x128`."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidInput(f"shape {text!r}: wanted BATCHxSEQ, for example 1x128")
    return int(parts[0]), int(parts[1])


def measure(
    onnx_path: Path, library: Path, batch: int, seq: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Latencies of both engines, in turn, bound to the first cores."""
    found = bench(
        library,
        batch=batch,
        seq=seq,
        threads=options.threads,
        onnx=onnx_path,
        against="onnxruntime",
        seconds=options.seconds,
        pin=True,
        progress=lambda stage: None,
    )
    return {key: found[key] for key in ("batch", "seq", "threads", "engines", "ratio")}


def max_abs_error(
    onnx_path: Path, library: Path, batch: int, seq: int, options: argparse.Namespace
) -> float:
    """Largest difference to ONNX Runtime, all outputs; a second row makes room for padding."""
    found = verify(
        library,
        onnx_path,
        shapes=[(batch, seq), (batch + 1, seq)],
        threads=options.threads,
        tolerance=0.0,
        seed=0,
        progress=lambda stage: None,
    )
    return max(float(figures["max_abs_error"]) for figures in found["outputs"].values())


def machine() -> dict[str, str]:
    """What the numbers were taken on."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.machine()
    return {"cpu": cpu, "sparsec": sparsec.__version__}


def write(record: dict[str, Any], output: Path | None) -> None:
    """Print the record as a JSON line, or append it to a file."""
    line = json.dumps(record)
    if output is None:
        print(line, flush=True)
        return
    with output.open("a") as file:
        file.write(line + "\n")


def print_table(records: list[dict[str, Any]]) -> None:
    """Print a table for people on standard error."""
    table = Table(title="median ms, in turn on pinned cores")
    for column in ("model", "shape", "threads", "sparsec", "peer", "ratio", "max abs error"):
        table.add_column(column)
    for record in records:
        ours, peer = record["engines"].values()
        table.add_row(
            record["model"],
            f"{record['batch']}x{record['seq']}",
            str(record["threads"]),
            f"{ours['median_ms']:.3f}",
            f"{peer['median_ms']:.3f}",
            f"{record['ratio']:.2f}",
            f"{record['max_abs_error']:.1e}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
