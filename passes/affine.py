"""Integer tensors that are an affine function of their own index: the arithmetic of ranges.

Exporters spell "all rows of x" as a gather with ranges as indices; knowing that the indices are
`offset + sum(coefficient * index)` tells that such a gather moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparsec.ir.dims import Dim
from sparsec.ir.graph import Node, Value
from sparsec.ir.op_spec import Array
from sparsec.ir.types import DType

Shape = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Affine:
    """`value[i, j, ...] = offset + coefficients[0] * i + coefficients[1] * j + ...`

    The coefficient of an axis of size 1 is 0.
    """

    coefficients: Shape
    offset: Dim


def affine_of(value: Value) -> Affine | None:
    """How `value` depends on its index, or None when that is not affine or not known."""
    if value.type.dtype is DType.BOOL or value.type.dtype.is_float:
        return None
    if value.data is not None:
        return affine_of_constant(value.data)
    node = value.producer
    rule = None if node is None else _RULES.get(node.op)
    return None if node is None or rule is None else rule(node)


def affine_of_constant(data: Array) -> Affine | None:
    """How the elements of an integer array depend on their index."""
    if data.size == 0:
        return None
    first = int(data.reshape(-1)[0])
    steps: list[int] = []
    guess = np.full(data.shape, first, np.int64)
    for axis, size in enumerate(data.shape):
        step = int(np.take(data, 1, axis).reshape(-1)[0]) - first if size > 1 else 0
        shape = [size if i == axis else 1 for i in range(data.ndim)]
        guess = guess + step * np.arange(size).reshape(shape)
        steps.append(step)
    return Affine(tuple(steps), first) if np.array_equal(guess, data) else None


def _iota(node: Node) -> Affine:
    step = 0 if node.attrs["length"] == 1 else node.attrs["step"]
    return Affine((step,), node.attrs["start"])


def _dims(node: Node) -> Affine | None:
    values = node.attrs["values"]
    return Affine((0,) * node.output.type.rank, values[0]) if len(values) == 1 else None


def _cast(node: Node) -> Affine | None:
    return affine_of(node.input(0))


def _reshape(node: Node) -> Affine | None:
    """Only axes of size 1 may come and go."""
    inner, x, shape = affine_of(node.input(0)), node.input(0).type.shape, node.output.type.shape
    if inner is None or [d for d in x if d != 1] != [d for d in shape if d != 1]:
        return None
    kept = iter([c for c, d in zip(inner.coefficients, x, strict=True) if d != 1])
    return Affine(tuple(0 if d == 1 else next(kept) for d in shape), inner.offset)


def _broadcast(node: Node) -> Affine | None:
    inner = affine_of(node.input(0))
    return None if inner is None else _widen(inner, node.output.type.rank)


def _widen(inner: Affine, rank: int) -> Affine:
    return Affine((0,) * (rank - len(inner.coefficients)) + inner.coefficients, inner.offset)


def _transpose(node: Node) -> Affine | None:
    inner = affine_of(node.input(0))
    if inner is None:
        return None
    return Affine(tuple(inner.coefficients[a] for a in node.attrs["perm"]), inner.offset)


def _slice(node: Node) -> Affine | None:
    inner = affine_of(node.input(0))
    if inner is None:
        return None
    coefficients, offset = list(inner.coefficients), inner.offset
    for axis, start, step in zip(
        node.attrs["axes"], node.attrs["starts"], node.attrs["steps"], strict=True
    ):
        offset = offset + coefficients[axis] * start
        coefficients[axis] = 0 if node.output.type.shape[axis] == 1 else coefficients[axis] * step
    return Affine(tuple(coefficients), offset)


def _pair(node: Node) -> tuple[Affine, Affine] | None:
    a, b = affine_of(node.input(0)), affine_of(node.input(1))
    rank = node.output.type.rank
    return None if a is None or b is None else (_widen(a, rank), _widen(b, rank))


def _add(node: Node) -> Affine | None:
    pair = _pair(node)
    if pair is None:
        return None
    a, b = pair
    sign = -1 if node.op == "sub" else 1
    terms = zip(a.coefficients, b.coefficients, strict=True)
    return Affine(tuple(x + y * sign for x, y in terms), a.offset + b.offset * sign)


def _mul(node: Node) -> Affine | None:
    pair = _pair(node)
    if pair is None:
        return None
    for a, b in (pair, pair[::-1]):
        if all(c == 0 for c in b.coefficients):
            return Affine(tuple(c * b.offset for c in a.coefficients), a.offset * b.offset)
    return None


_RULES: dict[str, Callable[[Node], Affine | None]] = {
    "iota": _iota,
    "dims": _dims,
    "cast": _cast,
    "reshape": _reshape,
    "broadcast_to": _broadcast,
    "transpose": _transpose,
    "slice": _slice,
    "add": _add,
    "sub": _add,
    "mul": _mul,
}
