"""Compute the real tokens of a batch alone, side by side, where padding can not matter.

    y = encoder(embedding(ids[batch, seq]))
        ->   unpack_tokens(encoder(embedding(ids[real tokens])))

Attention then takes the tokens of each sequence from a list. At padding the outputs are 0. What
`padding_proof` can not prove stays as it is, with a note that says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsec.ir.dims import Dim, product, symbol, symbols
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult
from sparsec.passes.padding_proof import (
    ATTENTIONS,
    EMBEDDINGS,
    SHAPED_VIEWS,
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
        _Packing.of(graph, proof).rewrite()
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
    while node is not None and node.op in ("reshape", "cast", "arg_max"):
        node = node.input(0).producer
    return node is not None and node.op == "unpack_tokens"


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What pack_tokens finds: see its row in `ops_packing.py`."""

    batch: Dim
    seq: Dim
    count: Dim
    index: Value
    sequence: Value
    starts: Value
    place: Value


def _find_tokens(graph: Graph, proof: Proof) -> tuple[_Tokens, Value]:
    """The tokens, and what attention adds to the scores of keys: [batch, seq]."""
    batch, seq = proof.mask.type.shape
    known: dict[Value, Value] = {proof.mask: proof.mask}
    scores = _on_tokens(graph, proof.scores, known)
    count = symbol(_free_symbol(graph))
    attrs = {
        "tokens": count,
        "most": batch * seq,
        "seen": max(proof.hidden, LOWEST) / 2,
        "keep_first": Role.FIRST in proof.roles.values(),
    }
    real = _real(graph, proof.mask, known)
    _, *lists = graph.add_node(NAME, [real, scores], attrs).outputs
    return _Tokens(batch, seq, count, *lists), scores


def _free_symbol(graph: Graph) -> str:
    taken = {n for v in graph.inputs for d in v.type.shape for n in symbols(d)}
    name = "tokens"
    while name in taken:
        name = f"real_{name}"
    return name


def _on_tokens(graph: Graph, value: Value, known: dict[Value, Value]) -> Value:
    """A function of the mask, as one of [batch, seq]."""
    node = value.producer
    if value.data is not None:
        scalar = value.data.reshape(())
        return value if value.type.rank == 0 else graph.add_constant(scalar, value.name)
    if value not in known:
        assert node is not None, value
        operands = [None if v is None else _on_tokens(graph, v, known) for v in node.inputs]
        made = operands[0]
        if node.op not in SHAPED_VIEWS:
            made = graph.add(node.op, operands, node.attrs, name=node.name)
        assert made is not None, node
        known[value] = made
    return known[value]


def _real(graph: Graph, mask: Value, known: Mapping[Value, Value]) -> Value:
    """Whether the mask is not 0, which the scores may have asked already."""
    if mask.type.dtype is DType.BOOL:
        return mask
    for value in known.values():
        node = value.producer
        cast = node is not None and node.op == "cast" and node.input(0) is mask
        if cast and value.type.dtype is DType.BOOL:
            return value
    return graph.add("cast", [mask], {"to": DType.BOOL}, name=f"{mask.name}.real")


@dataclass(slots=True)
class _Packing:
    """Nodes of packed tokens beside the old ones, which die when all their readers are new."""

    graph: Graph
    proof: Proof
    tokens: _Tokens
    scores: Value  # of the tokens: [1, 1, 1, tokens]
    new: dict[Value, Value] = field(default_factory=dict)  # values of tokens -> packed
    taken: dict[Value, Value] = field(default_factory=dict)  # other rows -> those of the tokens
    rows: dict[Value, Value] = field(default_factory=dict)  # packed -> rows again
    named: dict[Node, str] = field(default_factory=dict)  # nodes that take the name of another

    @staticmethod
    def of(graph: Graph, proof: Proof) -> _Packing:
        tokens, scores = _find_tokens(graph, proof)
        taken = _reshape(graph, _take(graph, tokens, scores), (1, 1, 1, tokens.count))
        return _Packing(graph, proof, tokens, taken)

    def rewrite(self) -> None:
        rewrites = {
            Role.TOKENS: self._pack_node,
            Role.FIRST: self._take_first,
            Role.MASKED: self._read_rows,
        }
        for node, role in self.proof.roles.items():
            rewrites[role](node)
        outputs = self.graph.outputs
        self.graph.outputs = [self._unpacked(v) if v in self.new else v for v in outputs]
        self.graph.sort()
        self.graph.drop_dead_nodes()
        for node, name in self.named.items():
            self.graph.rename(node, name)

    def _pack_node(self, node: Node) -> None:
        attrs, op, tokens = dict(node.attrs), node.op, self.tokens
        inputs: list[Value | None]
        if op in EMBEDDINGS:
            ids = _ids_of(node)
            inputs = [self._ids(v) if i in ids else v for i, v in enumerate(node.inputs)]
        elif op in ATTENTIONS:
            operands = [self.new[node.input(i)] for i in range(3)]
            inputs = [*operands, self.scores, tokens.sequence, tokens.starts]
            attrs["longest"] = tokens.seq
        else:
            inputs = [None if v is None else self._packed(node, v) for v in node.inputs]
        if op in SHAPED_VIEWS:
            attrs["shape"] = (1, tokens.count, *attrs["shape"][2:])
        made = self.graph.add_node(op, inputs, attrs, name=node.name)
        self.named[made] = node.name
        self.new.update(zip(node.outputs, made.outputs, strict=True))

    def _ids(self, ids: Value | None) -> Value:
        assert ids is not None
        if ids.type.elements == 1:
            return _reshape(self.graph, ids, (1, 1))
        shape = (self.tokens.batch, self.tokens.seq)
        if ids.type.shape != shape:
            ids = self.graph.add("broadcast_to", [ids], {"shape": shape}, name=ids.name)
        taken = _take(self.graph, self.tokens, ids)
        return _reshape(self.graph, taken, (1, self.tokens.count))

    def _packed(self, node: Node, value: Value) -> Value:
        """An operand of an op on packed tokens."""
        if value in self.new:
            return self.new[value]
        if same_for_all(node, value):
            return value
        if value not in self.taken:
            shape = (1, self.tokens.count, *value.type.shape[2:])
            self.taken[value] = _reshape(self.graph, _take(self.graph, self.tokens, value), shape)
        return self.taken[value]

    def _take_first(self, node: Node) -> None:
        """The first tokens are where the sequences start."""
        ends = (self.tokens.batch,)
        attrs = {"axes": (0,), "starts": (0,), "ends": ends, "steps": (1,)}
        first = self.graph.add("slice", [self.tokens.starts], attrs, name="first_tokens")
        operands = [self.new[node.input(0)], first]
        taken = self.graph.add("gather", operands, {"axis": 1}, name=node.name)
        self.graph.replace_uses(node.output, _reshape(self.graph, taken, node.output.type.shape))

    def _read_rows(self, node: Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value in self.new:
                self.graph.replace_input(node, index, self._unpacked(value))

    def _unpacked(self, value: Value) -> Value:
        if value not in self.rows:
            packed, rest = self.new[value], value.type.shape[2:]
            flat = _reshape(self.graph, packed, (1, self.tokens.count, product(rest)))
            operands = [flat, self.tokens.index, self.tokens.place]
            made = self.graph.add("unpack_tokens", operands, name=f"{value.name}.unpack")
            self.rows[value] = _reshape(self.graph, made, value.type.shape)
        return self.rows[value]


def _ids_of(node: Node) -> range:
    """Which operands of an embedding are ids: each before its table, which in int8 has scales."""
    return range(0, len(node.inputs), 3 if node.op == "embedding_int8" else 2)


def _take(graph: Graph, tokens: _Tokens, value: Value) -> Value:
    """[batch, seq, ...] -> [tokens, ...]"""
    flat = _reshape(graph, value, (tokens.batch * tokens.seq, *value.type.shape[2:]))
    return graph.add("gather", [flat, tokens.index], {"axis": 0}, name=value.name)


def _reshape(graph: Graph, value: Value, shape: tuple[Dim, ...]) -> Value:
    if value.type.shape == shape:
        return value
    sizes = [d for d in shape if isinstance(d, int)]
    if value.data is not None and len(sizes) == len(shape):
        return graph.add_constant(value.data.reshape(sizes), value.name)
    return graph.add("reshape", [value], {"shape": shape}, name=value.name)
