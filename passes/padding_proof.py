"""Proves which values are wanted at the real tokens of a batch alone: what pack_tokens may drop.

A token is padding where the attention mask, a graph input [batch, seq], is 0. Three facts make it
superfluous: every op between the ids and the outputs works on one token at a time or is
attention; attention adds to the scores of a key a function of its mask alone, so low at 0 that
the key gets no share; what leaves the tokens looks at real ones or at the first.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np

from sparsec.ir.dims import Dim, product
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.op_spec import Array
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType
from sparsec.passes.rewrite import Reject

# A mask at most this low means "no key": -10000 is the least that exporters write. A share is
# exp(score - highest score), which is 0 in fp32 from -104 on, so the scores of a sequence would
# have to lie further apart than half of this to notice.
HIDDEN = -1e4

SHAPED_VIEWS = ("reshape", "broadcast_to")  # their attribute is the shape of the result
ATTENTIONS = ("attention", "attention_int8", "attention_bf16")
EMBEDDINGS = ("embedding", "embedding_int8")
# Operands that hold tokens, of ops whose others are constants.
TOKEN_OPERANDS = {
    "linear": (0, 3),
    "linear_int8": (0, 4, 5),
    "linear_bf16": (0, 3),
    "to_bf16": (0,),
    "layer_norm": (0, 3),
    "quantize": (0,),
    "quantize_tokens": (0,),
    "dequantize": (0,),
    "matmul": (0,),
}


class Role(enum.Enum):
    """How a node that reads packed tokens is computed."""

    TOKENS = "for every packed token"
    FIRST = "of the first token of each sequence"
    MASKED = "on rows, where zeros in padding change nothing"


@dataclass(frozen=True, slots=True)
class Proof:
    """`mask` is the graph input, `scores` what attention adds, which is `hidden` at padding.

    Nodes that are not in `roles` stay as they are.
    """

    mask: Value
    scores: Value
    hidden: float
    roles: dict[Node, Role]


def prove(graph: Graph) -> Proof | Reject:
    """Which nodes can work on packed tokens, or why padding has to be computed."""
    found = _find_mask(graph)
    if isinstance(found, Reject):
        return found
    mask, scores = found
    if mask.type.elements == 1:
        return Reject("there is one token only")
    hidden = value_at_zero(scores)
    if not hidden <= HIDDEN:
        return Reject(f"the mask adds {hidden:g} to the scores of padding: that does not hide it")
    return _Walk(graph, mask, scores, hidden).run()


def _find_mask(graph: Graph) -> tuple[Value, Value] | Reject:
    """The attention mask and what attention adds to scores: the same for all layers."""
    nodes = [n for n in graph.nodes if n.op in ATTENTIONS]
    if not nodes:
        return Reject("there is no attention that could mix tokens by a mask")
    scores = nodes[0].optional_input(3)
    if scores is None:
        return Reject(f"{nodes[0].name} reads every key: it has no mask")
    if scores.type.dtype is not DType.F32:
        return Reject(f"{nodes[0].name} is computed in {scores.type.dtype}")
    source = mask_source(scores, KEYS)
    return source if isinstance(source, Reject) else (source, scores)


@dataclass(slots=True)
class _Walk:
    """Goes through the nodes in order; `packed` are the values of tokens so far."""

    graph: Graph
    mask: Value
    scores: Value
    hidden: float
    packed: set[Value] = field(default_factory=set)
    roles: dict[Node, Role] = field(default_factory=dict)

    def run(self) -> Proof | Reject:
        for node in self.graph.nodes:
            reads = any(v in self.packed for v in node.inputs)
            starts = node.op in EMBEDDINGS and self._is_tokens(node.output)
            if not starts and not reads:
                continue
            role = self._role(node) if reads else Role.TOKENS
            if isinstance(role, Reject):
                return Reject(f"{node.name} ({node.op}): {role.reason}")
            self.roles[node] = role
            if role is Role.TOKENS:
                self.packed.update(node.outputs)
        for name, value in zip(self.graph.output_names, self.graph.outputs, strict=True):
            if value in self.packed and not _can_unpack(value):
                return Reject(f"the output {name} is {value.type}, not fp32 channels per token")
        if not any(n.op in ATTENTIONS for n in self.roles):
            return Reject("no attention works on looked-up embeddings")
        return Proof(self.mask, self.scores, self.hidden, self.roles)

    def _role(self, node: Node) -> Role | Reject:
        if node.op in ATTENTIONS:
            return self._attention(node)
        if _is_first(node):
            return Role.FIRST
        if self._is_masked(node):
            return Role.MASKED
        return self._token_wise(node)

    def _attention(self, node: Node) -> Role | Reject:
        if not all(node.input(i) in self.packed for i in range(3)):
            return Reject("queries, keys and values are not all of the same tokens")
        scores = node.optional_input(3)
        if scores is None:
            return Reject("it reads every key: it has no mask")
        if scores is not self.scores and not same_function(scores, self.scores):
            source = mask_source(scores, KEYS)
            return source if isinstance(source, Reject) else Reject("its mask is another one")
        return Role.TOKENS

    def _is_masked(self, node: Node) -> bool:
        """x * m, m 0 at padding; where(m, x, y) that takes y there; an output that is a cast of
        rows, or the best channel of each."""
        operands = [v for v in node.inputs if v is not None]
        if not all(_can_unpack(v) for v in operands if v in self.packed):
            return False
        rank = node.outputs[0].type.rank
        if node.op == "mul":
            other = [v for v in operands if v not in self.packed]
            return len(other) == 1 and self._at_padding(other[0], rank) == 0
        if node.op == "where" and operands[0] not in self.packed:
            chosen = self._at_padding(operands[0], rank)
            return chosen is not None and operands[1 if chosen else 2] not in self.packed
        if node.op == "arg_max" and node.attrs["axis"] < 2:
            return False
        return node.op in ("cast", "arg_max") and node.output in self.graph.outputs

    def _at_padding(self, value: Value, rank: int) -> float | None:
        """What a function of the mask of the same token is in padding; None for other values.

        `rank` is that of the rows that the value is broadcast to.
        """
        source = mask_source(value, (-rank, 1 - rank))
        return value_at_zero(value) if source is self.mask else None

    def _token_wise(self, node: Node) -> Role | Reject:
        """Whether each row of the result is computed from the same row of the operands."""
        if not all(self._is_tokens(v) for v in node.outputs):
            return Reject("it reads padding: its result has no row per token")
        known = TOKEN_OPERANDS.get(node.op)
        for index, value in enumerate(node.inputs):
            if value is None or (value in self.packed and (known is None or index in known)):
                continue
            if known is not None and (index in known or value.data is None or value.type.rank > 2):
                return Reject(f"%{value.name} is neither a weight nor made of the same tokens")
            if known is None and not self._goes_with_tokens(node, value):
                return Reject(f"%{value.name} is not the same for all tokens")
        return Role.TOKENS if known or _keeps_rows(node) else Reject("it may mix tokens")

    def _goes_with_tokens(self, node: Node, value: Value) -> bool:
        """Whether an operand is the same for all tokens, or has a row for each."""
        return same_for_all(node, value) or self._is_tokens(value)

    def _is_tokens(self, value: Value) -> bool:
        """Whether the shape is [batch, seq, ...]."""
        return value.type.rank >= 2 and value.type.shape[:2] == self.mask.type.shape


def same_for_all(node: Node, value: Value) -> bool:
    """Whether an operand that holds no tokens is not split into rows [batch, seq, ...] either."""
    if node.op in TOKEN_OPERANDS or node.op == "gather":
        return True
    rank = node.outputs[0].type.rank
    return all(d == 1 for d in value.type.shape[: max(2 - rank + value.type.rank, 0)])


def _can_unpack(value: Value) -> bool:
    """fp32 rows of a known size"""
    return value.type.dtype is DType.F32 and isinstance(product(value.type.shape[2:]), int)


def _keeps_rows(node: Node) -> bool:
    """Whether an op works within the rows [batch, seq, ...] of its first operand."""
    attrs = node.attrs
    if OPS[node.op].elementwise:
        return True
    if node.op in SHAPED_VIEWS:
        return node.input(0).type.shape[:2] == node.output.type.shape[:2]
    axes = attrs.get("axes", (attrs["axis"],) if "axis" in attrs else ())
    within = bool(axes) and all(axis >= 2 for axis in axes)
    if node.op == "gather":
        return within and node.input(1).is_constant
    return within and (node.op in ("slice", "softmax", "concat") or node.op.startswith("reduce_"))


def _is_first(node: Node) -> bool:
    """x[:, 0] or x[:, 0:1]"""
    attrs = node.attrs
    if node.op == "gather":
        data = node.input(1).data
        return attrs["axis"] == 1 and data is not None and data.size == 1 and not data.any()
    if node.op != "slice" or attrs["axes"] != (1,):
        return False
    return (attrs["starts"], attrs["ends"], attrs["steps"]) == ((0,), (1,), (1,))


# Where the batch and the sequence of a mask are, from the end; None for one of size 1.
_Axes = tuple[int | None, int | None]
KEYS: _Axes = (-4, -1)  # of scores [batch, heads, queries, keys]


def mask_source(value: Value, wanted: _Axes) -> Value | Reject:
    """The graph input [batch, seq] of which `value` is a function, element by element.

    `wanted` says which of its axes, from the end, must be the input's.
    """
    found = _trace(value)
    if isinstance(found, Reject):
        return found
    source, (batch_axis, seq_axis) = found
    if source is None:
        return Reject(f"%{value.name} does not depend on an attention mask")
    if batch_axis not in (None, wanted[0]) or seq_axis not in (None, wanted[1]):
        return Reject(f"%{value.name} does not depend on the mask of one token alone")
    return source


def _trace(value: Value) -> tuple[Value | None, _Axes] | Reject:
    """The source of a value and where its axes went; no source for one scalar constant."""
    node = value.producer
    if value.data is not None:
        if value.data.size != 1:
            return Reject(f"%{value.name} depends on the position")
        return None, (None, None)
    if node is None:
        if value.type.rank != 2:
            return Reject(f"the input {value.name} is {value.type}, not one value per token")
        batch, seq = value.type.shape
        return value, (None if batch == 1 else -2, None if seq == 1 else -1)
    if node.op in SHAPED_VIEWS:
        return _trace_view(node)
    if not OPS[node.op].elementwise and node.op not in ("quantize", "dequantize"):
        return Reject(
            f"the mask is made by {node.name} ({node.op}); where inputs have sizes of their own "
            "that are the same, --shape NAME=batchxseq for each says so"
        )
    parts = [_trace(v) for v in node.inputs if v is not None]
    refused = next((p for p in parts if isinstance(p, Reject)), None)
    if refused is not None:
        return refused
    sources = [p for p in parts if not isinstance(p, Reject) and p[0] is not None]
    if not sources:
        return None, (None, None)
    if any(p != sources[0] for p in sources):
        return Reject(f"{node.name} ({node.op}) puts masks of other tokens or inputs together")
    return sources[0]


def _trace_view(node: Node) -> tuple[Value | None, _Axes] | Reject:
    found = _trace(node.input(0))
    if isinstance(found, Reject) or found[0] is None or node.op == "broadcast_to":
        return found  # broadcasting adds axes in front and repeats those of size 1
    before, after = node.input(0).type.shape, node.output.type.shape
    moved = _large_axes(after)
    if len(_large_axes(before)) != len(moved) or _sizes(before) != _sizes(after):
        return Reject(f"{node.name} (reshape) does not keep one value per token")
    places = dict(zip(_large_axes(before), moved, strict=True))
    batch, seq = (None if axis is None else places[axis] for axis in found[1])
    return found[0], (batch, seq)


def _large_axes(shape: tuple[Dim, ...]) -> list[int]:
    return [i - len(shape) for i, d in enumerate(shape) if d != 1]


def _sizes(shape: tuple[Dim, ...]) -> list[Dim]:
    return [d for d in shape if d != 1]


def value_at_zero(value: Value) -> float:
    """What a value that `mask_source` knows is where the mask is 0."""
    return float(_at_zero(value, {}).reshape(()))


def _at_zero(value: Value, known: dict[Value, Array]) -> Array:
    node = value.producer
    if value.data is not None:
        return value.data.reshape(())
    if node is None:
        return np.zeros((), value.type.dtype.numpy)
    if value not in known:
        operands = [None if v is None else _at_zero(v, known) for v in node.inputs]
        views = node.op in SHAPED_VIEWS
        made = operands if views else OPS[node.op].evaluate(operands, node.attrs, {})
        assert made[0] is not None
        known[value] = made[0]
    return known[value]


def same_function(a: Value, b: Value) -> bool:
    """Whether two values are computed alike from the same inputs and equal constants."""
    if a is b:
        return True
    if a.data is not None and b.data is not None:
        return a.type == b.type and np.array_equal(a.data, b.data)
    one, two = a.producer, b.producer
    if one is None or two is None or (one.op, one.attrs) != (two.op, two.attrs):
        return False
    pairs = zip(one.inputs, two.inputs, strict=True)
    return len(one.inputs) == len(two.inputs) and all(
        v is w if v is None or w is None else same_function(v, w) for v, w in pairs
    )
