"""Rotary position embedding, of the standard (opset 23) and of the domain com.microsoft.

RotaryEmbedding(x, cos, sin)   ->   x * cos + turned(x) * sin, per head

That is how exporters spell it, which fuse_rotary makes one op of.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend.builder import Builder, Operand
from sparsec.frontend.call import Call, Converter
from sparsec.ir.dims import Dim
from sparsec.ir.types import DType


@dataclass(frozen=True, slots=True)
class Rotation:
    """`x` [batch, heads, seq, size], of which the first channels turn: two for each of the
    tables' channels."""

    x: Operand
    cos: Operand  # [batch or 1, seq, half of the channels that turn]
    sin: Operand
    interleaved: bool


def microsoft_rotary(call: Call) -> Operand:
    """x, position ids [1] or [batch, seq], tables of cos and sin [positions, half]"""
    if call.attr("is_packed_batching", 0):
        raise call.refuse("RotaryEmbedding of packed batches")
    half = call.shape(2)[-1]
    size = 2 * half if not call.attr("rotary_embedding_dim", 0) else None
    x = _heads(call, call.attr("num_heads", 0), size)
    places = _places(call, x.type.shape[2])
    cos, sin = (call.g.add("gather", [call.input(i), places], axis=0) for i in (2, 3))
    return _result(call, Rotation(x, cos, sin, bool(call.attr("interleaved", 0))))


def standard_rotary(call: Call) -> Operand:
    """x, cos, sin, position ids?; without them cos and sin are [batch, seq, half] already."""
    x, ids = _heads(call, call.attr("num_heads", 0), None), call.optional(3)
    cos, sin = call.input(1), call.input(2)
    if ids is not None:
        cos, sin = (call.g.add("gather", [table, ids], axis=0) for table in (cos, sin))
    return _result(call, Rotation(x, cos, sin, bool(call.attr("interleaved", 0))))


def _heads(call: Call, heads: int, size: Dim | None) -> Operand:
    """The first operand with its heads apart; `size` is that of a head where no count is given."""
    g, x = call.g, call.input(0)
    if x.type.rank == 4:
        return x
    width = x.type.shape[-1]
    if x.type.rank != 3 or not isinstance(width, int):
        raise UnsupportedOp(f"{x.type} is not [batch, seq, channels] or [batch, heads, seq, size]")
    if not heads and isinstance(size, int) and size and width % size == 0:
        heads = width // size
    if not heads or width % heads:
        raise InvalidModel(f"{width} channels and {heads} heads: num_heads does not fit")
    apart = g.reshape(x, (*x.type.shape[:2], heads, width // heads))
    return g.transpose(apart, (0, 2, 1, 3))


def _places(call: Call, seq: Dim) -> Operand:
    """The positions [batch or 1, seq]; one number is that of the first token."""
    g, ids = call.g, call.input(1)
    if ids.type.rank == 2:
        return ids
    if ids.type.shape not in ((), (1,)):
        raise InvalidModel(f"position ids {ids.type} are not [1] or [batch, seq]")
    rows = call.shape(2)[0]
    if isinstance(rows, int):
        g.graph.add_limit(seq, rows, "the tables of cos and sin have no more rows")
    steps = g.add("iota", [], start=0, step=1, length=seq, dtype=DType.I64)
    first = g.cast(g.reshape(ids, (1, 1)), DType.I64)
    return g.add("add", [g.reshape(steps, (1, seq)), first])


def _result(call: Call, rotation: Rotation) -> Operand:
    """The turned heads in the form of the first operand."""
    g, whole = call.g, call.input(0).type.shape
    y = _turned(g, rotation)
    return y if len(whole) == 4 else g.reshape(g.transpose(y, (0, 2, 1, 3)), whole)


def _turned(g: Builder, rotation: Rotation) -> Operand:
    x, size = rotation.x, rotation.x.type.shape[3]
    half = rotation.cos.type.shape[-1]
    if rotation.cos.type.rank != 3 or rotation.sin.type.shape != rotation.cos.type.shape:
        raise InvalidModel(
            f"cos {rotation.cos.type} and sin {rotation.sin.type} do not go together"
        )
    if not isinstance(size, int) or not isinstance(half, int) or 2 * half > size:
        raise InvalidModel(f"tables of {half} columns do not turn heads of {size} channels")
    turn = _pairs if rotation.interleaved else _halves
    cos, sin = (
        g.reshape(t, (t.type.shape[0], 1, *t.type.shape[1:])) for t in (rotation.cos, rotation.sin)
    )
    y = turn(g, g.slice(x, 3, 0, 2 * half), cos, sin)
    if 2 * half == size:
        return y
    return g.add("concat", [y, g.slice(x, 3, 2 * half, size)], axis=3)


def _halves(g: Builder, x: Operand, cos: Operand, sin: Operand) -> Operand:
    half = cos.type.shape[-1]
    low, high = g.slice(x, 3, 0, half), g.slice(x, 3, half, 2 * half)
    turned = g.add("concat", [g.add("neg", [high]), low], axis=3)
    cos, sin = (g.add("concat", [table, table], axis=3) for table in (cos, sin))
    return g.add("add", [g.add("mul", [x, cos]), g.add("mul", [turned, sin])])


def _pairs(g: Builder, x: Operand, cos: Operand, sin: Operand) -> Operand:
    """As complex numbers whose parts lie beside each other."""
    *front, width = x.type.shape
    real, imaginary = (g.slice(x, 3, start, width - 1 + start, 2) for start in (0, 1))
    first = g.add("sub", [g.add("mul", [real, cos]), g.add("mul", [imaginary, sin])])
    second = g.add("add", [g.add("mul", [real, sin]), g.add("mul", [imaginary, cos])])
    half = width // 2
    parts = [g.reshape(part, (*front, half, 1)) for part in (first, second)]
    return g.reshape(g.add("concat", parts, axis=4), (*front, width))


ROTARY: dict[str, Converter] = {"RotaryEmbedding": standard_rotary}
MICROSOFT_ROTARY: dict[str, Converter] = {"RotaryEmbedding": microsoft_rotary}
