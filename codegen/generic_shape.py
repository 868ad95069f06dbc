"""Ops that move, select or make elements, as index expressions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from sparsec.codegen.generic_base import (
    Application,
    Plan,
    flat,
    from_front,
    injective,
    int64,
    storage,
)
from sparsec.codegen.generic_elementwise import equals
from sparsec.codegen.te_lowering import IndexCheck
from sparsec.ir.dims import product
from sparsec.ir.types import DType


def _reshape(app: Application) -> Plan:
    dims = (app.result.elements,)
    x = app.placeholder(0, dims)
    return injective(app, dims, [x], lambda i: x(i))


def _transpose(app: Application) -> Plan:
    """Axes that stay neighbours move as one."""
    shape = app.operands[0].shape
    runs: list[list[int]] = []
    for axis in (a for a in app.attrs["perm"] if shape[a] != 1):
        between = shape[runs[-1][-1] + 1 : axis] if runs and axis > runs[-1][-1] else (0,)
        if all(d == 1 for d in between):
            runs[-1].append(axis)
        else:
            runs.append([axis])
    ordered = sorted(runs)
    x = app.placeholder(0, [product(shape[a] for a in run) for run in ordered])
    places = [runs.index(run) for run in ordered]
    dims = [product(shape[a] for a in run) for run in runs]
    return injective(app, dims, [x], lambda *i: x(*([i[p] for p in places] or [0])))


def _slice(app: Application) -> Plan:
    shape, starts, steps = app.operands[0].shape, {}, {}
    fields = (app.attrs["axes"], app.attrs["starts"], app.attrs["steps"])
    for axis, start, step in zip(*fields, strict=True):
        starts[axis], steps[axis] = app.size(start), step
    x = app.placeholder(0, shape)

    def value(*index: Any) -> Any:
        at = [starts[a] + i * int64(steps[a]) if a in starts else i for a, i in enumerate(index)]
        return x(*at)

    return injective(app, app.result.shape, [x], value)


def _gather(app: Application) -> Plan:
    (x_type, i_type), axis = app.operands, app.attrs["axis"]
    outer, inner = product(x_type.shape[:axis]), product(x_type.shape[axis + 1 :])
    count, size = i_type.elements, x_type.shape[axis]
    x, indices = app.placeholder(0, (outer, size, inner)), app.placeholder(1, (count,))

    def value(o: Any, row: Any, i: Any) -> Any:
        return x(o, from_front(indices(row), app.size(size)), i)

    checks = [IndexCheck(1, app.size(count), (app.size(size),))]
    return injective(app, (outer, count, inner), [x, indices], value, checks)


def _gather_elements(app: Application) -> Plan:
    (x_type, i_type), axis = app.operands, app.attrs["axis"]
    x, indices = app.placeholder(0, x_type.shape), app.placeholder(1, (i_type.elements,))
    sizes, size = app.shape(i_type.shape), app.size(x_type.shape[axis])

    def value(*index: Any) -> Any:
        at = list(index)
        at[axis] = from_front(indices(flat(index, sizes)), size)
        return x(*at)

    checks = [IndexCheck(1, app.size(i_type.elements), (size,))]
    return injective(app, i_type.shape, [x, indices], value, checks)


def _gather_nd(app: Application) -> Plan:
    (x_type, i_type), batch = app.operands, app.attrs["batch_dims"]
    depth = i_type.channels
    indices = app.placeholder(1, (i_type.elements,))
    x = app.placeholder(0, x_type.shape)
    bounds = app.shape(x_type.shape[batch : batch + depth])
    rows = app.shape(i_type.shape[:-1])

    def value(*index: Any) -> Any:
        row, rest = index[: len(rows)], index[len(rows) :]
        first = flat(row, rows) * int64(depth)
        picked = [from_front(indices(first + int64(c)), b) for c, b in enumerate(bounds)]
        return x(*row[:batch], *picked, *rest)

    checks = [IndexCheck(1, app.size(i_type.elements), bounds)]
    return injective(app, app.result.shape, [x, indices], value, checks)


def _pad(app: Application) -> Plan:
    shape = app.operands[0].shape
    before, sizes = app.shape(app.attrs["pads_before"]), app.shape(shape)
    x = app.placeholder(0, shape)

    def value(*index: Any) -> Any:
        at = [i - b for i, b in zip(index, before, strict=True)]
        inside: Any = tirx.const(True, "bool")
        for a, b, size in zip(at, app.attrs["pads_before"], sizes, strict=True):
            inside = tirx.all(inside, a < size) if b == 0 else tirx.all(inside, a >= 0, a < size)
        fill = _constant(app.attrs["value"], app.result.dtype)
        return tirx.if_then_else(inside, x(*(at or [0])), fill)

    return injective(app, app.result.shape, [x], value)


def _constant(value: float, dtype: DType) -> Any:
    number = value if dtype.is_float else int(value)
    return tirx.const(number, storage(dtype))


def _trilu(app: Application) -> Plan:
    shape, k = app.operands[0].shape, int64(app.attrs["k"])
    dims = (product(shape[:-2]), *shape[-2:])
    x = app.placeholder(0, dims)

    def value(b: Any, i: Any, j: Any) -> Any:
        keep = j - i >= k if app.attrs["upper"] else j - i <= k
        return tirx.Select(keep, x(b, i, j), _constant(0, app.result.dtype))

    return injective(app, dims, [x], value)


def _one_hot(app: Application) -> Plan:
    i_type, axis, depth = app.operands[0], app.attrs["axis"], app.attrs["depth"]
    outer, inner = product(i_type.shape[:axis]), product(i_type.shape[axis:])
    indices, values = app.placeholder(0, (outer, inner)), app.placeholder(1, (2,))

    def value(o: Any, d: Any, i: Any) -> Any:
        front = from_front(indices(o, i), app.size(depth))
        return tirx.Select(equals(front, d), values(int64(1)), values(int64(0)))

    return injective(app, (outer, depth, inner), [indices, values], value)


def _iota(app: Application) -> Plan:
    start, step = app.size(app.attrs["start"]), int64(app.attrs["step"])
    return injective(app, app.result.shape, [], lambda i: start + step * i)


def _dims(app: Application) -> Plan:
    values = app.shape(app.attrs["values"])

    def value(i: Any) -> Any:
        result = values[-1]
        for place, item in reversed(list(enumerate(values[:-1]))):
            result = tirx.Select(equals(i, place), item, result)
        return result

    return injective(app, (len(values),), [], value)


SHAPE: dict[str, Callable[[Application], Plan]] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "slice": _slice,
    "gather": _gather,
    "gather_elements": _gather_elements,
    "gather_nd": _gather_nd,
    "pad": _pad,
    "trilu": _trilu,
    "one_hot": _one_hot,
    "iota": _iota,
    "dims": _dims,
}
