"""`layer_norm` over token panels: statistics per lane, no horizontal step.

One item is a group of 16 tokens: the mean, then the sum of squared differences, then the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, best_vector_isa, by_name
from sparsec.codegen.isa.vector import keep, ramp, splat
from sparsec.codegen.kernels.base import Binder
from sparsec.codegen.kernels.panels import GROUP, WIDTH, div, is_planar, loop, mod
from sparsec.codegen.program import Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import ceildiv
from sparsec.ir.graph import Node
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

UNROLL = 4  # channels added in parallel: the latency of an addition


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """One instruction set, with or without a residual and a beta."""

    vector: VectorIsa
    has_residual: bool
    has_beta: bool

    @property
    def name(self) -> str:
        parts = ["residual"] * self.has_residual + ["beta"] * self.has_beta
        return "_".join(["layer_norm_f32", *parts, self.isa])

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        pointers = ["x", *["residual"] * self.has_residual, "gamma", *["beta"] * self.has_beta]
        return (
            *(Parameter(n) for n in [*pointers, "y"]),
            Parameter("channels", Kind.INT),
            Parameter("epsilon", Kind.FLOAT),
        )

    @property
    def has_scratch(self) -> bool:
        return False

    @property
    def isa(self) -> str:
        return self.vector.name

    def build(self) -> Any:
        return tir.kernel_function(self.name, self.parameters, self._body)

    def _body(self, s: tir.KernelScope) -> None:
        per_panel, lanes = WIDTH // GROUP, self.vector.lanes
        with loop(s.begin, s.end) as item:
            panel, group = div(item, per_panel), mod(item, per_panel)
            start = keep(panel * s["channels"] * WIDTH + group * GROUP)
            for offset in range(0, GROUP, lanes):
                self._lanes(s, start + offset)

    def _lanes(self, s: tir.KernelScope, start: Any) -> None:
        n, x, y = self.vector.lanes, s["x"], s["y"]
        inverse = keep(splat(T.float32(1.0) / T.cast(s["channels"], "float32"), n))

        def at(channel: Any) -> Any:
            return ramp(start + channel * WIDTH, n)

        def source(channel: Any) -> Any:
            if not self.has_residual:
                return keep(x[at(channel)])
            value = keep(x[at(channel)] + s["residual"][at(channel)])
            T.buffer_store(y, value, [at(channel)])  # the later rounds read the sum from y
            return value

        mean = keep(self._sum(s["channels"], source) * inverse)
        total = y if self.has_residual else x

        def squared(channel: Any) -> Any:
            difference = keep(total[at(channel)] - mean)
            return difference * difference

        variance = keep(self._sum(s["channels"], squared) * inverse)
        deviation = keep(T.sqrt(variance + splat(s["epsilon"], n)))
        scale = keep(splat(1.0, n) / deviation)
        with loop(0, s["channels"]) as c:
            value = (total[at(c)] - mean) * scale * splat(s["gamma"][c], n)
            if self.has_beta:
                value = value + splat(s["beta"][c], n)
            T.buffer_store(y, value, [at(c)])

    def _sum(self, channels: Any, term: Callable[[Any], Any]) -> Any:
        n = self.vector.lanes
        sums = [tir.registers("float32", n) for _ in range(UNROLL)]
        for part in sums:
            T.buffer_store(part, splat(0.0, n), [ramp(0, n)])
        with loop(0, div(channels, UNROLL)) as block:
            for u, part in enumerate(sums):
                value = part[ramp(0, n)] + term(block * UNROLL + u)
                T.buffer_store(part, value, [ramp(0, n)])
        with loop(div(channels, UNROLL) * UNROLL, channels) as c:
            T.buffer_store(sums[0], sums[0][ramp(0, n)] + term(c), [ramp(0, n)])
        a, b, c, d = (part[ramp(0, n)] for part in sums)
        return (a + b) + (c + d)


class LayerNormFamily:
    """`layer_norm` in fp32."""

    ops = ("layer_norm",)

    def workload(self, node: Node) -> Workload:
        parts = ["residual"] * (node.optional_input(3) is not None)
        parts += ["beta"] * (node.optional_input(2) is not None)
        x = node.input(0).type
        return Workload("layer_norm", (("c", x.channels),), str(x.dtype), epilogue=" ".join(parts))

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        if best_vector_isa(target) is None or workload.dtype != str(DType.F32):
            return []
        return [Schedule("layer_norm", v.name) for v in reversed(VECTOR_ISAS) if target.has(v.isa)]

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        x, gamma, y = node.input(0), node.input(1), node.output
        beta, residual = node.optional_input(2), node.optional_input(3)
        assert all(is_planar(v.type) for v in (x, y)), node
        kernel = LayerNorm(by_name(schedule.isa), residual is not None, beta is not None)
        operands = [v for v in (x, residual, gamma, beta, y) if v is not None]
        return [
            KernelCall(
                kernel,
                (*(binder.ref(v) for v in operands), x.type.channels,
                 float(node.attrs["epsilon"])),
                ceildiv(x.type.tokens, GROUP),
                f"{node.name}: y = layer_norm(x), {x.type.channels} channels",
                grain=2,
            )
        ]  # fmt: skip

    def variants(self) -> list[Kernel]:
        return [
            LayerNorm(v, residual, beta)
            for v in VECTOR_ISAS
            for residual in (False, True)
            for beta in (False, True)
        ]
