"""Replace look-ups in constant tables, and their sum, by one op.

gather(words, ids) + gather(types, type_ids) + positions[0:seq]
    ->   embedding(ids, words, type_ids, types, iota, positions)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from sparsec.ir.dims import Dim, product
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.op_helpers import broadcast
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
    read_once,
)

Shape = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class FuseEmbedding:
    """Tables are fp32 constants [rows, channels]."""

    name: str = "fuse_embedding"

    def run(self, graph: Graph) -> PassResult:
        return apply_rules(graph, [Lookup(), SumOfLookups(graph)])


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of `table`: by `ids`, or in order from `start` when there are none.

    `shape` is the shape of the ids. A table that was not two-dimensional is reshaped.
    """

    table: Value
    shape: Shape
    ids: Value | None = None
    start: Dim = 0

    def without_broadcast(self) -> Part:
        """The same rows, by the ids before they were broadcast."""
        node = None if self.ids is None else self.ids.producer
        if node is None or node.op != "broadcast_to":
            return self
        source = node.input(0)
        shape = (1,) * (len(self.shape) - source.type.rank) + source.type.shape
        return replace(self, ids=source, shape=shape)

    def build(self, dtype: DType, g: Builder) -> tuple[Value, Value]:
        ids, table = self.ids, self.table
        if ids is None:
            ids = g.iota(start=self.start, step=1, length=product(self.shape), dtype=dtype)
        if ids.type.dtype is not dtype:
            ids = g.cast(ids, to=dtype)
        if ids.type.shape != self.shape:
            ids = g.reshape(ids, shape=self.shape)
        if table.type.rank != 2:
            assert table.data is not None
            data = table.data.reshape(-1, table.data.shape[-1])
            table = g.constant(data, g.graph.base_name(table.name))
        return ids, table


class Lookup(RewriteRule):
    """gather(table, ids[batch, seq])  ->  embedding(ids, table)"""

    def pattern(self, p: Pattern) -> Term:
        return p.gather(p.constant(_is_table, bind="table"), "ids")

    def check(self, m: Match) -> Reject | None:
        if m.root.attrs["axis"] != 0:
            return Reject("it selects columns")
        return None if m["ids"].type.rank == 2 else Reject(f"{m['ids'].type} is not batch x seq")

    def rewrite(self, m: Match, g: Builder) -> Value:
        return g.embedding(m["ids"], m["table"])


@dataclass(frozen=True, slots=True)
class SumOfLookups(RewriteRule):
    """add(embedding(a, t), embedding(b, u))  ->  embedding(a, t, b, u); also rows in order"""

    graph: Graph

    def pattern(self, p: Pattern) -> Term:
        return p.add(p.embedding("ids", "table", bind="a"), "b")

    def check(self, m: Match) -> Reject | None:
        if not read_once(m["a"], self.graph.outputs):
            return Reject("the look-up is read elsewhere")
        if not m["b"].is_constant and not read_once(m["b"], self.graph.outputs):
            return Reject("the other summand is read elsewhere")
        parts = read_parts(m["b"])
        if isinstance(parts, Reject):
            return parts
        if parts[0].table.type.shape[-1] != m["table"].type.shape[-1]:
            return Reject("the tables differ in channels")
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        parts: list[Part] = []
        for value in (m.root.input(0), m.root.input(1)):  # in the order of the sum
            read = read_parts(value)
            assert not isinstance(read, Reject)
            parts += read
        dtypes = {p.ids.type.dtype for p in parts if p.ids is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 else DType.I64
        narrow = [part.without_broadcast() for part in parts]
        if broadcast([p.shape for p in narrow]) == m.root.output.type.shape[:-1]:
            parts = narrow  # the op broadcasts its ids itself
        pairs = [value for part in parts for value in part.build(dtype, g)]
        return g.embedding(*pairs)


def read_parts(value: Value) -> list[Part] | Reject:
    """The look-ups whose sum `value` is, or why it is none."""
    if value.data is not None:
        return _read_constant(value)
    node = value.producer
    read = None if node is None else _READERS.get(node.op)
    if node is None or read is None:
        return Reject(f"%{value.name} is not rows of a constant table")
    return read(node)


def _read_embedding(node: Node) -> list[Part] | Reject:
    values = [node.input(i) for i in range(len(node.inputs))]
    pairs = zip(values[::2], values[1::2], strict=True)
    return [Part(table, ids.type.shape, ids) for ids, table in pairs]


def _read_gather(node: Node) -> list[Part] | Reject:
    table, ids = node.input(0), node.input(1)
    if not _is_constant_table(table) or node.attrs["axis"] != 0:
        return Reject(f"{node.name} is not rows of a constant table")
    return [Part(table, ids.type.shape, ids)]


def _read_constant(value: Value) -> list[Part] | Reject:
    """A constant [1, ..., rows, channels] is its own rows in order."""
    type = value.type
    if type.dtype is not DType.F32 or type.rank < 2 or any(d != 1 for d in type.shape[:-2]):
        return Reject(f"the constant {type} is not [rows, channels]")
    return [Part(value, type.shape[:-1])]


def _read_slice(node: Node) -> list[Part] | Reject:
    """Consecutive rows of a table."""
    attrs, table = node.attrs, node.input(0)
    if not _is_constant_table(table) or attrs["axes"] != (0,) or attrs["steps"] != (1,):
        return Reject(f"{node.name} is not consecutive rows of a constant table")
    return [Part(table, node.output.type.shape[:-1], start=attrs["starts"][0])]


def _read_reshape(node: Node) -> list[Part] | Reject:
    """Axes of the ids may be split or merged, the channels stay."""
    parts, shape = read_parts(node.input(0)), node.output.type.shape
    if isinstance(parts, Reject):
        return parts
    if len(parts) != 1 or not shape or shape[-1] != node.input(0).type.shape[-1]:
        return Reject(f"{node.name} does not keep the channels of one look-up")
    return [replace(parts[0], shape=shape[:-1])]


def _is_table(data: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bool:
    return data.ndim == 2 and data.dtype == np.float32


def _is_constant_table(value: Value) -> bool:
    return value.data is not None and _is_table(value.data)


_READERS: Mapping[str, Callable[[Node], list[Part] | Reject]] = {
    "embedding": _read_embedding,
    "gather": _read_gather,
    "slice": _read_slice,
    "reshape": _read_reshape,
}
