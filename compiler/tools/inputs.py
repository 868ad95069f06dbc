"""Made-up inputs for `verify` and `bench`: token ids in range and masks with real padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsec.errors import InvalidInput
from sparsec.runtime import Model

Arrays = dict[str, np.ndarray[Any, Any]]
USUAL_BATCH, USUAL_SEQ = 1, 128


def fixed_sizes(model: Model) -> tuple[int | None, int | None]:
    """The batch and the sequence length that the library is compiled for; None for a free one.

    Inputs of integers `[batch, seq]` have a length; the second axis of others may be anything.
    """
    batches = [port.shape[0] for port in model.inputs if port.shape]
    ids = [p for p in model.inputs if len(p.shape) == 2 and p.dtype.kind in "biu"]
    return _fixed(batches), _fixed([port.shape[1] for port in ids])


def run_shape(model: Model, batch: int | None, seq: int | None) -> tuple[int, int]:
    """The batch and the sequence length of a run in which these were asked for.

    What was not asked for is what the library is compiled for, or usual. Raises InvalidInput where
    it is compiled for another.
    """
    fixed = fixed_sizes(model)
    for option, wanted, size in zip(("batch", "seq"), (batch, seq), fixed, strict=True):
        if None not in (wanted, size) and wanted != size:
            raise InvalidInput(f"{option} {wanted}: the library is compiled for {size} alone")
    return fixed[0] or batch or USUAL_BATCH, fixed[1] or seq or USUAL_SEQ


def _fixed(sizes: Sequence[int | str]) -> int | None:
    """Of one axis of the inputs: its size where all have the same."""
    return sizes[0] if len(set(sizes)) == 1 and isinstance(sizes[0], int) else None


def bind_symbols(model: Model, batch: int, seq: int) -> dict[str, int]:
    """Values for the model's symbols: the first axis is the batch, the second the sequence.

    Raises InvalidInput when an input has more dynamic axes than these two.
    """
    bound: dict[str, int] = {}
    for port in model.inputs:
        for axis, size in enumerate(port.shape):
            if isinstance(size, int):
                continue
            if axis > 1:
                raise InvalidInput(
                    f"input {port.name}: axis {axis} ({size}) is dynamic and neither batch nor "
                    f"sequence; fix it when compiling with --shape {port.name}=..."
                )
            bound.setdefault(size, (batch, seq)[axis])
    return bound


def random_inputs(model: Model, batch: int, seq: int, *, seed: int, padding: bool) -> Arrays:
    """One array per input.

    Integers that index a table are drawn from its rows; other integers are a mask: ones, and with
    `padding` zeros at the end of each row but the first (each row keeps at least one token).
    """
    rng = np.random.default_rng(seed)
    symbols = bind_symbols(model, batch, seq)
    ranges: Mapping[str, int] = model.description["input_ranges"]
    arrays: Arrays = {}
    for port in model.inputs:
        shape = tuple(s if isinstance(s, int) else symbols[s] for s in port.shape)
        if port.dtype.kind == "f":
            arrays[port.name] = rng.standard_normal(shape).astype(port.dtype)
        elif port.name in ranges:
            arrays[port.name] = rng.integers(0, ranges[port.name], shape).astype(port.dtype)
        else:
            arrays[port.name] = _mask(shape, rng, padding).astype(port.dtype)
    return arrays


def _mask(shape: tuple[int, ...], rng: np.random.Generator, padding: bool) -> np.ndarray[Any, Any]:
    mask = np.ones(shape, np.int64)
    if not padding or len(shape) != 2:
        return mask
    for row in mask[1:]:
        row[rng.integers(1, len(row) + 1) :] = 0
    return mask
