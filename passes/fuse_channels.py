"""Turn what combines channels of one product into one op.

x[..., a:a+m] * gelu(x[..., b:b+m])                     ->   gated(x)
x * cos + concat(-x[..., d/2:], x[..., :d/2]) * sin     ->   rotary(x, cos, sin), per head
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.ir.dims import Dim
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult
from sparsec.passes.rewrite import (
    Builder,
    Match,
    Pattern,
    Reject,
    RewriteRule,
    Term,
    apply_rules,
)

ACTIVATIONS = ("gelu", "silu", "relu", "sigmoid")


@dataclass(frozen=True, slots=True)
class FuseGated(RewriteRule):
    """mul(slice(x), activation(slice(x)))  ->  gated(x), of channels beside each other"""

    def pattern(self, p: Pattern) -> Term:
        gate = p.slice("x", bind="gate")
        return p.mul(p.slice("x", bind="value"), p.any_op(ACTIVATIONS, gate, bind="active"))

    def check(self, m: Match) -> Reject | None:
        if m["x"].type.dtype is not DType.F32:
            return Reject(f"the channels are {m['x'].type.dtype}")
        if m["value"].type.shape != m["gate"].type.shape:
            return Reject("the slices differ in shape")
        for name in ("value", "gate"):
            if channel_start(m.node(name)) is None:
                return Reject(f"the {name} is not a slice of consecutive channels")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        active = m.node("active")
        tanh = active.attrs.get("approximate") == "tanh"
        return g.gated(
            m["x"],
            activation="gelu_tanh" if tanh else active.op,
            channels=m["value"].type.shape[-1],
            offset=channel_start(m.node("value")),
            gate_offset=channel_start(m.node("gate")),
        )


def channel_start(node: Node) -> int | None:
    """Where a slice of consecutive elements of the last axis begins; None for another slice."""
    attrs = node.attrs
    if attrs["axes"] != (node.output.type.rank - 1,) or attrs["steps"] != (1,):
        return None
    start, size = attrs["starts"][0], node.output.type.shape[-1]
    return start if isinstance(start, int) and start >= 0 and isinstance(size, int) else None


@dataclass(frozen=True, slots=True)
class FuseRotary(RewriteRule):
    """x * cos + turned(x) * sin  ->  rotary on [batch, seq, heads * head_size]"""

    def pattern(self, p: Pattern) -> Term:
        high, low = p.slice("x", bind="high"), p.slice("x", bind="low")
        turned = p.concat(p.neg(high), low, bind="turned")
        return p.add(p.mul("x", "cos"), p.mul(turned, "sin"))

    def check(self, m: Match) -> Reject | None:
        x, size = m["x"].type, m["x"].type.shape[-1]
        if x.rank != 4 or x.dtype is not DType.F32 or not isinstance(size, int) or size % 2:
            return Reject(f"{x} is not fp32 heads of an even size")
        concat = m.node("turned")
        if concat.attrs["axis"] != 3 or len(concat.inputs) != 2:
            return Reject("the halves are not of the last axis")
        starts = [channel_start(m.node(n)) for n in ("high", "low")]
        if starts != [size // 2, 0] or m["low"].type.shape[-1] != size // 2:
            return Reject("the slices are not the halves of a head")
        if self._heads_axis(m) is None:
            return Reject("cos and sin are not one value per token and channel of a head")
        return None

    def _heads_axis(self, m: Match) -> int | None:
        """The axis of x that cos and sin do not have: 1 or 2."""
        batch, *_, size = m["x"].type.shape
        for axis in (1, 2):
            seq = m["x"].type.shape[3 - axis]
            if not isinstance(m["x"].type.shape[axis], int):
                continue
            if all(_is_table(m[n], batch, seq, size, axis) for n in ("cos", "sin")):
                return axis
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        axis = self._heads_axis(m)
        assert axis is not None
        batch, *_, size = m["x"].type.shape
        heads, seq = m["x"].type.shape[axis], m["x"].type.shape[3 - axis]
        order = (0, 2, 1, 3) if axis == 1 else (0, 1, 2, 3)
        rows = g.reshape(g.transpose(m["x"], perm=order), shape=(batch, seq, heads * size))
        # The tables are as long as all tokens: kernels then read them like any activation.
        cos, sin = (
            g.broadcast_to(
                g.reshape(m[n], shape=_table_shape(m[n], axis)), shape=(batch, seq, size)
            )
            for n in ("cos", "sin")
        )
        y = Builder(g.graph, f"{g.name}.rotary").rotary(
            rows, cos, sin, heads=heads, head_size=size, offset=0
        )
        return g.transpose(g.reshape(y, shape=(batch, seq, heads, size)), perm=order)


def _table_shape(value: Value, axis: int) -> tuple[Dim, ...]:
    shape = (1,) * (4 - value.type.rank) + value.type.shape
    return tuple(d for i, d in enumerate(shape) if i != axis)


def _is_table(value: Value, batch: Dim, seq: Dim, size: Dim, axis: int) -> bool:
    if value.type.rank > 4 or value.type.rank < 2:
        return False
    shape = (1,) * (4 - value.type.rank) + value.type.shape
    tokens = _table_shape(value, axis)
    return (
        shape[axis] == 1
        and tokens[0] in (1, batch)
        and tokens[1] in (1, seq)
        and (tokens[2] == size)
    )


@dataclass(frozen=True, slots=True)
class SliceIntoRotary(RewriteRule):
    """rotary(slice(y, channels a..))  ->  rotary(y) at channel offset a"""

    def pattern(self, p: Pattern) -> Term:
        return p.rotary(p.slice("y", bind="slice"))

    def check(self, m: Match) -> Reject | None:
        known = channel_start(m.node("slice")) is not None
        return None if known else Reject("the slice is not of consecutive channels")

    def rewrite(self, m: Match, g: Builder) -> Value:
        attrs = dict(m.root.attrs)
        start = channel_start(m.node("slice"))
        assert start is not None
        attrs["offset"] += start
        return g.rotary(m["y"], *m.root.inputs[1:], **attrs)


@dataclass(frozen=True, slots=True)
class FuseRotaryEmbedding:
    """Before fuse_attention: its operands are then views of one op each."""

    name: str = "fuse_rotary"

    def run(self, graph: Graph) -> PassResult:
        return apply_rules(graph, [FuseRotary()])


@dataclass(frozen=True, slots=True)
class FuseChannels:
    """After canonicalize, which brings slices of heads down to slices of channels."""

    name: str = "fuse_channels"

    def run(self, graph: Graph) -> PassResult:
        return apply_rules(graph, [FuseGated(), SliceIntoRotary()])
