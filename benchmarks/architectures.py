"""Compiles every model of a folder and compares it with ONNX Runtime on several shapes and masks.

    python benchmarks/export_architectures.py FOLDER
    python benchmarks/architectures.py FOLDER [--only gpt2]

A row says the largest difference, relative to the largest number wanted, and which ops have no
hand-made kernel. The exit status is 1 when a model is refused or differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import sparsec
from sparsec.errors import CompilerError, InvalidInput
from sparsec.runtime import Model
from sparsec.tools.peers import onnxruntime_runner

Arrays = dict[str, np.ndarray[Any, Any]]
# Both sides sum up to 128 products of size 1 in fp32, in their own order, in up to 4 layers:
# some 30 roundings of 6e-8 relative to the largest number, and a layer norm may double them.
TOLERANCE = 2e-5
SHAPES = ((1, 1), (1, 7), (2, 16), (3, 33), (2, 65), (1, 100))  # batch, seq: around all edges
PAST = 5  # tokens in the cache of a model that takes one
VOCABULARY = 200
IMAGE = (3, 32, 32)


def _ones(batch: int, seq: int, rng: np.random.Generator) -> Any:
    return np.ones((batch, seq), np.int64)


def _right(batch: int, seq: int, rng: np.random.Generator) -> Any:
    lengths = rng.integers(1, seq + 1, (batch, 1))
    return (np.arange(seq) < lengths).astype(np.int64)


def _left(batch: int, seq: int, rng: np.random.Generator) -> Any:
    return _right(batch, seq, rng)[:, ::-1]


def _holes(batch: int, seq: int, rng: np.random.Generator) -> Any:
    mask = rng.integers(0, 2, (batch, seq))
    mask[:, 0] = 1  # each token of a causal model then sees at least one
    return mask


def _zeros(batch: int, seq: int, rng: np.random.Generator) -> Any:
    return np.zeros((batch, seq), np.int64)


MASKS: Mapping[str, Callable[[int, int, np.random.Generator], Any]] = {
    "ones": _ones,
    "right": _right,
    "left": _left,
    "holes": _holes,
    "zeros": _zeros,
}


def feed(model: Model, batch: int, seq: int, mask: str, seed: int) -> Arrays:
    """One array per input, by what the exporters call them."""
    rng = np.random.default_rng(seed)
    past = PAST if any("past" in p.name for p in model.inputs) else 0
    fixed = MASKS[mask](batch, past + seq, rng)
    arrays: Arrays = {}
    for port in model.inputs:
        match port.name.split(".")[0]:
            case "input_ids":
                array = rng.integers(3, VOCABULARY, (batch, seq))
            case "attention_mask":
                array = fixed
            case "token_type_ids":
                array = rng.integers(0, 2, (batch, seq))
            case "position_ids":
                array = np.maximum(np.cumsum(fixed, 1) - 1, 0)[:, past:]
            case "past_key_values":
                sizes = [d if isinstance(d, int) else past for d in port.shape]
                array = rng.standard_normal((batch, *sizes[1:]))
            case _:
                array = rng.standard_normal((batch, *IMAGE))
        arrays[port.name] = array.astype(port.dtype)
    return arrays


def feeds(model: Model) -> Iterator[tuple[str, Arrays]]:
    if any(len(p.shape) == 4 and "past" not in p.name for p in model.inputs):
        for batch in (1, 2, 5):
            yield f"{batch} images", feed(model, batch, 1, "ones", batch)
        return
    for batch, seq in SHAPES:
        for mask in MASKS:
            yield f"{batch}x{seq} {mask}", feed(model, batch, seq, mask, 31 * seq + batch)


@dataclass(frozen=True, slots=True)
class Row:
    """One model: `error` is relative; `generic` counts the ops without a hand-made kernel."""

    name: str
    error: float
    where: str
    core: Mapping[str, int]
    generic: Mapping[str, int]
    bytes: int
    onnx_bytes: int


def check(path: Path, folder: Path, reference: Callable[[Arrays], Arrays]) -> Row:
    """Compile and compare with `reference`. Raises CompilerError when the model is refused."""
    library = folder / f"{path.stem}.so"
    report = sparsec.compile_model(path, library, shapes=_shapes(path)).report
    worst, where = 0.0, ""
    with sparsec.load(library, threads=2) as model:
        for text, arrays in feeds(model):
            got, wanted = model(arrays), reference(arrays)
            for name in wanted:
                error = _error(got[name], wanted[name])
                if error > worst:
                    worst, where = error, f"{name} at {text}"
    counts = [
        Counter(r["op"] for r in report["layers"] if r["generic"] is kind)
        for kind in (False, True)
    ]
    sizes = library.stat().st_size, path.stat().st_size
    return Row(path.stem, worst, where, counts[0], counts[1], *sizes)


def _shapes(path: Path) -> dict[str, tuple[int | str, ...]]:
    """optimum leaves the size of images open, which the positions of the patches fix."""
    is_image = path.name.startswith("vit-") and path.stem.endswith("optimum")
    return {"pixel_values": ("batch", *IMAGE)} if is_image else {}


def _error(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    if got.shape != wanted.shape or not np.array_equal(np.isnan(got), np.isnan(wanted)):
        return float("inf")
    wanted64 = np.nan_to_num(wanted.astype(np.float64))
    difference = np.abs(np.nan_to_num(got.astype(np.float64)) - wanted64).max(initial=0.0)
    return float(difference / max(1.0, np.abs(wanted64).max(initial=0.0)))


def _line(row: Row) -> str:
    word = "ok" if row.error <= TOLERANCE else f"WRONG ({row.where})"
    generic = " ".join(f"{op}:{n}" for op, n in sorted(row.generic.items()))
    core = " ".join(f"{op}:{row.core.get(op, 0)}" for op in ("attention", "linear", "layer_norm"))
    ratio = row.bytes / row.onnx_bytes
    return f"{row.name}: {row.error:.1e} {word}; {core}; size {ratio:.2f}; generic {generic}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare compiled models with ONNX Runtime.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="parts of names of files, commas between")
    options = parser.parse_args()
    parts = options.only.split(",")
    paths = sorted(p for p in options.folder.glob("*.onnx") if any(x in p.name for x in parts))
    started, failed, refused = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            try:
                _, reference = onnxruntime_runner(path, 1)
            except InvalidInput:  # exporters of old opsets write some models that are not valid
                refused += 1
                print(f"{path.stem}: not compared, ONNX Runtime refuses the file", flush=True)
                continue
            try:
                row = check(path, Path(folder), reference)
            except CompilerError as error:
                failed += 1
                print(f"{path.stem}: {type(error).__name__}: {error}", flush=True)
                continue
            failed += row.error > TOLERANCE
            print(_line(row), flush=True)
    seconds = time.perf_counter() - started
    compared = len(paths) - refused
    print(f"{compared - failed} of {compared} models agree with ONNX Runtime, {seconds:.0f} s")
    return 1 if failed or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
