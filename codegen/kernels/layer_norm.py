"""`layer_norm` over token panels: statistics per lane, no horizontal step.

One item is a group of 16 tokens: their mean and deviation in one pass, the result in another.
With a quantised copy of the result one item is a panel: its bytes are a cache line per channel.
A copy in bf16 is written two channels at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, by_name
from sparsec.codegen.isa.bf16 import AVX512_BF16, pairs_of
from sparsec.codegen.isa.pack8 import Packer
from sparsec.codegen.isa.vector import keep, ramp, splat
from sparsec.codegen.kernels.base import Binder, TirKernel, same_memory, vector_schedules
from sparsec.codegen.kernels.panels import (
    GROUP,
    WIDTH,
    div,
    groups_in_panel,
    is_planar,
    loop,
    mod,
)
from sparsec.codegen.kernels.quantize import inverse_of
from sparsec.codegen.program import Arg, Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import ceildiv
from sparsec.ir.graph import Node
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

RESULTS = ("f32", "f32_u8", "u8")
BF16_RESULTS = ("f32_bf16", "bf16")


@dataclass(frozen=True, slots=True)
class LayerNorm(TirKernel):
    """One instruction set, with or without a residual, a beta, and a factor of the u8 copy.

    `result` is "f32", "f32_u8" (fp32 and its quantised copy) or "u8" (the copy alone); "f32_bf16"
    and "bf16" are those with a copy in bf16, of an even number of channels. `in_place`: the fp32
    result is written over x, whose lines are in L1 then: 0.72 of the time where both are in L2.
    """

    vector: VectorIsa
    has_residual: bool
    has_beta: bool
    result: str = "f32"
    has_factor: bool = False
    in_place: bool = False

    @property
    def name(self) -> str:
        parts = ["residual"] * self.has_residual + ["beta"] * self.has_beta
        parts += ["factor"] * self.has_factor + ["over"] * self.in_place
        parts += [] if self.result == "f32" else ["to", self.result]
        return "_".join(["layer_norm_f32", *parts, self.isa])

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        pointers = ["x", *["residual"] * self.has_residual, "gamma", *["beta"] * self.has_beta]
        pointers += ["factor"] * self.has_factor + ["y"] * self.has_y
        sizes = [Parameter("channels", Kind.INT), Parameter("epsilon", Kind.FLOAT)]
        if self.has_bytes:
            sizes = [Parameter("bytes", dtype="uint8"), Parameter("tokens", Kind.INT), *sizes]
            sizes += [Parameter("inverse", Kind.FLOAT), Parameter("zero_point", Kind.INT)]
        if self.has_pairs:
            sizes = [Parameter("pairs", dtype="int32"), *sizes]
        return (*(Parameter(n) for n in pointers), *sizes)

    @property
    def has_floats(self) -> bool:
        """Whether the fp32 result is stored."""
        return self.result.startswith("f32")

    @property
    def has_y(self) -> bool:
        """Whether the fp32 result has memory of its own."""
        return self.has_floats and not self.in_place

    @property
    def target(self) -> str:
        """The parameter to whose memory the fp32 result goes."""
        return "x" if self.in_place else "y"

    @property
    def has_bytes(self) -> bool:
        """Whether the quantised result is stored."""
        return self.result.endswith("u8")

    @property
    def has_pairs(self) -> bool:
        """Whether the result in bf16 is stored."""
        return self.result.endswith("bf16")

    def _body(self, s: tir.KernelScope) -> None:
        body = self._panels if self.has_bytes else self._groups
        body(s)

    def _groups(self, s: tir.KernelScope) -> None:
        per_panel, lanes = WIDTH // GROUP, self.vector.lanes
        with loop(s.begin, s.end) as item:
            panel, group = div(item, per_panel), mod(item, per_panel)
            start = keep(panel * s["channels"] * WIDTH + group * GROUP)
            for offset in range(0, GROUP, lanes):
                (statistics,) = self._statistics(s, [start + offset])
                if self.has_pairs:
                    self._in_pairs(s, start, statistics)
                    continue
                with loop(0, s["channels"]) as c:
                    at = ramp(start + offset + c * WIDTH, lanes)
                    T.buffer_store(s[self.target], self._normalised(s, at, c, statistics), [at])

    def _in_pairs(self, s: tir.KernelScope, start: Any, statistics: tuple[Any, Any]) -> None:
        """The result of a group from `start` on, two channels at a time."""
        lanes = self.vector.lanes
        first = keep(div(start, 2 * WIDTH) * WIDTH + mod(start, WIDTH))  # of an even row
        with loop(0, div(s["channels"], 2)) as pair:
            both = []
            for part in (0, 1):
                c = keep(pair * 2 + part)
                at = ramp(start + c * WIDTH, lanes)
                both.append(keep(self._normalised(s, at, c, statistics)))
                if self.has_floats:
                    T.buffer_store(s[self.target], both[part], [at])
            T.buffer_store(s["pairs"], pairs_of(*both), [ramp(first + pair * WIDTH, lanes)])

    def _panels(self, s: tir.KernelScope) -> None:
        lanes = self.vector.lanes
        packer = Packer.of(self.vector, "uint8", s["inverse"], s["zero_point"])
        chunk = 4 * lanes  # tokens whose bytes are one store
        with loop(s.begin, s.end) as panel:
            tokens = keep(groups_in_panel(s["tokens"], panel) * GROUP)
            start = keep(panel * s["channels"] * WIDTH)
            whole = keep(div(tokens, chunk))
            for first, last, width in (
                (0, whole, chunk),
                (whole * (chunk // GROUP), div(tokens, GROUP), GROUP),
            ):
                with loop(first, last) as i:
                    at = [keep(start + i * width + j) for j in range(0, width, lanes)]
                    self._quantised(s, packer, at[0], self._statistics(s, at))

    def _quantised(
        self, s: tir.KernelScope, packer: Packer, start: Any, statistics: list[tuple[Any, Any]]
    ) -> None:
        """The result of neighbouring vectors of tokens, in both forms."""
        lanes = self.vector.lanes
        with loop(0, s["channels"]) as c:
            row = keep(start + c * WIDTH)
            at = [ramp(row + i * lanes, lanes) for i in range(len(statistics))]
            values = [
                keep(self._normalised(s, a, c, m)) for a, m in zip(at, statistics, strict=True)
            ]
            if self.has_floats:
                for a, value in zip(at, values, strict=True):
                    T.buffer_store(s[self.target], value, [a])
            if self.has_factor:
                values = [keep(value * splat(s["factor"][c], lanes)) for value in values]
            T.buffer_store(s["bytes"], packer.bytes_of(values), [ramp(row, lanes * len(at))])

    def _statistics(self, s: tir.KernelScope, starts: list[Any]) -> list[tuple[Any, Any]]:
        """The mean and 1 / deviation of each lane of the vectors at `starts`.

        One pass: a block of channels stays in registers for its own mean and squared differences,
        which are merged into those of the channels before it (Chan's formula).
        """
        n = self.vector.lanes
        at, size = ramp(0, n), n  # as many channels to a block as lanes: half of the registers
        running = [_Running(n) for _ in starts]
        blocks = keep(div(s["channels"], size))
        with loop(0, blocks) as block:
            count = keep(T.cast(block, "float32"))
            share = keep(T.float32(1.0) / (count + T.float32(1.0)))
            weight = keep(count * T.float32(size) * share)
            for start, state in zip(starts, running, strict=True):
                values = [
                    self._source(s, ramp(start + (block * size + i) * WIDTH, n))
                    for i in range(size)
                ]
                middle = keep(_total(values) * splat(1.0 / size, n))
                differences = [keep(v - middle) for v in values]
                spread = _total([keep(d * d) for d in differences])
                state.merge(middle, spread, share, weight)
        with loop(blocks * size, s["channels"]) as c:
            count = keep(T.cast(c, "float32"))
            share = keep(T.float32(1.0) / (count + T.float32(1.0)))
            for start, state in zip(starts, running, strict=True):
                value = self._source(s, ramp(start + c * WIDTH, n))
                state.merge(value, splat(0.0, n), share, keep(count * share))
        inverse = splat(T.float32(1.0) / T.cast(s["channels"], "float32"), n)
        result = []
        for state in running:
            variance = state.squares[at] * inverse
            deviation = keep(T.sqrt(variance + splat(s["epsilon"], n)))
            result.append((keep(state.mean[at]), keep(splat(1.0, n) / deviation)))
        return result

    @property
    def _keeps_sum(self) -> bool:
        """Whether x + residual waits in y for the second pass.

        Where bytes are stored too, adding again is faster than that store.
        """
        return self.has_residual and self.has_floats and not self.has_bytes

    def _source(self, s: tir.KernelScope, at: Any) -> Any:
        """A vector of x + residual, in the first pass."""
        value = self._sum(s, at)
        if self._keeps_sum:
            T.buffer_store(s[self.target], value, [at])
        return value

    def _sum(self, s: tir.KernelScope, at: Any) -> Any:
        return keep(s["x"][at] + s["residual"][at] if self.has_residual else s["x"][at])

    def _normalised(
        self, s: tir.KernelScope, at: Any, channel: Any, statistics: tuple[Any, Any]
    ) -> Any:
        n, (mean, scale) = self.vector.lanes, statistics
        total = s[self.target][at] if self._keeps_sum else self._sum(s, at)
        value = (total - mean) * scale * splat(s["gamma"][channel], n)
        return value + splat(s["beta"][channel], n) if self.has_beta else value


class _Running:
    """The mean of the channels so far, and the sum of their squared differences to it."""

    def __init__(self, lanes: int):
        self.lanes, self.at = lanes, ramp(0, lanes)
        self.mean, self.squares = (tir.registers("float32", lanes) for _ in range(2))
        for part in (self.mean, self.squares):
            T.buffer_store(part, splat(0.0, lanes), [self.at])

    def merge(self, mean: Any, squares: Any, share: Any, weight: Any) -> None:
        """Adds a block: `share` of the channels then; `weight` is share * the channels before."""
        delta = keep(mean - self.mean[self.at])
        between = keep(delta * delta) * splat(weight, self.lanes)
        merged = self.mean[self.at] + delta * splat(share, self.lanes)
        T.buffer_store(self.mean, merged, [self.at])
        T.buffer_store(self.squares, self.squares[self.at] + (squares + between), [self.at])


def _total(values: list[Any]) -> Any:
    """The sum, in pairs: a short chain of additions, and a small error."""
    while len(values) > 1:
        values = [keep(a + b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


class LayerNormFamily:
    """`layer_norm` in fp32, and with a quantised copy as its second output."""

    ops = ("layer_norm",)

    def workload(self, node: Node) -> Workload:
        parts = ["residual"] * (node.optional_input(3) is not None)
        parts += ["beta"] * (node.optional_input(2) is not None)
        parts += ["factor"] * (node.optional_input(4) is not None)
        parts += ["to", _result(node)] if _result(node) != "f32" else []
        x = node.input(0).type
        return Workload("layer_norm", (("c", x.channels),), str(x.dtype), epilogue=" ".join(parts))

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        if workload.dtype != str(DType.F32):
            return []
        if workload.epilogue.endswith("bf16"):
            isa = AVX512_BF16
            return [Schedule("layer_norm", isa.name)] if target.has(isa.isa) else []
        return vector_schedules("layer_norm", target)

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        x, gamma = node.input(0), node.input(1)
        beta, residual, factor = (node.optional_input(i) for i in (2, 3, 4))
        assert all(is_planar(v.type) for v in (x, node.outputs[0])), node
        result = _result(node)
        has = [v is not None for v in (residual, beta, factor)]
        over = result.startswith("f32") and same_memory(binder.ref(x), binder.ref(node.outputs[0]))
        kernel = LayerNorm(by_name(schedule.isa), has[0], has[1], result, has[2], over)
        copied = kernel.has_bytes or kernel.has_pairs
        stored = [v for v, has in zip(node.outputs, (kernel.has_y, copied), strict=False)
                  if has]  # fmt: skip
        operands = [v for v in (x, residual, gamma, beta, factor, *stored) if v is not None]
        args: list[Arg] = [binder.ref(v) for v in operands]
        args += [x.type.tokens] if kernel.has_bytes else []
        args += [x.type.channels, float(node.attrs["epsilon"])]
        if kernel.has_bytes:
            args += [inverse_of(node.attrs["out_scale"]), node.attrs.get("out_zero_point", 0)]
        return [
            KernelCall(
                kernel,
                tuple(args),
                ceildiv(x.type.tokens, WIDTH if kernel.has_bytes else GROUP),
                f"{node.name}: y = layer_norm(x), {x.type.channels} channels",
                grain=1 if kernel.has_bytes else 2,
                per_panel=1 if kernel.has_bytes else WIDTH // GROUP,
            )
        ]

    def variants(self) -> list[Kernel]:
        isas = [*((v, RESULTS) for v in VECTOR_ISAS), (AVX512_BF16, BF16_RESULTS)]
        return [
            LayerNorm(v, residual, beta, result, factor, over)
            for v, results in isas
            for residual in (False, True)
            for beta in (False, True)
            for result in results
            for factor in (False, True)
            for over in (False, True)
            if result.endswith("u8") or not factor
            if result.startswith("f32") or not over
        ]


def _result(node: Node) -> str:
    """What is stored. Graph outputs are rows, so what lies in panels and has no use is unread."""
    if len(node.outputs) == 1:
        return "f32"
    copy = "u8" if node.outputs[1].type.dtype is DType.U8 else "bf16"
    return f"f32_{copy}" if node.outputs[0].uses else copy
