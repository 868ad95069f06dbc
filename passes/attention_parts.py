"""Reads the parts of a spelled-out attention from its probabilities upwards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsec.ir.dims import Dim
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.types import DType
from sparsec.passes.absorb_qdq import quantize_of
from sparsec.passes.attention_steps import Add, Fill, Scale, Step, check_fills
from sparsec.passes.rewrite import Builder, Match, Reject

HEAD_VIEWS = ("reshape", "transpose")  # that make heads of channels


@dataclass(frozen=True, slots=True)
class Operand:
    """q, k^T or v: `views` of `source`, after a scale and a rounding were taken off.

    `step` is that of the numbers around 128 that a quantised model rounds `source` to.
    """

    source: Value
    views: tuple[Node, ...]  # the last one is applied first
    scale: float
    step: float | None = None

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.views[0].output.type.shape if self.views else self.source.type.shape

    def build(self, g: Builder) -> Value:
        value = self.source
        for node in reversed(self.views):
            value = g.graph.add(node.op, [value], node.attrs, name=g.name)
        return value


@dataclass(frozen=True, slots=True)
class Scores:
    """`product` = q k^T and the steps from it to the softmax, first step first."""

    product: Node
    steps: tuple[Step, ...]
    heads: tuple[Dim, Dim] | None = None  # (batch, heads), where a reshape shows them


@dataclass(frozen=True, slots=True)
class Attention:
    """All that the op needs. q is [batch, heads, seq, head_size] or has batch * heads in one."""

    q: Operand
    k: Operand
    v: Operand
    steps: tuple[Step, ...]
    batch: Dim
    heads: int
    seq: Dim
    head_size: int
    scale: float


def read_attention(m: Match, graph: Graph) -> Attention | Reject:
    """The parts of the attention whose last product is the root of `m`, or why it is none."""
    reason = _check_softmax(m, graph)
    if reason is not None:
        return reason
    scores = _read_scores(m["scores"])
    if isinstance(scores, Reject):
        return scores
    q, k = _unscaled(scores.product.input(0)), _unscaled(scores.product.input(1))
    v = _unscaled(m["v"], factors=False)
    shapes = (q.shape, k.shape, m["v"].type.shape)
    if len({len(s) for s in shapes}) != 1 or len(shapes[0]) not in (3, 4):
        return Reject("q, k and v do not all have three or all have four axes")
    *front, seq, size = q.shape
    if k.shape != (*front, size, seq) or shapes[2] != (*front, seq, size):
        texts = " ".join(f"[{', '.join(map(str, s))}]" for s in shapes)
        return Reject(f"not the shapes of self-attention: {texts}")
    heads = _batch_heads(q, m["v"], scores)
    if not isinstance(heads[1], int) or not isinstance(size, int):
        return Reject("the number of heads or their size is not known")
    scale = q.scale * k.scale
    for step in scores.steps:
        scale *= step.factor if isinstance(step, Scale) else 1.0
    found = Attention(q, k, v, scores.steps, heads[0], heads[1], seq, size, scale)
    return _check_row_guard(m, found) or _check_masks(found) or found


def _check_softmax(m: Match, graph: Graph) -> Reject | None:
    softmax, guard = m["softmax"], m.get("guard")
    if softmax.type.dtype is not DType.F32:
        return Reject(f"the scores are {softmax.type.dtype}")
    if m.node("softmax").attrs["axis"] != softmax.type.rank - 1:
        return Reject("the softmax is not over the keys")
    asks_nan = guard is not None and m.get("row_max") is None
    read = {softmax: 2 if asks_nan else 1}  # that guard reads the softmax twice
    read |= {v: 1 for v in (guard, m.root.input(0)) if v is not None and v is not softmax}
    if any(len(v.uses) != count or v in graph.outputs for v, count in read.items()):
        return Reject("the probabilities are read elsewhere")
    return None


def _check_row_guard(m: Match, found: Attention) -> Reject | None:
    """Zeros for the rows of a mask that are -inf throughout, which no later step may undo."""
    if m.get("row_max") is None:
        return None
    attrs, last = m.node("row_max").attrs, found.steps[-1] if found.steps else None
    bias = _narrow(m["bias"])
    if attrs["axes"] != (m["bias"].type.rank - 1,) or not attrs["keepdims"]:
        return Reject("the guard is not over the keys alone")
    if bias.data is not None and np.isfinite(bias.data).all():
        return None  # no row is: it guards nothing
    if not isinstance(last, Add) or _narrow(last.mask) is not bias:
        return Reject("the guard asks another mask than the one that is added last")
    return None


def _narrow(value: Value) -> Value:
    """What is broadcast to `value`."""
    node = value.producer
    return value if node is None or node.op != "broadcast_to" else _narrow(node.input(0))


def _read_scores(value: Value) -> Scores | Reject:
    """Follows the scores upwards to the product of q and k^T."""
    node = value.producer
    if node is None:
        return Reject(f"the scores come from %{value.name}, not from a product")
    match node.op:
        case "matmul":
            return Scores(node, ())
        case "reshape":
            return _read_reshape(node)
        case "mul" | "div":
            return _read_scale(node)
        case "add":
            return _read_add(node)
        case "where":
            return _read_where(node)
    return Reject(f"the scores come from {node.name} ({node.op}), which is not understood")


def _read_reshape(node: Node) -> Scores | Reject:
    below = _read_scores(node.input(0))
    if isinstance(below, Reject):
        return below
    shapes = [node.input(0).type.shape, node.output.type.shape]
    if sorted(len(s) for s in shapes) != [3, 4]:
        return Reject("the scores are reshaped in a way that is not understood")
    three, four = sorted(shapes, key=len)
    if three != (four[0] * four[1], *four[2:]):
        return Reject("the scores are reshaped in a way that is not understood")
    return Scores(below.product, below.steps, (four[0], four[1]))


def _read_scale(node: Node) -> Scores | Reject:
    split = _scalar_factor(node)
    if split is None:
        return Reject(f"the scores are scaled by {node.name}, which is not a constant")
    below = _read_scores(split[0])
    return below if isinstance(below, Reject) else _with(below, Scale(split[1]))


def _read_add(node: Node) -> Scores | Reject:
    reasons = []
    for i in range(2):
        scores, mask = node.input(i), node.input(1 - i)
        below = _read_scores(scores)
        if isinstance(below, Scores) and scores.type.shape == node.output.type.shape:
            return _with(below, Add(mask))
        reasons.append(below.reason if isinstance(below, Reject) else "the mask is wider")
    return Reject(f"neither summand of {node.name} is the scores: {'; '.join(reasons)}")


def _read_where(node: Node) -> Scores | Reject:
    condition = node.input(0)
    for scores, fill, replaces in (
        (node.input(1), node.input(2), False),
        (node.input(2), node.input(1), True),
    ):
        if fill.data is None or fill.data.size != 1:
            continue
        below = _read_scores(scores)
        if isinstance(below, Scores) and scores.type.shape == node.output.type.shape:
            return _with(below, Fill(condition, replaces, float(fill.data.reshape(()))))
    return Reject(f"{node.name} does not replace scores by a constant")


def _with(scores: Scores, step: Step) -> Scores:
    return Scores(scores.product, (*scores.steps, step), scores.heads)


def _scalar_factor(node: Node) -> tuple[Value, float] | None:
    """(x, c) for mul(x, c), mul(c, x) and div(x, c) with a constant scalar c."""
    a, b = node.input(0), node.input(1)
    if node.op == "mul" and a.data is not None:
        a, b = b, a
    if b.data is None or b.data.size != 1 or a.type.shape != node.output.type.shape:
        return None
    c = float(b.data.reshape(()))
    if node.op == "mul":
        return a, c
    return (a, 1.0 / c) if node.op == "div" and c else None


def _unscaled(value: Value, *, factors: bool = True) -> Operand:
    """Takes constant factors and roundings off an operand, also from under its views."""
    scale, source = 1.0, value
    step: float | None = None  # of `value`: that of the last rounding
    views: list[Node] = []
    deepest: Operand | None = None
    while (node := source.producer) is not None:
        split = _scalar_factor(node) if factors and node.op in ("mul", "div") else None
        rounding = quantize_of(node)
        if split is not None and split[1]:
            source, scale = split[0], scale * split[1]
            deepest = Operand(source, tuple(views), scale, step and step / abs(scale))
        elif rounding is not None:
            source = rounding.input(0)
            step = step or _step(rounding) * abs(scale)
            deepest = Operand(source, tuple(views), scale, step / abs(scale))
        elif node.op in HEAD_VIEWS:
            views.append(node)
            source = node.input(0)
        else:
            break
    return deepest or Operand(value, (), 1.0)


def _step(rounding: Node) -> float:
    """The step of -128..127 that holds all that a quantize stores; its own if that is centred."""
    limits = np.iinfo(rounding.attrs["dtype"].numpy)
    scale, zero_point = rounding.attrs["scale"], rounding.attrs["zero_point"]
    most = max(zero_point - limits.min - 1, limits.max - zero_point)
    return float(np.float32(scale * most / 127))


def _batch_heads(q: Operand, v: Value, scores: Scores) -> tuple[Dim, Dim]:
    """Batch and heads. Where nothing tells them apart, one head over batch * heads is the same."""
    if len(q.shape) == 4:
        return q.shape[0], q.shape[1]
    if scores.heads is not None:
        return scores.heads
    for value in (q.views[0].output if q.views else q.source, v):
        node = value.producer
        if node is None or node.op != "reshape":
            continue
        before, after = node.input(0).type.shape, node.output.type.shape
        if len(before) == 4 and after == (before[0] * before[1], *before[2:]):
            return before[0], before[1]
    return q.shape[0], 1


def _check_masks(found: Attention) -> Reject | None:
    for step in found.steps:
        match step:
            case Add(mask) | Fill(condition=mask):
                if mask_shape(found, mask) is None:
                    return Reject(f"the mask {mask.type} is not understood")
    return check_fills(found.steps)


def mask_shape(found: Attention, mask: Value) -> tuple[Dim, ...] | None:
    """The mask's shape over [batch, heads, seq, seq], or None when it does not fit."""
    shape = mask.type.shape
    if len(shape) == 3 and shape[0] == found.batch * found.heads and shape[0] != 1:
        shape = (found.batch, found.heads, *shape[1:])
    shape = (1,) * (4 - len(shape)) + shape
    full = (found.batch, found.heads, found.seq, found.seq)
    fits = len(shape) == 4 and all(a in (1, b) for a, b in zip(shape, full, strict=True))
    return shape if fits else None
