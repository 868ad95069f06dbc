"""`gated` and `rotary`: products of channels of the same token, panel by panel.

A channel of a panel is 64 neighbours, so every operand is read and every result written along
memory. Lanes past the last token are computed too; nothing reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, by_name, polynomials
from sparsec.codegen.isa.vector import keep, ramp
from sparsec.codegen.kernels.base import Binder, TirKernel, vector_schedules
from sparsec.codegen.kernels.panels import WIDTH, div, is_planar, loop, mod
from sparsec.codegen.program import Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import ceildiv
from sparsec.ir.graph import Node
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

ACTIVATIONS: dict[str, Callable[[VectorIsa, Any], Any]] = {
    "none": polynomials.identity,
    "relu": polynomials.relu,
    "gelu": polynomials.gelu,
    "gelu_tanh": polynomials.gelu_tanh,
    "silu": polynomials.silu,
    "sigmoid": polynomials.sigmoid,
}


def _sizes(names: str) -> tuple[Parameter, ...]:
    return tuple(Parameter(name, Kind.INT) for name in names.split())


@dataclass(frozen=True, slots=True)
class Gated(TirKernel):
    """y = x[offset ...] * activation(x[gate_offset ...]); one item is one panel."""

    vector: VectorIsa
    activation: str

    @property
    def name(self) -> str:
        return f"gated_{self.activation}_f32_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        sizes = _sizes("x_channels channels offset gate_offset")
        return (Parameter("x"), Parameter("y"), *sizes)

    def _body(self, s: tir.KernelScope) -> None:
        n = self.vector.lanes
        with loop(s.begin, s.end) as panel:
            first = keep(panel * s["x_channels"])
            value = keep((first + s["offset"]) * WIDTH)
            gate = keep((first + s["gate_offset"]) * WIDTH)
            y = keep(panel * s["channels"] * WIDTH)
            with loop(0, keep(s["channels"] * (WIDTH // n))) as i:
                at = keep(i * n)
                active = ACTIVATIONS[self.activation](
                    self.vector, keep(s["x"][ramp(gate + at, n)])
                )
                T.buffer_store(s["y"], s["x"][ramp(value + at, n)] * active, [ramp(y + at, n)])


@dataclass(frozen=True, slots=True)
class Rotary(TirKernel):
    """Pairs of channels half a head apart turn by the token's angle; an item is a panel's head."""

    vector: VectorIsa

    @property
    def name(self) -> str:
        return f"rotary_f32_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        sizes = _sizes("x_channels heads head_size offset")
        return (*(Parameter(n) for n in ("x", "cos", "sin", "y")), *sizes)

    def _body(self, s: tir.KernelScope) -> None:
        size, heads = s["head_size"], s["heads"]
        with loop(s.begin, s.end) as item:
            panel, head = keep(div(item, heads)), keep(mod(item, heads))
            half = keep(div(size, 2) * WIDTH)
            x = keep((panel * s["x_channels"] + s["offset"] + head * size) * WIDTH)
            table = keep(panel * size * WIDTH)
            y = keep(item * size * WIDTH)
            with loop(0, keep(div(half, self.vector.lanes))) as i:
                self._pair(s, x, table, y, half, keep(i * self.vector.lanes))

    def _pair(self, s: tir.KernelScope, x: Any, table: Any, y: Any, half: Any, low: Any) -> None:
        n = self.vector.lanes
        high = keep(half + low)
        a, b = (keep(s["x"][ramp(x + at, n)]) for at in (low, high))
        for at, straight, turned in ((low, a, b * T.broadcast(T.float32(-1), n)), (high, b, a)):
            cos, sin = (keep(s[name][ramp(table + at, n)]) for name in ("cos", "sin"))
            T.buffer_store(s["y"], straight * cos + turned * sin, [ramp(y + at, n)])


class ChannelsFamily:
    """fp32 in planar panels."""

    ops = ("gated", "rotary")

    def workload(self, node: Node) -> Workload:
        x, y = node.input(0).type, node.output.type
        sizes = (("c", x.channels), ("m", y.channels))
        return Workload(node.op, sizes, str(x.dtype), epilogue=node.attrs.get("activation", ""))

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        fits = workload.dtype == str(DType.F32)
        fits &= workload.op != "gated" or workload.epilogue in ACTIVATIONS
        return vector_schedules("channels", target) if fits else []

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        x, y, attrs = node.input(0), node.output, node.attrs
        assert all(is_planar(v.type) for v in (x, y)), node
        vector, panels = by_name(schedule.isa), ceildiv(x.type.tokens, WIDTH)
        refs = [binder.ref(v) for v in (*node.inputs, y) if v is not None]
        if node.op == "gated":
            kernel: Kernel = Gated(vector, attrs["activation"])
            sizes = [attrs["channels"], attrs["offset"], attrs["gate_offset"]]
        else:
            kernel = Rotary(vector)
            sizes = [attrs["heads"], attrs["head_size"], attrs["offset"]]
            panels = panels * attrs["heads"]
        args = (*refs, x.type.channels, *sizes)
        return [KernelCall(kernel, args, panels, f"{node.name}: {node.op}")]

    def variants(self) -> list[Kernel]:
        gated: list[Kernel] = [Gated(v, a) for v in VECTOR_ISAS for a in ACTIVATIONS]
        return [*gated, *(Rotary(v) for v in VECTOR_ISAS)]
