"""`to_bf16`: fp32 panels to panels of pairs of bf16, rounded half to even.

One item is a run of CHUNK rows of pairs. Lanes past the last token are rounded too: nothing reads
them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.bf16 import AVX512_BF16, LANES, pairs_of
from sparsec.codegen.isa.vector import VectorIsa, keep, ramp
from sparsec.codegen.kernels.base import Binder, TirKernel
from sparsec.codegen.kernels.panels import WIDTH, is_planar, loop
from sparsec.codegen.program import Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import ceildiv, floordiv
from sparsec.ir.graph import Node
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Target

CHUNK = 32  # rows of pairs per item: 16 KB of floats


@dataclass(frozen=True, slots=True)
class ToBf16(TirKernel):
    """`rows` are those of all panels of the result: each is two of x."""

    vector: VectorIsa = AVX512_BF16

    @property
    def name(self) -> str:
        return f"to_bf16_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("x"), Parameter("y", dtype="int32"), Parameter("rows", Kind.INT))

    def _body(self, s: tir.KernelScope) -> None:
        with loop(s.begin * CHUNK, T.min(s.end * CHUNK, s["rows"])) as row:
            for lane in range(0, WIDTH, LANES):
                start = keep(row * (2 * WIDTH) + lane)
                even, odd = (keep(s["x"][ramp(start + i, LANES)]) for i in (0, WIDTH))
                T.buffer_store(s["y"], pairs_of(even, odd), [ramp(row * WIDTH + lane, LANES)])


class ToBf16Family:
    """`to_bf16` of planar panels."""

    ops = ("to_bf16",)

    def workload(self, node: Node) -> Workload:
        return Workload("to_bf16", (), str(node.input(0).type.dtype))

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        has = target.has(AVX512_BF16.isa)
        return [Schedule("to_bf16", AVX512_BF16.name)] if has else []

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        x, y = node.input(0), node.output
        assert is_planar(x.type), node
        rows = floordiv(x.type.nbytes, 2 * WIDTH * 4)
        return [
            KernelCall(
                ToBf16(),
                (binder.ref(x), binder.ref(y), rows),
                ceildiv(rows, CHUNK),
                f"{node.name}: {x.type.channels} channels to bf16",
                grain=2,
            )
        ]

    def variants(self) -> list[Kernel]:
        return [ToBf16()]
