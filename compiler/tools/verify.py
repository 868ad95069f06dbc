"""Compares a compiled model with the ONNX file that it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sparsec.errors import InvalidInput
from sparsec.runtime import Model, load
from sparsec.tools.console import console
from sparsec.tools.inputs import Arrays, fixed_sizes, random_inputs, run_shape
from sparsec.tools.peers import reference_runner

SHAPES = ((1, 1), (1, 7), (3, 33), (2, 128))


def verify(
    library: Path,
    onnx: Path,
    *,
    shapes: Sequence[tuple[int, int]] | None,
    threads: int,
    tolerance: float,
    seed: int,
    progress: Callable[[str], None],
    isa: str | None = None,
) -> dict[str, Any]:
    """Run both on random inputs with padding, for each (batch, seq) in `shapes`.

    None: for SHAPES, with as long sequences as the model can take, or the shape that the library
    is compiled for.

    The result has, per output, the largest absolute error and the least cosine over all shapes;
    `passed` says that every error is at most `tolerance`. NaN in one of the two fails.
    """
    model = load(library, threads=threads, isa=isa)
    if shapes is None:
        most = min(model.description.get("limits", {}).values(), default=SHAPES[-1][1])
        rows, length = fixed_sizes(model)
        usual = ((rows or batch, length or min(seq, most)) for batch, seq in SHAPES)
        shapes = list(dict.fromkeys(usual))
    for shape in shapes:
        run_shape(model, *shape)
    name, reference = reference_runner(onnx, threads)
    worst: dict[str, dict[str, float]] = {}
    for batch, seq in shapes:
        progress(f"comparing {batch}x{seq}")
        arrays = random_inputs(model, batch, seq, seed=seed, padding=True)
        wanted = without_padding(model, arrays, reference(arrays))
        _merge(worst, compare(model(arrays), wanted))
    passed = all(w["max_abs_error"] <= tolerance for w in worst.values())
    return {
        "reference": name,
        "shapes": [f"{b}x{s}" for b, s in shapes],
        "tolerance": tolerance,
        "outputs": worst,
        "passed": passed,
    }


def without_padding(model: Model, arrays: Arrays, outputs: Arrays) -> Arrays:
    """What the model promises where `outputs` are right: its outputs of each token are 0 at
    padding that it does not compute."""
    padding = model.description["padding"]
    if not padding["dropped"]:
        return outputs
    real = arrays[padding["mask"]] != 0
    zeroed = set(padding["outputs"])
    return {
        name: np.where(real.reshape(*real.shape, *[1] * (data.ndim - 2)), data, 0).astype(
            data.dtype
        )
        if name in zeroed
        else data
        for name, data in outputs.items()
    }


def compare(got: Arrays, wanted: Arrays) -> dict[str, dict[str, float]]:
    """Largest absolute error and cosine per output; NaN on one side alone is an infinite error."""
    if set(got) != set(wanted):
        raise InvalidInput(
            f"the outputs differ: {sorted(got)} compiled, {sorted(wanted)} in the ONNX file; "
            "is it the file that was compiled?"
        )
    return {name: _compare(got[name], wanted[name], name) for name in wanted}


def _compare(
    got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], name: str
) -> dict[str, float]:
    if got.shape != wanted.shape:
        raise InvalidInput(f"output {name}: shape {got.shape}, wanted {wanted.shape}")
    a, b = got.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return {"max_abs_error": float("inf"), "cosine": 0.0}
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return {
        "max_abs_error": float(np.abs(a - b).max(initial=0.0)),
        "cosine": float(a @ b) / norm if norm else float(np.array_equal(a, b)),
    }


def _merge(worst: dict[str, dict[str, float]], new: dict[str, dict[str, float]]) -> None:
    for name, figures in new.items():
        old = worst.setdefault(name, dict(figures))
        old["max_abs_error"] = max(old["max_abs_error"], figures["max_abs_error"])
        old["cosine"] = min(old["cosine"], figures["cosine"])


def print_verification(result: dict[str, Any]) -> None:
    """The result as a table on standard output."""
    shapes = ", ".join(result["shapes"])
    table = Table(title=f"against {result['reference']}, shapes {shapes}")
    for column in ("output", "max abs error", "cosine"):
        table.add_column(column)
    for name, figures in result["outputs"].items():
        table.add_row(name, f"{figures['max_abs_error']:.3g}", f"{figures['cosine']:.9f}")
    console().print(table)
    word = "passed" if result["passed"] else "FAILED"
    print(f"{word}: tolerance {result['tolerance']:g}")
