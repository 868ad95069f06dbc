"""Convolution: one result at a time, its sum in a register; padding is read as zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from sparsec.codegen.generic_base import (
    Application,
    Plan,
    convert,
    int64,
    storage,
    te_plan,
    wide,
)
from sparsec.codegen.te_lowering import Definition


def _conv(app: Application) -> Plan:
    """An item is one channel of one batch element."""
    x_type, w_type = app.operands[:2]
    dtype = wide(x_type.dtype)
    rows, *depth = (d for d in w_type.shape if isinstance(d, int))
    x, w = app.placeholder(0, x_type.shape), app.placeholder(1, w_type.shape)
    bias = app.placeholder(2, (rows,)) if len(app.operands) > 2 else None
    over = [te.reduce_axis((int64(0), int64(d)), f"r{n}") for n, d in enumerate(depth)]
    dims = (app.result.shape[0] * rows, *app.result.shape[2:])
    real = [axis for axis, dim in enumerate(dims) if dim != 1]  # TVM drops the other loops
    kept = [dims[axis] for axis in real]
    in_group = rows // app.attrs["groups"]

    def index(loops: tuple[Any, ...]) -> list[Any]:
        """The item and the place in space."""
        full: list[Any] = [int64(0)] * len(dims)
        for axis, loop in zip(real, loops, strict=False):
            full[axis] = loop
        return full

    def term(*loops: Any) -> Any:
        item, *place = index(loops)
        batch, row = tirx.floordiv(item, int64(rows)), tirx.floormod(item, int64(rows))
        channel, *inside = over
        source = tirx.floordiv(row, int64(in_group)) * int64(depth[0]) + channel
        at = [
            o * int64(s) + k * int64(d) - int64(b)
            for o, k, s, d, b in zip(
                place,
                inside,
                app.attrs["strides"],
                app.attrs["dilations"],
                app.attrs["begins"],
                strict=True,
            )
        ]
        sizes = app.shape(x_type.shape[2:])
        valid = tirx.all(*(tirx.all(i >= 0, i < size) for i, size in zip(at, sizes, strict=True)))
        zero = tirx.const(0, dtype)
        value = tirx.if_then_else(valid, convert(x(batch, source, *at), dtype), zero)
        return te.sum(value * convert(w(row, channel, *inside), dtype), axis=over)

    def finish(*loops: Any) -> Any:
        total = sums(*loops)
        if bias is not None:
            row = tirx.floormod(index(loops)[0], int64(rows))
            total = total + convert(bias(row), dtype)
        return convert(total, storage(app.result.dtype))

    sums = te.compute(app.shape(kept or (1,)), term, name="total")
    output = te.compute(app.shape(kept or (1,)), finish, name="y")
    inputs = (x, w) if bias is None else (x, w, bias)
    definition = Definition(inputs, output, min(len(kept), 1), accumulate_at=len(kept))
    return te_plan(app, definition, kept[:1], [*kept[1:], *depth])


CONV: dict[str, Callable[[Application], Plan]] = {"conv": _conv}
