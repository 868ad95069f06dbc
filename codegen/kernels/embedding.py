"""`embedding`: the sum of one row of each table per token, written as planar panels.

`embedding_int8` has tables of int8 too, with a scale per row: they come behind the fp32 ones and
are added with one multiply-add each.

One item is a group of 16 tokens. All its ids are checked before a table is read: an id outside
`[-rows, rows)` ends the kernel with status 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, by_name
from sparsec.codegen.isa.vector import keep, ramp, splat, transpose
from sparsec.codegen.kernels.base import Binder, TirKernel, vector_schedules
from sparsec.codegen.kernels.layout_change import lanes_below
from sparsec.codegen.kernels.panels import GROUP, WIDTH, div, is_planar, loop, mod
from sparsec.codegen.program import Arg, Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import Dim, ceildiv
from sparsec.ir.graph import Node, Value
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

INDEX_OUT_OF_RANGE = 1  # status of sparsec.h
ID_TYPES = (DType.I64, DType.I32)
MAX_TABLES = 3


@dataclass(frozen=True, slots=True)
class Embedding(TirKernel):
    """`ids` holds the dtype of each table's ids; the last `int8_tables` tables are int8."""

    vector: VectorIsa
    ids: tuple[DType, ...]
    int8_tables: int = 0

    @property
    def name(self) -> str:
        kinds = [f"{d.short}{'_i8' * self._is_int8(t)}" for t, d in enumerate(self.ids)]
        return f"embedding_f32_{'_'.join(kinds)}_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Per table: ids, table, its rows, and the steps of the ids per batch row and token.

        An int8 table has its scales, one per row, and its zero point behind the table.
        """
        found: list[Parameter] = []
        for i, dtype in enumerate(self.ids):
            found.append(Parameter(f"ids{i}", dtype=dtype.value))
            if self._is_int8(i):
                found += [Parameter(f"table{i}", dtype="int8"), Parameter(f"scale{i}")]
                found.append(Parameter(f"zero_point{i}", Kind.INT))
            else:
                found.append(Parameter(f"table{i}"))
            sizes = (f"rows{i}", f"batch_step{i}", f"token_step{i}")
            found += [Parameter(n, Kind.INT) for n in sizes]
        sizes = ("tokens", "seq", "channels")
        return (*found, Parameter("y"), *(Parameter(n, Kind.INT) for n in sizes))

    def _body(self, s: tir.KernelScope) -> None:
        n, channels = self.vector.lanes, s["channels"]
        starts = [T.alloc_buffer((GROUP,), "int64", scope="global") for _ in self.ids]
        scales = [T.alloc_buffer((GROUP,), "float32", scope="global") for _ in self.ids]
        with loop(s.begin, s.end) as item:
            with loop(0, GROUP) as lane:
                self._find_rows(s, item * GROUP + lane, lane, starts, scales)
            for offset in range(0, GROUP, n):
                token = keep(item * GROUP + offset)
                column = keep(div(token, WIDTH) * channels * WIDTH + mod(token, WIDTH))
                present = lanes_below(s["tokens"] - token, n)
                with loop(0, div(channels, n)) as block:
                    channel = keep(block * n)
                    rows = [self._sum(s, starts, scales, offset + i, channel, n) for i in range(n)]
                    for i, value in enumerate(transpose(rows)):
                        kept = T.Select(present, value, splat(0.0, n))
                        T.buffer_store(s["y"], kept, [ramp(column + (channel + i) * WIDTH, n)])
                with loop(div(channels, n) * n, channels) as c, loop(0, n) as i:
                    total = self._sum(s, starts, scales, offset + i, c, 1)
                    value = T.Select(token + i < s["tokens"], total, T.float32(0))
                    T.buffer_store(s["y"], value, [column + c * WIDTH + i])

    def _is_int8(self, table: int) -> bool:
        return table >= len(self.ids) - self.int8_tables

    def _find_rows(
        self, s: tir.KernelScope, token: Any, lane: Any, starts: list[Any], scales: list[Any]
    ) -> None:
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
            if self._is_int8(t):
                T.buffer_store(scales[t], s[f"scale{t}"][row], [lane])

    def _sum(
        self,
        s: tir.KernelScope,
        starts: list[Any],
        scales: list[Any],
        lane: Any,
        channel: Any,
        lanes: int,
    ) -> Any:
        """`lanes` neighbouring channels from `channel` of one token."""
        many = f"x{lanes}" if lanes > 1 else ""
        total = None
        for t in range(len(self.ids)):
            at = starts[t][lane] + channel
            value = s[f"table{t}"][ramp(at, lanes) if many else at]
            if self._is_int8(t):
                scale, zero_point = scales[t][lane], T.cast(s[f"zero_point{t}"], "int32")
                if many:
                    scale, zero_point = splat(scale, lanes), T.broadcast(zero_point, lanes)
                centred = T.cast(value, f"int32{many}") - zero_point
                value = T.cast(centred, f"float32{many}") * scale
            total = value if total is None else total + value
        return keep(total)


@dataclass(frozen=True, slots=True)
class Part:
    """One table of a node, with the ids of its rows; `scale` is that of an int8 table."""

    ids: Value
    table: Value
    scale: Value | None = None
    zero_point: int = 0


class EmbeddingFamily:
    """Up to three tables, ids `[batch, seq]` or broadcast to it."""

    ops = ("embedding", "embedding_int8")

    def workload(self, node: Node) -> Workload:
        parts, shape = _parts(node), node.output.type.shape[:-1]
        known = all(_steps(p.ids, shape) is not None for p in parts)
        dtypes = [str(p.ids.type.dtype) for p in parts] if known else ["broadcast"]
        sizes = (("c", node.output.type.channels), ("tables", len(parts)))
        return Workload(node.op, sizes, str(node.output.type.dtype), epilogue=" ".join(dtypes))

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        known = all(d in map(str, ID_TYPES) for d in workload.epilogue.split())
        fits = workload.size("tables") <= MAX_TABLES and workload.dtype == str(DType.F32)
        return vector_schedules("embedding", target) if known and fits else []

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        parts, y = _parts(node), node.output
        assert is_planar(y.type), node
        count = sum(p.scale is not None for p in parts)
        assert all(p.scale is not None for p in parts[len(parts) - count :]), node
        dtypes = tuple(p.ids.type.dtype for p in parts)
        kernel = Embedding(by_name(schedule.isa), dtypes, count)
        shape = y.type.shape[:-1]
        seq: Dim = shape[-1] if shape else 1
        args: list[Arg] = []
        for p in parts:
            steps = _steps(p.ids, shape)
            assert steps is not None, node
            args += [binder.ref(p.ids), binder.ref(p.table)]
            args += [] if p.scale is None else [binder.ref(p.scale), p.zero_point]
            args += [p.table.type.shape[0], *steps]
        args += [binder.ref(y), y.type.tokens, seq, y.type.channels]
        return [
            KernelCall(
                kernel,
                tuple(args),
                ceildiv(y.type.tokens, GROUP),
                f"{node.name}: {len(parts)} tables ({count} int8), {y.type.channels} channels",
                grain=4,
            )
        ]

    def variants(self) -> list[Kernel]:
        return [
            Embedding(v, (dtype,) * count, int8_tables)
            for v in VECTOR_ISAS
            for count in range(1, MAX_TABLES + 1)
            for int8_tables in range(count + 1)
            for dtype in ID_TYPES
        ]


def _parts(node: Node) -> list[Part]:
    if node.op == "embedding":
        count = len(node.inputs) // 2
        return [Part(node.input(2 * i), node.input(2 * i + 1)) for i in range(count)]
    return [
        Part(node.input(3 * i), node.input(3 * i + 1), node.optional_input(3 * i + 2), zero_point)
        for i, zero_point in enumerate(node.attrs["zero_points"])
    ]


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
