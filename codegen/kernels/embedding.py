"""`embedding`: the sum of one row of each table per token, written as planar panels.

One item is a group of 16 tokens. All its ids are checked before a table is read: an id outside
`[-rows, rows)` ends the kernel with status 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, best_vector_isa, by_name
from sparsec.codegen.isa.vector import keep, ramp, splat, transpose
from sparsec.codegen.kernels.base import Binder
from sparsec.codegen.kernels.layout_change import lanes_below
from sparsec.codegen.kernels.panels import GROUP, WIDTH, div, is_planar, loop, mod
from sparsec.codegen.program import Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import Dim, ceildiv
from sparsec.ir.graph import Node, Value
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

INDEX_OUT_OF_RANGE = 1  # status of sparsec.h
ID_TYPES = (DType.I64, DType.I32)
MAX_TABLES = 3


@dataclass(frozen=True, slots=True)
class Embedding:
    """`ids` holds the dtype of each table's ids."""

    vector: VectorIsa
    ids: tuple[DType, ...]

    @property
    def name(self) -> str:
        return f"embedding_f32_{'_'.join(d.short for d in self.ids)}_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Per table: ids, table, its rows, and the steps of the ids per batch row and token."""
        found: list[Parameter] = []
        for i, dtype in enumerate(self.ids):
            found += [Parameter(f"ids{i}", dtype=dtype.value), Parameter(f"table{i}")]
            sizes = (f"rows{i}", f"batch_step{i}", f"token_step{i}")
            found += [Parameter(n, Kind.INT) for n in sizes]
        sizes = ("tokens", "seq", "channels")
        return (*found, Parameter("y"), *(Parameter(n, Kind.INT) for n in sizes))

    @property
    def has_scratch(self) -> bool:
        return False

    @property
    def isa(self) -> str:
        return self.vector.name

    def build(self) -> Any:
        return tir.kernel_function(self.name, self.parameters, self._body)

    def _body(self, s: tir.KernelScope) -> None:
        n, channels = self.vector.lanes, s["channels"]
        starts = [T.alloc_buffer((GROUP,), "int64", scope="global") for _ in self.ids]
        with loop(s.begin, s.end) as item:
            with loop(0, GROUP) as lane:
                self._find_rows(s, item * GROUP + lane, lane, starts)
            for offset in range(0, GROUP, n):
                token = keep(item * GROUP + offset)
                column = keep(div(token, WIDTH) * channels * WIDTH + mod(token, WIDTH))
                present = lanes_below(s["tokens"] - token, n)
                with loop(0, div(channels, n)) as block:
                    channel = keep(block * n)
                    rows = [self._row(s, starts, offset + i, channel) for i in range(n)]
                    for i, value in enumerate(transpose(rows)):
                        kept = T.Select(present, value, splat(0.0, n))
                        T.buffer_store(s["y"], kept, [ramp(column + (channel + i) * WIDTH, n)])
                with loop(div(channels, n) * n, channels) as c, loop(0, n) as i:
                    parts = [s[f"table{t}"][starts[t][offset + i] + c] for t in self._tables]
                    value = T.Select(token + i < s["tokens"], sum(parts[1:], parts[0]),
                                     T.float32(0))  # fmt: skip
                    T.buffer_store(s["y"], value, [column + c * WIDTH + i])

    @property
    def _tables(self) -> range:
        return range(len(self.ids))

    def _find_rows(self, s: tir.KernelScope, token: Any, lane: Any, starts: list[Any]) -> None:
        """Where the rows of one token start; lanes past the last token repeat it."""
        token = keep(T.min(token, s["tokens"] - 1))
        for t, start in enumerate(starts):
            row, place = div(token, s["seq"]), mod(token, s["seq"])
            step = row * s[f"batch_step{t}"] + place * s[f"token_step{t}"]
            given = keep(T.cast(s[f"ids{t}"][step], "int64"))
            row = keep(T.Select(given < 0, given + s[f"rows{t}"], given))
            with T.If(T.Or(row < 0, row >= s[f"rows{t}"])), T.Then():
                tir.fail(INDEX_OUT_OF_RANGE)
            T.buffer_store(start, row * s["channels"], [lane])

    def _row(self, s: tir.KernelScope, starts: list[Any], lane: int, channel: Any) -> Any:
        n = self.vector.lanes
        parts = [s[f"table{t}"][ramp(starts[t][lane] + channel, n)] for t in self._tables]
        return keep(sum(parts[1:], parts[0]))


class EmbeddingFamily:
    """Up to three tables, ids `[batch, seq]` or broadcast to it."""

    ops = ("embedding",)

    def workload(self, node: Node) -> Workload:
        pairs, shape = _pairs(node), node.output.type.shape[:-1]
        known = all(_steps(ids, shape) is not None for ids, _ in pairs)
        dtypes = [str(ids.type.dtype) for ids, _ in pairs] if known else ["broadcast"]
        return Workload("embedding", (("c", node.output.type.channels), ("tables", len(pairs))),
                        str(node.output.type.dtype), epilogue=" ".join(dtypes))  # fmt: skip

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        known = all(d in map(str, ID_TYPES) for d in workload.epilogue.split())
        fits = workload.size("tables") <= MAX_TABLES and workload.dtype == str(DType.F32)
        if best_vector_isa(target) is None or not known or not fits:
            return []
        return [Schedule("embedding", v.name) for v in reversed(VECTOR_ISAS) if target.has(v.isa)]

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        pairs, y = _pairs(node), node.output
        assert is_planar(y.type), node
        kernel = Embedding(by_name(schedule.isa), tuple(i.type.dtype for i, _ in pairs))
        shape = y.type.shape[:-1]
        seq: Dim = shape[-1] if shape else 1
        args = []
        for ids, table in pairs:
            steps = _steps(ids, shape)
            assert steps is not None, node
            args += [binder.ref(ids), binder.ref(table), table.type.shape[0], *steps]
        args += [binder.ref(y), y.type.tokens, seq, y.type.channels]
        return [
            KernelCall(
                kernel,
                tuple(args),
                ceildiv(y.type.tokens, GROUP),
                f"{node.name}: {len(pairs)} tables, {y.type.channels} channels",
                grain=4,
            )
        ]

    def variants(self) -> list[Kernel]:
        return [
            Embedding(v, (dtype,) * count)
            for v in VECTOR_ISAS
            for count in range(1, MAX_TABLES + 1)
            for dtype in ID_TYPES
        ]


def _pairs(node: Node) -> list[tuple[Value, Value]]:
    return [(node.input(i), node.input(i + 1)) for i in range(0, len(node.inputs), 2)]


def _steps(ids: Value, shape: tuple[Dim, ...]) -> tuple[Dim, Dim] | None:
    """Elements between batch rows and between tokens, as ids of this shape are broadcast."""
    own = (1,) * (len(shape) - ids.type.rank) + ids.type.shape
    if own == shape:
        return (shape[-1], 1) if shape else (0, 0)
    if any(d != 1 for d in own[:-2]) or len(shape) > 2:
        return None
    seq = own[-1]
    batch = own[-2] if len(own) > 1 else 1
    if seq not in (1, shape[-1]) or batch not in (1, shape[0]):
        return None
    return (0 if batch == 1 else seq), (0 if seq == 1 else 1)
