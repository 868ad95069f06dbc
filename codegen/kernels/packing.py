"""`pack_tokens` and `unpack_tokens`: which tokens of a batch are computed, and back to rows."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, by_name
from sparsec.codegen.isa.vector import keep, ramp, splat, transpose
from sparsec.codegen.kernels.base import Binder, TirKernel, vector_schedules
from sparsec.codegen.kernels.panels import GROUP, WIDTH, const, div, is_planar, loop, mod
from sparsec.codegen.program import Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import ceildiv
from sparsec.ir.graph import Node
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Target

CLEAR_GRAIN = 64  # rows; most are real and not cleared


@dataclass(frozen=True, slots=True)
class PackTokens(TirKernel):
    """One item: the whole batch, as where a token goes depends on those before it."""

    vector: VectorIsa

    @property
    def name(self) -> str:
        return f"pack_tokens_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """`real`, `mask` and `place` are [batch, seq]; `count` is one value."""
        outputs = ("count", "index", "sequence_of", "starts", "place")
        return (
            Parameter("real", dtype="bool"),
            Parameter("mask"),
            *(Parameter(n, dtype="int64") for n in outputs),
            *(Parameter(n, Kind.INT) for n in ("batch", "seq", "keep_first")),
            Parameter("seen", Kind.FLOAT),
        )

    def _body(self, s: tir.KernelScope) -> None:
        count = tir.registers("int64", 1)
        seen = tir.registers("bool", 1)
        T.buffer_store(count, const(0), [0])
        with loop(s.begin, s.end), loop(0, s["batch"]) as sequence:
            row = keep(sequence * s["seq"])
            T.buffer_store(s["starts"], count[0], [sequence])
            T.buffer_store(seen, T.bool(False), [0])
            with loop(0, s["seq"]) as i:
                T.buffer_store(seen, T.Or(seen[0], s["mask"][row + i] >= s["seen"]), [0])
            with loop(0, s["seq"]) as i:
                real = keep(s["real"][row + i])
                first = T.And(i == 0, s["keep_first"] != 0)
                T.buffer_store(s["place"], T.Select(real, count[0], const(-1)), [row + i])
                with T.If(T.Or(T.Or(real, first), T.Not(seen[0]))), T.Then():
                    T.buffer_store(s["index"], row + i, [count[0]])
                    T.buffer_store(s["sequence_of"], sequence, [count[0]])
                    T.buffer_store(count, count[0] + 1, [0])
        T.buffer_store(s["starts"], count[0], [s["batch"]])
        T.buffer_store(s["count"], count[0], [0])


@dataclass(frozen=True, slots=True)
class UnpackTokens(TirKernel):
    """Packed panels to the rows of their tokens; one item is a group of 16 packed tokens."""

    vector: VectorIsa

    @property
    def name(self) -> str:
        return f"unpack_tokens_f32_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        sizes = (Parameter("tokens", Kind.INT), Parameter("channels", Kind.INT))
        return (Parameter("x"), Parameter("index", dtype="int64"), Parameter("y"), *sizes)

    def _body(self, s: tir.KernelScope) -> None:
        x, y, n, channels = s["x"], s["y"], self.vector.lanes, s["channels"]
        rows = [tir.registers("int64", 1) for _ in range(n)]  # where the tokens' rows start
        with loop(s.begin, s.end) as item:
            for offset in range(0, GROUP, n):
                token = keep(item * GROUP + offset)
                column = keep(div(token, WIDTH) * channels * WIDTH + mod(token, WIDTH))
                for i, row in enumerate(rows):
                    known = s["index"][T.min(token + i, s["tokens"] - 1)]
                    T.buffer_store(row, known * channels, [0])
                with loop(0, div(channels, n)) as block:
                    channel = keep(block * n)
                    lanes = [keep(x[ramp(column + (channel + c) * WIDTH, n)]) for c in range(n)]
                    for i, value in enumerate(transpose(lanes)):
                        with T.If(token + i < s["tokens"]), T.Then():
                            T.buffer_store(y, value, [ramp(rows[i][0] + channel, n)])
                with loop(div(channels, n) * n, channels) as channel:
                    for i, row in enumerate(rows):
                        with T.If(token + i < s["tokens"]), T.Then():
                            T.buffer_store(y, x[column + channel * WIDTH + i], [row[0] + channel])


@dataclass(frozen=True, slots=True)
class ClearPadding(TirKernel):
    """Zeros in the rows of tokens that have no place; one item is a row."""

    vector: VectorIsa

    @property
    def name(self) -> str:
        return f"clear_padding_f32_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("place", dtype="int64"), Parameter("y"), Parameter("channels", Kind.INT))

    def _body(self, s: tir.KernelScope) -> None:
        n, channels = self.vector.lanes, s["channels"]
        with loop(s.begin, s.end) as row, T.If(s["place"][row] < 0), T.Then():
            with loop(0, div(channels, n)) as block:
                T.buffer_store(s["y"], splat(0.0, n), [ramp(row * channels + block * n, n)])
            with loop(div(channels, n) * n, channels) as channel:
                T.buffer_store(s["y"], T.float32(0), [row * channels + channel])


class PackingFamily:
    """Both ops, in fp32."""

    ops = ("pack_tokens", "unpack_tokens")

    def workload(self, node: Node) -> Workload:
        x = node.input(0).type
        sizes = (("c", x.channels),) if node.op == "unpack_tokens" else ()
        return Workload(node.op, sizes, str(x.dtype))

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        return vector_schedules("packing", target)

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        vector = by_name(schedule.isa)
        if node.op == "unpack_tokens":
            return _lower_unpack(node, vector, binder)
        operands = [binder.ref(v) for v in (node.input(0), node.input(1), *node.outputs)]
        batch, seq = node.input(0).type.shape
        sizes = (batch, seq, int(node.attrs["keep_first"]))
        args = (*operands, *sizes, float(node.attrs["seen"]))
        return [KernelCall(PackTokens(vector), args, 1, f"{node.name}: the tokens to compute")]

    def variants(self) -> list[Kernel]:
        kinds = (PackTokens, UnpackTokens, ClearPadding)
        return [kind(vector) for kind in kinds for vector in VECTOR_ISAS]


def _lower_unpack(node: Node, vector: VectorIsa, binder: Binder) -> list[KernelCall]:
    """The rows of packed tokens first: some may be padding that another token had to read."""
    x, index, place = (binder.ref(node.input(i)) for i in range(3))
    assert is_planar(x.type), node
    y, channels = binder.ref(node.output), node.output.type.channels
    items = ceildiv(x.type.tokens, GROUP)
    text = f"{node.name}: {channels} channels"
    args = (x, index, y, x.type.tokens, channels)
    return [
        KernelCall(UnpackTokens(vector), args, items, text, grain=4),
        KernelCall(
            ClearPadding(vector),
            (place, y, channels),
            node.output.type.tokens,
            f"{node.name}: zeros in padding",
            grain=CLEAR_GRAIN,
        ),
    ]
