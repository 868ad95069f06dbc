"""Reductions and softmax.

A reduction keeps its sum in a register: a TE stage before the last, which rounds and stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import te, tirx

from sparsec.codegen.generic_base import (
    Application,
    Plan,
    convert,
    injective,
    int64,
    storage,
    te_plan,
    wide,
)
from sparsec.codegen.generic_elementwise import exp, log, maximum, minimum
from sparsec.codegen.te_lowering import Definition
from sparsec.ir.dims import Dim, product
from sparsec.ir.types import DType

Reducer = Callable[[Any, Any], Any]
Runs = list[tuple[Dim, bool]]  # size of adjacent axes, and whether they are reduced


def reduced_runs(shape: Sequence[Dim], axes: Sequence[int]) -> Runs:
    """The axes longer than 1; neighbours that are both kept, or both reduced, are one."""
    runs: Runs = []
    for axis, dim in enumerate(shape):
        if dim == 1:
            continue
        reduced = axis in axes
        if runs and runs[-1][1] == reduced:
            runs[-1] = (runs[-1][0] * dim, reduced)
        else:
            runs.append((dim, reduced))
    return runs


def _reduce(app: Application) -> Plan:
    (x_type,), axes = app.operands, app.attrs["axes"]
    runs = reduced_runs(x_type.shape, axes)
    dtype = _accumulator(app.op, x_type.dtype)
    count = app.size(product(x_type.shape[a] for a in axes))
    x = app.placeholder(0, [d for d, _ in runs])

    def element(*index: Any) -> Any:
        value = convert(x(*(index or [0])), wide(x_type.dtype))
        return convert(value * value if app.op == "reduce_l2" else value, dtype)

    def finish(total: Any) -> Any:
        if app.op == "reduce_l2":
            return tirx.sqrt(total if x_type.dtype.is_float else total.astype("float64"))
        if app.op != "reduce_mean":
            return total
        if x_type.dtype.is_float:
            return total / count.astype(dtype)
        return tirx.truncdiv(total, tirx.max(count, int64(1)))

    if not any(reduced for _, reduced in runs):
        kept = [d for d, _ in runs]
        return injective(app, kept, [x], lambda *i: finish(element(*(i[: len(kept)]))))
    return _reduction(app, runs, x, element, finish)


def _reduction(app: Application, runs: Runs, x: Any, element: Any, finish: Any) -> Plan:
    kept = [d for d, reduced in runs if not reduced]
    over = [te.reduce_axis((int64(0), app.size(d)), f"r{n}") for n, (d, r) in enumerate(runs) if r]
    reducer = _reducer(app.op)

    def total(*index: Any) -> Any:
        return reducer(element(*_weave(runs, index, over)), axis=over)

    sums = te.compute(app.shape(kept or (1,)), total, name="total")
    output = te.compute(
        app.shape(kept or (1,)),
        lambda *i: convert(finish(sums(*i)), storage(app.result.dtype)),
        name="y",
    )
    definition = Definition((x,), output, min(len(kept), 1), accumulate_at=len(kept))
    return te_plan(app, definition, kept[:1], [d for d, _ in runs][1:])


def _weave(runs: Runs, kept: Sequence[Any], over: Sequence[Any]) -> list[Any]:
    kept_index, over_index = iter(kept), iter(over)
    return [next(over_index) if reduced else next(kept_index) for _, reduced in runs]


def _accumulator(op: str, dtype: DType) -> str:
    if dtype.is_float:
        return wide(dtype)
    return "int64" if op in ("reduce_mean", "reduce_l2") else storage(dtype)


def _reducer(op: str) -> Any:
    combine: dict[str, Reducer] = {
        "reduce_max": maximum,
        "reduce_min": minimum,
        "reduce_prod": lambda a, b: a * b,
    }
    return te.comm_reducer(
        combine.get(op, lambda a, b: a + b), lambda t: _identity(op, str(t)), name="reduce"
    )


def _identity(op: str, dtype: str) -> Any:
    if op == "reduce_prod":
        return tirx.const(1, dtype)
    if op not in ("reduce_max", "reduce_min", "arg_max", "arg_min"):
        return tirx.const(0, dtype)
    largest = op.endswith("max")
    if dtype.startswith("float"):
        return tirx.const(-math.inf if largest else math.inf, dtype)
    info = np.iinfo(dtype)
    return tirx.const(int(info.min if largest else info.max), dtype)


def _arg(app: Application) -> Plan:
    """The first index of the extreme; the first NaN when there is one."""
    (x_type,), axis = app.operands, app.attrs["axis"]
    runs = reduced_runs(x_type.shape, (axis,))
    kept = [d for d, reduced in runs if not reduced]
    x = app.placeholder(0, [d for d, _ in runs])
    if len(kept) == len(runs):
        return injective(app, kept, [x], lambda *i: int64(0))
    k = te.reduce_axis((int64(0), app.size(x_type.shape[axis])), "k")
    reducer = te.comm_reducer(_first_extreme(app.op), _arg_identity(app.op), name="extreme")

    def best(*index: Any) -> Any:
        value = convert(x(*_weave(runs, index, [k])), wide(x_type.dtype))
        return reducer((k.var, value), axis=k)

    places, _ = te.compute(app.shape(kept or (1,)), best, name="best")
    output = te.compute(app.shape(kept or (1,)), lambda *i: places(*i), name="y")
    definition = Definition((x,), output, min(len(kept), 1), accumulate_at=len(kept))
    return te_plan(app, definition, kept[:1], [d for d, _ in runs][1:])


def _first_extreme(op: str) -> Any:
    def combine(a: Any, b: Any) -> Any:
        better = b[1] > a[1] if op == "arg_max" else b[1] < a[1]
        if str(a[1].ty.dtype).startswith("float"):
            better = tirx.any(better, tirx.all(tirx.isnan(b[1]), tirx.Not(tirx.isnan(a[1]))))
            better = tirx.all(better, tirx.Not(tirx.isnan(a[1])))
        return tirx.Select(better, b[0], a[0]), tirx.Select(better, b[1], a[1])

    return combine


def _arg_identity(op: str) -> Any:
    return lambda index, value: (tirx.const(0, str(index)), _identity(op, str(value)))


def _softmax(app: Application) -> Plan:
    """exp(x - max) / sum, or x - max - log(sum); the axis is the innermost loop."""
    (x_type,), axis = app.operands, app.attrs["axis"]
    shape, dtype = x_type.shape, wide(x_type.dtype)
    before, size, after = product(shape[:axis]), shape[axis], product(shape[axis + 1 :])
    kept = [d for d in (before, after) if d != 1]
    place = 0 if before == 1 else 1  # of the axis among the loops over the result
    dims = [*kept[:place], size, *kept[place:]]
    x = app.placeholder(0, dims)

    def at(index: Sequence[Any], k: Any) -> Any:
        position = [*index[:place], k, *index[place:]] if kept else [k]
        return convert(x(*position), dtype)

    def over(name: str, op: str, value: Callable[..., Any]) -> Any:
        k = te.reduce_axis((int64(0), app.size(size)), f"k_{name}")
        stage = lambda *i: _reducer(op)(value(i, k.var), axis=k)  # noqa: E731
        return te.compute(app.shape(kept or (1,)), stage, name=name)

    top = over("top", "reduce_max", at)
    total = over("total", "reduce_sum", lambda i, k: exp(at(i, k) - top(*i)))

    def element(*index: Any) -> Any:
        rest = [*index[:place], *index[place + 1 :]] if kept else [int64(0)]
        shifted = at(rest, index[place]) - top(*rest)
        if app.op == "log_softmax":
            return convert(shifted - log(total(*rest)), storage(app.result.dtype))
        return convert(exp(shifted) / total(*rest), storage(app.result.dtype))

    output = te.compute(app.shape(dims), element, name="y")
    order = (*(i for i in range(len(dims)) if i != place), place)
    definition = Definition((x,), output, min(len(kept), 1), order, len(kept))
    return te_plan(app, definition, kept[:1], [size, *kept[1:]])


REDUCE: dict[str, Callable[[Application], Plan]] = {
    **{f"reduce_{name}": _reduce for name in ("sum", "mean", "max", "min", "prod", "l2")},
    "arg_max": _arg,
    "arg_min": _arg,
    "softmax": _softmax,
    "log_softmax": _softmax,
}
