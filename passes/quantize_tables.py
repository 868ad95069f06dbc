"""Store large embedding tables in int8, with a scale per row.

embedding(types, kinds, ids, words)
    ->   embedding_int8(types, kinds, _, ids, words in i8, scale per row of words)

A run touches a few rows, but the kernel maps whole pages around each of them, so that the pages
of a table in fp32 are most of what a model has resident. A table that the model itself has in
bytes keeps its numbers, scales and zero point. A row of other tables is rounded to 127 steps of
each sign, unless the model is to be rounded only where its file does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.op_spec import Array
from sparsec.passes.base import PassResult
from sparsec.passes.keep_fp32 import kept
from sparsec.passes.quantize import LOSES, quantize_weight
from sparsec.passes.rewrite import replace_node

LARGE_BYTES = 4 << 20  # of fp32: below, less than 3 MB could be saved


@dataclass(frozen=True, slots=True)
class QuantizeTables:
    """`supported` says whether a kernel computes an embedding on the target.

    `fallback` names embeddings that stay fp32, and with `only_own` all tables do that the model
    itself has not in bytes.
    """

    keep_fp32: tuple[str, ...] = ()
    supported: Callable[[Node], bool] = lambda node: True
    large_bytes: int = LARGE_BYTES
    fallback: frozenset[str] = frozenset()
    only_own: bool = False
    name: str = "quantize_tables"

    def run(self, graph: Graph) -> PassResult:
        rewriting = _Quantizing(graph)
        notes: list[str] = []
        changed = 0
        for node in [n for n in graph.nodes if n.op == "embedding"]:
            refusals = self.refusals(node)
            chosen = [t for t, refusal in refusals.items() if refusal is None]
            notes += [f"%{t.name} stays fp32: {r}" for t, r in refusals.items() if r is not None]
            if chosen:
                rewriting.visit(node, chosen)
                notes += [f"%{t.name} is stored in int8: {_whose(t)}" for t in chosen]
                changed += len(chosen)
        graph.sort()
        graph.drop_dead_nodes()
        return PassResult(changed, tuple(notes))

    def refusals(self, node: Node) -> dict[Value, str | None]:
        """The large tables of an embedding, and why they stay fp32; None for int8."""
        tables = [node.input(i) for i in range(1, len(node.inputs), 2)]
        return {t: self._refusal(node, t) for t in tables if self._is_large(t)}

    def _is_large(self, table: Value) -> bool:
        return table.data is not None and table.data.nbytes >= self.large_bytes

    def _refusal(self, node: Node, table: Value) -> str | None:
        if node.name in self.fallback:
            return LOSES
        if (by_name := kept(node, self.keep_fp32)) is not None:
            return f"{node.name}: {by_name}"
        if not self.supported(node):
            return f"no kernel computes {node.name} on this target"
        others = [n.name for n, _ in table.uses if n.op != "embedding"]
        if others:
            return f"{others[0]} reads it too"
        if self.only_own and _own(table) is None:
            return "all roundings are those of the file, which has it in fp32"
        assert table.data is not None, table
        return None if np.isfinite(table.data).all() else "it is not finite"


@dataclass(slots=True)
class _Quantizing:
    """A table is stored once, however many look-ups read it."""

    graph: Graph
    stored: dict[Value, tuple[Value, Value, int]] = field(default_factory=dict)

    def visit(self, node: Node, chosen: list[Value]) -> None:
        """The fp32 tables first, as the kernels sum them."""
        pairs = [(node.input(i), node.input(i + 1)) for i in range(0, len(node.inputs), 2)]
        operands: list[Value | None] = []
        zero_points = []
        for ids, table in sorted(pairs, key=lambda pair: pair[1] in chosen):
            data, scale, zero_point = self._stored(table) if table in chosen else (table, None, 0)
            operands += [ids, data, scale]
            zero_points.append(zero_point)
        attrs = {"zero_points": tuple(zero_points)}
        replace_node(self.graph, node, "embedding_int8", operands, attrs)

    def _stored(self, table: Value) -> tuple[Value, Value, int]:
        if table not in self.stored:
            data, scale, zero_point = numbers(table)
            stored = self.graph.add_constant(data, f"{table.name}.i8")
            scales = self.graph.add_constant(scale, f"{table.name}.scale")
            self.stored[table] = stored, scales, zero_point
        return self.stored[table]


def _whose(table: Value) -> str:
    return "rounded, a scale per row" if _own(table) is None else "the model's own numbers"


def numbers(table: Value) -> tuple[Array, Array, int]:
    """i8[rows, channels], f32 scale per row and zero point that make up a table.

    Those of a table that was quantised are found again exactly: it was computed as
    number * scale with one rounding to fp32, off by less than half a number. Numbers that are u8
    less their own zero point span 255, so that they fit i8 around a zero point of ours.
    """
    own = _own(table)
    if own is None:
        assert table.data is not None, table
        return (*quantize_weight(table.data), 0)
    return own


def _own(table: Value) -> tuple[Array, Array, int] | None:
    data, quant = table.data, table.type.quant
    assert data is not None, table
    if quant is None or quant.axis == 1:
        return None
    scale = np.broadcast_to(np.asarray(quant.scale, np.float32), data.shape[:1])
    steps = np.rint(data / scale[:, None])
    low, high = int(steps.min(initial=0)), int(steps.max(initial=0))
    if high - low > 255:  # a zero point per row
        return None
    zero_point = 0 if low >= -128 and high <= 127 else -128 - low
    return (steps + zero_point).astype(np.int8), np.ascontiguousarray(scale), zero_point
