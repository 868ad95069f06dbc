"""Ops that combine channels of one value: gated activations and rotary position embedding.

They read their channels at an offset, so that several parts of one product need no copies.
"""

from __future__ import annotations

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.op_helpers import (
    Env,
    array,
    broadcast,
    operand,
    panel_layout,
    require_float,
    same_dtype,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, OpSpec, PanelRule, Types
from sparsec.ir.ops_elementwise import ACTIVATIONS
from sparsec.ir.types import TensorType


def _require_channels(x: TensorType, offset: int, count: int) -> None:
    require_float(x)
    if x.rank == 0 or not isinstance(x.shape[-1], int):
        raise InvalidGraph(f"needs a last axis of known size, got {x}")
    if not 0 <= offset <= x.shape[-1] - count:
        raise InvalidGraph(f"channels {offset}..{offset + count} are not in {x}")


def _infer_gated(types: Types, attrs: Attrs) -> list[TensorType]:
    x, channels = operand(types, 0), attrs["channels"]
    if attrs["activation"] not in ACTIVATIONS:
        raise InvalidGraph(f"there is no activation {attrs['activation']!r}")
    for name in ("offset", "gate_offset"):
        _require_channels(x, attrs[name], channels)
    return [TensorType(x.dtype, (*x.shape[:-1], channels), panel_layout([x]))]


def _evaluate_gated(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x, channels = array(arrays, 0), attrs["channels"]
    value, gate = (x[..., attrs[n] : attrs[n] + channels] for n in ("offset", "gate_offset"))
    with np.errstate(over="ignore"):
        active = ACTIVATIONS[attrs["activation"]](gate)
    return [np.asarray(value * active).astype(x.dtype, copy=False)]


def _infer_rotary(types: Types, attrs: Attrs) -> list[TensorType]:
    x, cos, sin = (operand(types, i) for i in range(3))
    size, width = attrs["head_size"], attrs["heads"] * attrs["head_size"]
    _require_channels(x, attrs["offset"], width)
    if size % 2:
        raise InvalidGraph(f"a head of {size} channels has no halves")
    for table in (cos, sin):
        if table.rank != x.rank or table.shape[-1] != size:
            raise InvalidGraph(f"{table} is not one value per token and channel of a head")
        if broadcast([table.shape[:-1], x.shape[:-1]]) != x.shape[:-1]:
            raise InvalidGraph(f"{table} has other tokens than {x}")
    dtype = same_dtype([x, cos, sin])
    return [TensorType(dtype, (*x.shape[:-1], width), panel_layout([x]))]


def _evaluate_rotary(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x, cos, sin = (array(arrays, i) for i in range(3))
    heads, size, offset = attrs["heads"], attrs["head_size"], attrs["offset"]
    part = x[..., offset : offset + heads * size].reshape(*x.shape[:-1], heads, size)
    turned = np.concatenate([-part[..., size // 2 :], part[..., : size // 2]], axis=-1)
    result = part * cos[..., None, :] + turned * sin[..., None, :]
    return [np.ascontiguousarray(result.reshape(*x.shape[:-1], heads * size))]


_ROWS = [
    OpSpec(
        "gated",
        _infer_gated,
        _evaluate_gated,
        ("activation", "channels", "offset", "gate_offset"),
        panels=PanelRule((0,)),
    ),
    OpSpec(
        "rotary",
        _infer_rotary,
        _evaluate_rotary,
        ("heads", "head_size", "offset"),
        panels=PanelRule((0, 1, 2)),
    ),
]
CHANNEL_OPS = {row.name: row for row in _ROWS}
