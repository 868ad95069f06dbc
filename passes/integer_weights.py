"""Weights that a file has as integers, in fp32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsec.ir.graph import Value
from sparsec.ir.op_spec import Array
from sparsec.ir.types import QuantParams
from sparsec.passes.rewrite import Builder


def has_scale_per_column(scale: Value, w: Value) -> bool:
    """Whether there is one scale for all of `w[k, n]`, or one for each column."""
    columns = w.type.shape[1]
    return scale.type.shape in ((), (1,), (columns,), (1, columns))


def real_weight(g: Builder, w: Value, scales: Array, zero: Value | None) -> Value:
    """The numbers of `w[k, n]` less the zero point, times one scale or one per column.

    The result remembers them as its quantisation. No zero point is 0.
    """
    assert w.data is not None, w
    given = [scales.reshape(-1), np.zeros(1, np.int64) if zero is None else _numbers(zero)]
    count = max(len(v) for v in given)
    per_column, zeros = (np.broadcast_to(v, count) for v in given)
    data = (w.data.astype(np.int64) - zeros).astype(np.float32) * per_column
    made = g.constant(data.astype(np.float32), g.graph.base_name(w.name))
    axis = None if count == 1 else 1
    quant = QuantParams(tuple(per_column.tolist()), tuple(zeros.tolist()), axis)
    g.graph.set_type(made, replace(made.type, quant=quant))
    return made


def _numbers(zero: Value) -> Array:
    assert zero.data is not None, zero
    return np.asarray(zero.data.reshape(-1).astype(np.int64))
