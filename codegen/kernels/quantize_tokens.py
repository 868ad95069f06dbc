"""`quantize_tokens`: fp32 panels to u8 panels with a scale per token.

    scale  = max(largest channel * above, least channel * below, SMALLEST_SCALE)
    stored = clip(rint(x * (1 / scale)) + zero_point), half to even

One item is a panel. Tokens lie in the lanes, so its extremes need no horizontal step; a second
walk over the channels, from L2, stores the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, by_name
from sparsec.codegen.isa.pack8 import Packer
from sparsec.codegen.isa.vector import keep, ramp, splat
from sparsec.codegen.kernels.base import Binder, TirKernel, vector_schedules
from sparsec.codegen.kernels.panels import (
    GROUP,
    WIDTH,
    const,
    div,
    groups_in_panel,
    is_planar,
    loop,
)
from sparsec.codegen.program import Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import ceildiv
from sparsec.ir.graph import Node
from sparsec.ir.ops_dynamic import SMALLEST_SCALE, token_shares
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

OP = "quantize_tokens"


@dataclass(frozen=True, slots=True)
class QuantizeTokens(TirKernel):
    """One instruction set. `one_sided` is for a zero point of 0: the least channel is not read."""

    vector: VectorIsa
    one_sided: bool

    @property
    def name(self) -> str:
        return f"{OP}_{'one_sided_' if self.one_sided else ''}{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("x"),
            Parameter("y", dtype="uint8"),
            Parameter("scale"),
            Parameter("tokens", Kind.INT),
            Parameter("channels", Kind.INT),
            Parameter("above", Kind.FLOAT),
            Parameter("below", Kind.FLOAT),
            Parameter("zero_point", Kind.INT),
        )

    def _body(self, s: tir.KernelScope) -> None:
        lanes = self.vector.lanes
        chunk = 4 * lanes  # tokens whose bytes are one store
        with loop(s.begin, s.end) as panel:
            groups = groups_in_panel(s["tokens"], panel)
            start, first = keep(panel * s["channels"] * WIDTH), keep(panel * WIDTH)
            whole = keep(div(groups * GROUP, chunk))
            with loop(0, whole) as i:
                self._tokens(s, start + i * chunk, first + i * chunk, chunk)
            with loop(whole * (chunk // GROUP), groups) as i:
                self._tokens(s, start + i * GROUP, first + i * GROUP, GROUP)
            with loop(groups * (GROUP // lanes), const(WIDTH // lanes)) as i:
                T.buffer_store(s["scale"], splat(0.0, lanes), [ramp(first + i * lanes, lanes)])

    def _tokens(self, s: tir.KernelScope, start: Any, token: Any, width: int) -> None:
        """`width` neighbouring tokens; their first channel is at `start`."""
        n = self.vector.lanes
        origin, steps = keep(start), range(0, width, n)
        scales = self._scales(s, origin, width)
        for j, scale in zip(steps, scales, strict=True):
            T.buffer_store(s["scale"], scale, [ramp(token + j, n)])
        inverse = [keep(splat(1.0, n) / scale) for scale in scales]
        packer = Packer.of(self.vector, "uint8", T.float32(1.0), s["zero_point"])
        with loop(0, s["channels"]) as c:
            row = keep(origin + c * WIDTH)
            values = [s["x"][ramp(row + j, n)] for j in steps]
            scaled = [keep(x * factor) for x, factor in zip(values, inverse, strict=True)]
            T.buffer_store(s["y"], packer.bytes_of_steps(scaled), [ramp(row, width)])

    def _scales(self, s: tir.KernelScope, origin: Any, width: int) -> list[Any]:
        n = self.vector.lanes
        steps, at = range(0, width, n), ramp(0, n)
        largest = [_Extreme(n, -math.inf) for _ in steps]
        least = [] if self.one_sided else [_Extreme(n, math.inf) for _ in steps]
        with loop(0, s["channels"]) as c:
            row = keep(origin + c * WIDTH)
            for i, j in enumerate(steps):
                x = keep(s["x"][ramp(row + j, n)])
                largest[i].include(x)
                if least:
                    least[i].include(x)
        smallest = splat(SMALLEST_SCALE, n)
        scales = []
        for i, extreme in enumerate(largest):
            scale = _larger(keep(extreme.slot[at] * splat(s["above"], n)), smallest)
            if least:
                scale = _larger(keep(least[i].slot[at] * splat(s["below"], n)), scale)
            scales.append(scale)
        return scales


class _Extreme:
    """The largest value so far of each lane, or the least; NaN is passed over."""

    def __init__(self, lanes: int, start: float):
        self.is_largest, self.at = start < 0, ramp(0, lanes)
        self.slot = tir.registers("float32", lanes)
        T.buffer_store(self.slot, splat(start, lanes), [self.at])

    def include(self, x: Any) -> None:
        old = self.slot[self.at]
        beyond = x > old if self.is_largest else x < old
        T.buffer_store(self.slot, T.Select(beyond, x, old), [self.at])


def _larger(x: Any, y: Any) -> Any:
    """y where x is NaN."""
    return keep(T.Select(x > y, x, y))


class QuantizeTokensFamily:
    """`quantize_tokens` on planar panels."""

    ops = (OP,)

    def workload(self, node: Node) -> Workload:
        x = node.input(0).type
        return Workload(OP, (("c", x.channels),), str(x.dtype))

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        fits = workload.dtype == str(DType.F32)
        return vector_schedules(OP, target) if fits else []

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        x, zero_point = node.input(0), int(node.attrs["zero_point"])
        assert is_planar(x.type), node
        above, below = token_shares(zero_point)
        return [
            KernelCall(
                QuantizeTokens(by_name(schedule.isa), zero_point == 0),
                (
                    *(binder.ref(v) for v in (x, *node.outputs)),
                    *(x.type.tokens, x.type.channels, float(above), float(below), zero_point),
                ),
                ceildiv(x.type.tokens, WIDTH),
                f"{node.name}: a scale per token, {x.type.channels} channels",
                per_panel=1,
            )
        ]

    def variants(self) -> list[Kernel]:
        return [QuantizeTokens(v, one_sided) for v in VECTOR_ISAS for one_sided in (False, True)]
