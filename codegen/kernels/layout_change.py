"""`to_panels` and `from_panels`: rows of tokens to planar panels and back, in square tiles."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, by_name
from sparsec.codegen.isa.vector import keep, ramp, transpose
from sparsec.codegen.kernels.base import Binder, TirKernel, vector_schedules
from sparsec.codegen.kernels.panels import GROUP, WIDTH, const, div, loop, mod
from sparsec.codegen.program import Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import ceildiv
from sparsec.ir.graph import Node
from sparsec.ir.layouts import Panels
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

ELEMENTS = {"float32": "f32", "uint8": "u8"}  # and how a kernel's name has them
MOVED = {str(DType.F32): "float32", str(DType.U8): "uint8", str(DType.I8): "uint8"}


@dataclass(frozen=True, slots=True)
class LayoutChange(TirKernel):
    """`direction` is `to_panels` or `from_panels`; one item is a group of 16 tokens.

    `element` is what is moved: "float32", or "uint8", which stands for any byte.
    """

    vector: VectorIsa
    direction: str
    element: str

    @property
    def name(self) -> str:
        return f"{self.direction}_{ELEMENTS[self.element]}_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        sizes = (Parameter("tokens", Kind.INT), Parameter("channels", Kind.INT))
        return (Parameter("x", dtype=self.element), Parameter("y", dtype=self.element), *sizes)

    def _body(self, s: tir.KernelScope) -> None:
        n, channels = self.vector.lanes, s["channels"]
        square = self._to_panels if self.direction == "to_panels" else self._from_panels
        with loop(s.begin, s.end) as item:
            for offset in range(0, GROUP, n):
                token = keep(item * GROUP + offset)
                column = keep(div(token, WIDTH) * channels * WIDTH + mod(token, WIDTH))
                with loop(0, div(channels, n)) as block:
                    square(s, token, column, keep(block * n))
                with loop(div(channels, n) * n, channels) as channel:
                    self._one_channel(s, token, column, channel)

    def _to_panels(self, s: tir.KernelScope, token: Any, column: Any, channel: Any) -> None:
        """Lanes past the last token load the last row and become zero."""
        n = self.vector.lanes
        last = s["tokens"] - 1
        rows = [
            keep(s["x"][ramp(T.min(token + i, last) * s["channels"] + channel, n)])
            for i in range(n)
        ]
        present = lanes_below(s["tokens"] - token, n)
        for i, value in enumerate(transpose(rows)):
            kept = T.Select(present, value, T.broadcast(self._zero, n))
            T.buffer_store(s["y"], kept, [ramp(column + (channel + i) * WIDTH, n)])

    @property
    def _zero(self) -> Any:
        return tirx.const(0, self.element)

    def _from_panels(self, s: tir.KernelScope, token: Any, column: Any, channel: Any) -> None:
        n = self.vector.lanes
        rows = [keep(s["x"][ramp(column + (channel + i) * WIDTH, n)]) for i in range(n)]
        for i, value in enumerate(transpose(rows)):
            with T.If(token + i < s["tokens"]), T.Then():
                T.buffer_store(s["y"], value, [ramp((token + i) * s["channels"] + channel, n)])

    def _one_channel(self, s: tir.KernelScope, token: Any, column: Any, channel: Any) -> None:
        x, y, n = s["x"], s["y"], self.vector.lanes
        with loop(0, n) as i:
            row = keep((token + i) * s["channels"] + channel)
            lane = keep(column + channel * WIDTH + i)
            with T.If(token + i < s["tokens"]):
                with T.Then():
                    if self.direction == "to_panels":
                        T.buffer_store(y, x[row], [lane])
                    else:
                        T.buffer_store(y, x[lane], [row])
                with T.Else():
                    if self.direction == "to_panels":
                        T.buffer_store(y, self._zero, [lane])
                    else:
                        T.evaluate(T.int32(0))


def lanes_below(count: Any, lanes: int) -> Any:
    """A vector of booleans: lane index < count."""
    index = T.ramp(T.int32(0), 1, lanes)
    bound = keep(T.cast(T.min(count, const(lanes)), "int32"))
    return index < T.broadcast(bound, lanes)


class LayoutChangeFamily:
    """fp32 and bytes in and out of planar panels."""

    ops = ("to_panels", "from_panels")

    def workload(self, node: Node) -> Workload:
        x = node.input(0).type
        return Workload(node.op, (("c", x.channels),), str(x.dtype))

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        return vector_schedules("layout_change", target) if workload.dtype in MOVED else []

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        x, y = node.input(0), node.output
        assert (x if node.op == "from_panels" else y).type.layout == Panels(), node
        tokens, channels = x.type.tokens, x.type.channels
        return [
            KernelCall(
                LayoutChange(by_name(schedule.isa), node.op, MOVED[str(x.type.dtype)]),
                (binder.ref(x), binder.ref(y), tokens, channels),
                ceildiv(tokens, GROUP),
                f"{node.name}: {channels} channels",
                grain=4,
            )
        ]

    def variants(self) -> list[Kernel]:
        found = product(VECTOR_ISAS, self.ops, ELEMENTS)
        return [LayoutChange(vector, op, element) for vector, op, element in found]
