"""Compute the real tokens of a batch alone, side by side, where padding can not matter.

    y = encoder(embedding(ids[batch, seq]))
        ->   unpack_tokens(encoder(embedding(ids[real tokens])))

Attention then takes the tokens of each sequence from a list. At padding the outputs are 0. What
`padding_proof` can not prove stays as it is, with a note that says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsec.ir.dims import Dim, product, symbol, symbols
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult
from sparsec.passes.padding_proof import (
    ATTENTIONS,
    VIEWS,
    Proof,
    Role,
    prove,
    same_for_all,
)
from sparsec.passes.rewrite import Reject

NAME = "pack_tokens"
LOWEST = -3.4028234663852886e38  # of fp32


@dataclass(frozen=True, slots=True)
class PackTokens:
    """All of the graph or nothing."""

    name: str = NAME

    def run(self, graph: Graph) -> PassResult:
        proof = prove(graph)
        if isinstance(proof, Reject):
            return PassResult(0, (f"padding is computed: {proof.reason}",))
        _Packing(graph, proof).rewrite()
        return PassResult(len(proof.roles))


def padded_ports(graph: Graph) -> tuple[str, list[str]]:
    """Of a graph of packed tokens: the input that says what padding is, and the outputs that are
    0 there."""
    node = next(n for n in graph.nodes if n.op == NAME)
    real = node.input(0)
    mask = real if real.producer is None else real.producer.input(0)
    pairs = zip(graph.output_names, graph.outputs, strict=True)
    return mask.name, [name for name, value in pairs if _is_unpacked(value)]


def _is_unpacked(value: Value) -> bool:
    node = value.producer
    while node is not None and node.op == "reshape":
        node = node.input(0).producer
    return node is not None and node.op == "unpack_tokens"


@dataclass(slots=True)
class _Packing:
    """Nodes of packed tokens beside the old ones, which die when all their readers are new."""

    graph: Graph
    proof: Proof
    new: dict[Value, Value] = field(default_factory=dict)  # values of tokens -> packed
    taken: dict[Value, Value] = field(default_factory=dict)  # other rows -> those of the tokens
    rows: dict[Value, Value] = field(default_factory=dict)  # packed -> rows again
    named: dict[Node, str] = field(default_factory=dict)  # nodes that take the name of another
    batch: Dim = 0
    seq: Dim = 0
    tokens: Dim = 0
    index: Any = None
    sequence: Any = None
    starts: Any = None
    place: Any = None
    scores: Any = None
    first: Value | None = None

    def rewrite(self) -> None:
        self._find_tokens()
        rewrites = {Role.TOKENS: self._pack_node, Role.FIRST: self._take_first,
                    Role.MASKED: self._read_rows}  # fmt: skip
        for node, role in self.proof.roles.items():
            rewrites[role](node)
        outputs = self.graph.outputs
        self.graph.outputs = [self._unpacked(v) if v in self.new else v for v in outputs]
        self.graph.sort()
        self.graph.drop_dead_nodes()
        for node, name in self.named.items():
            self.graph.rename(node, name)

    def _find_tokens(self) -> None:
        mask, hidden = self.proof.mask, self.proof.hidden
        self.batch, self.seq = mask.type.shape
        self.tokens = symbol(self._free_symbol())
        known: dict[Value, Value] = {mask: mask}
        scores = self._on_tokens(self.proof.scores, known)
        attrs = {
            "tokens": self.tokens,
            "most": self.batch * self.seq,
            "seen": max(hidden, LOWEST) / 2,
            "keep_first": Role.FIRST in self.proof.roles.values(),
        }
        node = self.graph.add_node(NAME, [self._real(known), scores], attrs)
        _, self.index, self.sequence, self.starts, self.place = node.outputs
        self.scores = self._reshape(self._take(scores), (1, 1, 1, self.tokens))

    def _free_symbol(self) -> str:
        taken = {n for v in self.graph.inputs for d in v.type.shape for n in symbols(d)}
        name = "tokens"
        while name in taken:
            name = f"real_{name}"
        return name

    def _on_tokens(self, value: Value, known: dict[Value, Value]) -> Value:
        """What attention adds to the scores, as a function of the mask: [batch, seq]."""
        node = value.producer
        if value.data is not None:
            scalar = value.data.reshape(())
            return value if value.type.rank == 0 else self.graph.add_constant(scalar, value.name)
        assert node is not None or value in known, value
        if value not in known:
            assert node is not None
            operands = [None if v is None else self._on_tokens(v, known) for v in node.inputs]
            again = self.graph.add(node.op, operands, node.attrs) if node.op not in VIEWS else None
            made = again or operands[0]
            assert made is not None
            known[value] = made
        return known[value]

    def _real(self, known: Mapping[Value, Value]) -> Value:
        """Whether the mask is not 0, which the scores may have asked already."""
        mask = self.proof.mask
        if mask.type.dtype is DType.BOOL:
            return mask
        for value in known.values():
            node = value.producer
            cast = node is not None and node.op == "cast" and node.input(0) is mask
            if cast and value.type.dtype is DType.BOOL:
                return value
        return self.graph.add("cast", [mask], {"to": DType.BOOL}, name=f"{mask.name}.real")

    def _pack_node(self, node: Node) -> None:
        attrs, op = dict(node.attrs), node.op
        if op == "embedding":
            inputs = [self._ids(v) if i % 2 == 0 else v for i, v in enumerate(node.inputs)]
        elif op in ATTENTIONS:
            inputs = [self.new[node.input(i)] for i in range(3)]
            inputs += [self.scores, self.sequence, self.starts]
            attrs["longest"] = self.seq
        else:
            inputs = [None if v is None else self._packed(node, v) for v in node.inputs]
        if op in VIEWS:
            attrs["shape"] = (1, self.tokens, *attrs["shape"][2:])
        made = self.graph.add_node(op, inputs, attrs, name=node.name)
        self.named[made] = node.name
        self.new.update(zip(node.outputs, made.outputs, strict=True))

    def _ids(self, ids: Value | None) -> Value:
        assert ids is not None
        if ids.type.elements == 1:
            return self._reshape(ids, (1, 1))
        shape = (self.batch, self.seq)
        if ids.type.shape != shape:
            ids = self.graph.add("broadcast_to", [ids], {"shape": shape}, name=ids.name)
        return self._reshape(self._take(ids), (1, self.tokens))

    def _packed(self, node: Node, value: Value) -> Value:
        """An operand of an op on packed tokens."""
        if value in self.new:
            return self.new[value]
        if same_for_all(node, value):
            return value
        if value not in self.taken:
            shape = (1, self.tokens, *value.type.shape[2:])
            self.taken[value] = self._reshape(self._take(value), shape)
        return self.taken[value]

    def _take(self, value: Value) -> Value:
        """[batch, seq, ...] -> [tokens, ...]"""
        flat = self._reshape(value, (self.batch * self.seq, *value.type.shape[2:]))
        return self.graph.add("gather", [flat, self.index], {"axis": 0}, name=value.name)

    def _reshape(self, value: Value, shape: tuple[Dim, ...]) -> Value:
        if value.type.shape == shape:
            return value
        return self.graph.add("reshape", [value], {"shape": shape}, name=value.name)

    def _take_first(self, node: Node) -> None:
        if self.first is None:
            attrs = {"axes": (0,), "starts": (0,), "ends": (self.batch,), "steps": (1,)}
            self.first = self.graph.add("slice", [self.starts], attrs, name="first_tokens")
        operands = [self.new[node.input(0)], self.first]
        taken = self.graph.add("gather", operands, {"axis": 1}, name=node.name)
        self.graph.replace_uses(node.output, self._reshape(taken, node.output.type.shape))

    def _read_rows(self, node: Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value in self.new:
                self.graph.replace_input(node, index, self._unpacked(value))

    def _unpacked(self, value: Value) -> Value:
        if value not in self.rows:
            packed, rest = self.new[value], value.type.shape[2:]
            flat = self._reshape(packed, (1, self.tokens, product(rest)))
            name = f"{value.name}.unpack"
            made = self.graph.add("unpack_tokens", [flat, self.index, self.place], name=name)
            self.rows[value] = self._reshape(made, value.type.shape)
        return self.rows[value]
