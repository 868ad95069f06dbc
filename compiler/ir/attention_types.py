"""What attentions share, whatever they are computed in: attributes, types, heads."""

from __future__ import annotations

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.dims import product
from sparsec.ir.op_helpers import (
    Shape,
    broadcastable_to,
    operand,
    optional,
    panel_layout,
    require_equal,
    require_float,
    text,
)
from sparsec.ir.op_spec import Array, Attrs, Types
from sparsec.ir.ops_int8 import is_stored, stored_result, stored_type
from sparsec.ir.types import DType, TensorType

ATTENTION_ATTRS = ("heads", "head_size", "scale", "q_offset", "k_offset", "v_offset")


def infer_attention(
    types: Types, attrs: Attrs, dtype: DType | None = None, unit: int = 1
) -> list[TensorType]:
    """Of q, k and v in `dtype`, None for any float, of which `unit` channels lie together.

    In a `dtype` there are as many keys as queries, and what comes out is fp32 unless it is stored.
    """
    q, k, v = operands = tuple(operand(types, i) for i in range(3))
    width = attrs["heads"] * attrs["head_size"]
    if attrs["head_size"] % unit:
        raise InvalidGraph(
            f"{unit} channels of {dtype} lie together, a head has {attrs['head_size']}"
        )
    for name, type in zip("qkv", operands, strict=True):
        fits = type.dtype.is_float if dtype is None else type.dtype is dtype
        if not fits or type.rank != 3 or not isinstance(type.shape[2], int):
            wanted = "floats" if dtype is None else dtype
            raise InvalidGraph(f"{name} must be {wanted}[batch, seq, channels], got {type}")
        offset = attrs[f"{name}_offset"]
        if offset % unit or not 0 <= offset <= type.shape[2] - width:
            raise InvalidGraph(f"channels {offset}..{offset + width} of {name} are not in {type}")
        require_equal(f"batch of q and {name}", q.shape[0], type.shape[0])
    require_equal("keys and values", k.shape[1], v.shape[1])
    if dtype is not None:
        require_equal("queries and keys", q.shape[1], k.shape[1])
    _check_mask(types, (q.shape[0], attrs["heads"], q.shape[1], k.shape[1]))
    _check_sequences(q, types, attrs)
    shape = (*q.shape[:2], width)
    result = TensorType(q.dtype if dtype is None else DType.F32, shape, panel_layout(operands))
    return [stored_type(result, attrs) or result]


def split_heads(x: Array, attrs: Attrs, name: str) -> Array:
    """What is "q", "k" or "v" of `x`: [batch, seq, channels] -> [batch, heads, seq, head_size]"""
    heads, size, offset = attrs["heads"], attrs["head_size"], attrs[f"{name}_offset"]
    part = x[:, :, offset : offset + heads * size]
    # A copy: NumPy multiplies strided matrices without BLAS, a hundred times slower.
    return np.ascontiguousarray(part.reshape(*x.shape[:2], heads, size).transpose(0, 2, 1, 3))


def join_heads(context: Array, attrs: Attrs) -> Array:
    """[batch, heads, seq, head_size] -> [batch, seq, channels], stored as the node says."""
    batch, heads, seq, size = context.shape
    result = context.transpose(0, 2, 1, 3).reshape(batch, seq, heads * size)
    return stored_result(result, attrs) if is_stored(attrs) else result


def _check_mask(types: Types, scores: Shape) -> None:
    mask = optional(types, 3)
    if mask is not None:
        require_float(mask)
        if not broadcastable_to(mask.shape, scores):
            raise InvalidGraph(f"mask {mask} does not broadcast to {text(scores)}")


def _check_sequences(q: TensorType, types: Types, attrs: Attrs) -> None:
    """Operands 4 and 5 of an attention over packed tokens: each token's sequence, and where each
    sequence starts."""
    sequence, starts = optional(types, 4), optional(types, 5)
    if sequence is None and starts is None:
        return
    if sequence is None or starts is None or "longest" not in attrs:
        raise InvalidGraph("packed tokens need their sequences, starts and the attribute longest")
    require_equal("batch of packed tokens", q.shape[0], 1)
    require_equal("sequences of tokens", q.shape[1], product(sequence.shape))
    for type in (sequence, starts):
        if type.dtype is not DType.I64 or type.rank != 1:
            raise InvalidGraph(f"sequences and starts are lists of i64, got {type}")
