"""Tokens without padding: what is left of a batch, side by side, and back to rows.

A packed value is `[1, tokens, ...]`: the tokens of all sequences in order, without gaps. `tokens`
is a symbol whose value `pack_tokens` finds when the model runs.
"""

from __future__ import annotations

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.dims import Symbol, only_atom, product
from sparsec.ir.layouts import ROW_MAJOR
from sparsec.ir.op_helpers import Env, array, operand, require_equal
from sparsec.ir.op_spec import Array, Arrays, Attrs, OpSpec, PanelRule, Types
from sparsec.ir.types import DType, TensorType


def _infer_pack(types: Types, attrs: Attrs) -> list[TensorType]:
    real, mask = operand(types, 0), operand(types, 1)
    if real.dtype is not DType.BOOL or real.rank != 2:
        raise InvalidGraph(f"wants bool[batch, seq], got {real}")
    if mask.dtype is not DType.F32 or mask.shape != real.shape:
        raise InvalidGraph(f"the mask {mask} is not f32 of the shape of {real}")
    if not isinstance(only_atom(attrs["tokens"]), Symbol):
        raise InvalidGraph(f"tokens must be a symbol, got {attrs['tokens']}")
    batch, seq = real.shape
    require_equal("most", attrs["most"], batch * seq)
    tokens = attrs["tokens"]
    shapes = ((), (tokens,), (tokens,), (batch + 1,), (batch, seq))
    return [TensorType(DType.I64, shape) for shape in shapes]


def _evaluate_pack(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    real, mask = array(arrays, 0), array(arrays, 1)
    seen = (mask >= attrs["seen"]).any(axis=1, keepdims=True)
    kept = real | ~seen
    if attrs["keep_first"]:
        kept[:, 0] = True
    index = np.flatnonzero(kept)
    place = np.full(kept.size, -1, np.int64)
    place[index] = np.arange(index.size)
    starts = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    found = (np.asarray(index.size), index, index // kept.shape[1], starts)
    places = np.where(real, place.reshape(real.shape), -1)
    return [*(np.asarray(f).astype(np.int64) for f in found), places]


def _infer_unpack(types: Types, attrs: Attrs) -> list[TensorType]:
    x, index, place = operand(types, 0), operand(types, 1), operand(types, 2)
    if x.rank != 3 or x.shape[0] != 1 or not isinstance(x.shape[2], int):
        raise InvalidGraph(f"wants [1, tokens, channels], got {x}")
    require_equal("tokens", x.shape[1], product(index.shape))
    if x.dtype is not DType.F32 or place.rank != 2:
        raise InvalidGraph(f"wants fp32 and places [batch, seq], got {x} and {place}")
    return [x.with_shape((*place.shape, x.shape[2])).with_layout(ROW_MAJOR)]


def _evaluate_unpack(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x, place = array(arrays, 0)[0], array(arrays, 2)
    return [np.where((place >= 0)[..., None], x[np.maximum(place, 0)], np.float32(0))]


PACKING_OPS = {
    row.name: row
    for row in (
        # Of real[batch, seq] (what is no padding) and mask[batch, seq] (what attention adds to the
        # scores of a key): how many tokens are kept; of each the index in the batch and its
        # sequence; where each sequence starts, and the end; where each real token went, or -1.
        # Padding is kept in sequences none of whose keys is seen (has a mask of at least `seen`),
        # as there attention reads it; and at position 0 with `keep_first`.
        OpSpec(
            "pack_tokens",
            _infer_pack,
            _evaluate_pack,
            ("tokens", "most", "seen", "keep_first"),
            binds="tokens",
        ),
        # Packed x, the tokens' indices, places -> [batch, seq, channels], 0 at padding.
        OpSpec(
            "unpack_tokens", _infer_unpack, _evaluate_unpack, panels=PanelRule((0,), rows=True)
        ),
    )
}
