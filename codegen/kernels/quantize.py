"""`quantize` and `dequantize` with one scale and zero point: fp32 to bytes and back.

    quantize:    clip(rint(x * inverse) + zero_point), half to even; NaN gives the least byte
    dequantize:  (x - zero_point) * scale

One item is a run of CHUNK elements of a contiguous value, in whatever layout. In panels the lanes
past the last token are computed too: nothing reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, by_name
from sparsec.codegen.isa.pack8 import BYTE_TYPES, Packer
from sparsec.codegen.isa.vector import keep, ramp, splat
from sparsec.codegen.kernels.base import Binder, TirKernel, vector_schedules
from sparsec.codegen.kernels.panels import const, div, loop
from sparsec.codegen.program import Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import ceildiv, floordiv
from sparsec.ir.graph import Node
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

CHUNK = 4096  # elements per item: 16 KB of floats, 4 KB of bytes
VECTORS = 4  # of floats that one store of bytes takes


@dataclass(frozen=True, slots=True)
class Requantise(TirKernel):
    """`op` is "quantize" or "dequantize"; `dtype` is that of the bytes, "uint8" or "int8"."""

    vector: VectorIsa
    op: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.op}_{self.dtype}_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """`factor` is what x is multiplied by: 1 / scale or scale."""
        types = ("float32", self.dtype)
        source, target = types if self.op == "quantize" else reversed(types)
        return (
            Parameter("x", dtype=source),
            Parameter("y", dtype=target),
            Parameter("count", Kind.INT),
            Parameter("factor", Kind.FLOAT),
            Parameter("zero_point", Kind.INT),
        )

    def _body(self, s: tir.KernelScope) -> None:
        width = VECTORS * self.vector.lanes
        convert = self._quantize(s) if self.op == "quantize" else self._dequantize(s)
        start = keep(s.begin * CHUNK)
        stop = keep(T.min(s.end * CHUNK, s["count"]))
        whole = keep(div(T.max(stop - start, const(0)), width))
        with loop(0, whole) as i:
            convert(s["x"], s["y"], start + i * width)
        self._tail(s, convert, keep(start + whole * width), stop)

    def _tail(self, s: tir.KernelScope, convert: Any, start: Any, stop: Any) -> None:
        """The last elements go through buffers on the stack."""
        types = {p.name: p.dtype for p in self.parameters}
        with T.If(start < stop), T.Then():
            x, y = (tir.registers(types[n], VECTORS * self.vector.lanes) for n in "xy")
            with loop(0, VECTORS * self.vector.lanes) as i:
                T.buffer_store(x, tirx.const(0, types["x"]), [i])
            with loop(start, stop) as i:
                T.buffer_store(x, s["x"][i], [i - start])
            convert(x, y, const(0))
            with loop(start, stop) as i:
                T.buffer_store(s["y"], y[i - start], [i])

    def _quantize(self, s: tir.KernelScope) -> Any:
        packer = Packer.of(self.vector, self.dtype, s["factor"], s["zero_point"])
        n = self.vector.lanes

        def convert(x: Any, y: Any, start: Any) -> None:
            values = [keep(x[ramp(start + i * n, n)]) for i in range(VECTORS)]
            T.buffer_store(y, packer.bytes_of(values), [ramp(start, VECTORS * n)])

        return convert

    def _dequantize(self, s: tir.KernelScope) -> Any:
        n = self.vector.lanes
        zero = keep(T.broadcast(T.cast(s["zero_point"], "int32"), n))
        scale = keep(splat(s["factor"], n))

        def convert(x: Any, y: Any, start: Any) -> None:
            for i in range(VECTORS):
                at = ramp(start + i * n, n)
                value = keep(T.cast(x[at], f"int32x{n}")) - zero
                T.buffer_store(y, T.cast(value, f"float32x{n}") * scale, [at])

        return convert


def inverse_of(scale: float) -> float:
    """1 / scale as `quantize` means it: both of them fp32."""
    return float(np.float32(1) / np.float32(scale))


class QuantizeFamily:
    """Per-tensor `quantize` and `dequantize` between fp32 and bytes."""

    ops = ("quantize", "dequantize")

    def workload(self, node: Node) -> Workload:
        types = (node.input(0).type, node.output.type)
        dtype = "/".join(str(t.dtype) for t in types)
        return Workload(node.op, (), dtype)

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        return vector_schedules("quantize", target) if _bytes_in(workload) else []

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        x, y = node.input(0), node.output
        dtype = _bytes_in(self.workload(node))
        assert dtype is not None, node
        assert x.type.layout == y.type.layout, node
        scale, zero_point = float(node.attrs["scale"]), int(node.attrs["zero_point"])
        factor = inverse_of(scale) if node.op == "quantize" else scale
        count = floordiv(x.type.nbytes, x.type.dtype.bytes)
        return [
            KernelCall(
                Requantise(by_name(schedule.isa), node.op, dtype),
                (binder.ref(x), binder.ref(y), count, factor, zero_point),
                ceildiv(count, CHUNK),
                f"{node.name}: {node.op} by {scale:.6g}, zero point {zero_point}",
                grain=2,
            )
        ]

    def variants(self) -> list[Kernel]:
        return [Requantise(v, op, t) for v in VECTOR_ISAS for op in self.ops for t in BYTE_TYPES]


def _bytes_in(workload: Workload) -> str | None:
    """The type of the bytes of a conversion from or to fp32; None for any other."""
    types = workload.dtype.split("/")
    ends = types if workload.op == "quantize" else types[::-1]
    known = {str(t): t.value for t in (DType.U8, DType.I8)}
    return known.get(ends[1]) if ends[0] == str(DType.F32) else None
