"""Elementwise ops on fp32 values of one shape and layout, with scalar constants as second operand.

One item is a run of CHUNK elements. In panels the lanes past the last token are computed too:
nothing reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, by_name, polynomials
from sparsec.codegen.isa.vector import keep, ramp, splat
from sparsec.codegen.kernels.base import Binder, TirKernel, vector_schedules
from sparsec.codegen.kernels.panels import const, div, loop
from sparsec.codegen.program import Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import ceildiv, floordiv
from sparsec.ir.graph import Node, Value
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

CHUNK = 4096  # elements per item: 16 KB in, 16 KB out

UNARY: dict[str, Callable[[VectorIsa, Any], Any]] = {
    "abs": lambda v, x: T.abs(x),
    "ceil": lambda v, x: T.ceil(x),
    "erf": polynomials.erf,
    "exp": polynomials.exp,
    "floor": lambda v, x: T.floor(x),
    "gelu": polynomials.gelu,
    "gelu_tanh": polynomials.gelu_tanh,
    "neg": lambda v, x: x * splat(-1.0, v.lanes),
    "reciprocal": lambda v, x: splat(1.0, v.lanes) / x,
    "relu": polynomials.relu,
    "round": lambda v, x: T.nearbyint(x),
    "sigmoid": polynomials.sigmoid,
    "silu": polynomials.silu,
    "sqrt": lambda v, x: T.sqrt(x),
    "tanh": polynomials.tanh,
}


def _chosen(first: Any, second: Any, a: Any, b: Any) -> Any:
    """a where `first`, b where `second`, else NaN: neither comparison holds for a NaN."""
    return T.Select(first, a, T.Select(second, b, a + b))


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    # NaN in either operand gives NaN, as NumPy's maximum and minimum do.
    "maximum": lambda a, b: _chosen(a > b, b >= a, a, b),
    "minimum": lambda a, b: _chosen(a < b, b <= a, a, b),
}
SHAPES = ("same", "scalar_right", "scalar_left")


@dataclass(frozen=True, slots=True)
class Pointwise(TirKernel):
    """`form` says which operand of a binary op is a scalar."""

    vector: VectorIsa
    op: str
    form: str = "same"

    @property
    def name(self) -> str:
        form = "" if self.form == "same" else f"_{self.form}"
        return f"{self.op}_f32{form}_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        pointers = ("a", "b", "y") if self.op in BINARY else ("a", "y")
        return (*(Parameter(n) for n in pointers), Parameter("count", Kind.INT))

    def _body(self, s: tir.KernelScope) -> None:
        n = self.vector.lanes
        start = keep(s.begin * CHUNK)
        stop = keep(T.min(s.end * CHUNK, s["count"]))
        whole = keep(div(T.max(stop - start, const(0)), n))
        with loop(0, whole) as i:
            at = ramp(start + i * n, n)
            loaded = {name: s[name][at] for name in self._vectors}
            T.buffer_store(s["y"], self._value(s, loaded), [at])
        self._tail(s, start + whole * n, stop)

    def _tail(self, s: tir.KernelScope, start: Any, stop: Any) -> None:
        """The last elements go through one vector on the stack."""
        n = self.vector.lanes
        with T.If(start < stop), T.Then():
            names = self._vectors
            buffers = {name: tir.registers("float32", n) for name in names}
            result = tir.registers("float32", n)
            for buffer in buffers.values():
                T.buffer_store(buffer, splat(1.0, n), [ramp(0, n)])
            with loop(start, stop) as i:
                for name, buffer in buffers.items():
                    T.buffer_store(buffer, s[name][i], [i - start])
            loaded = {name: buffer[ramp(0, n)] for name, buffer in buffers.items()}
            T.buffer_store(result, self._value(s, loaded), [ramp(0, n)])
            with loop(start, stop) as i:
                T.buffer_store(s["y"], result[i - start], [i])

    @property
    def _vectors(self) -> list[str]:
        if self.op in UNARY:
            return ["a"]
        return {"same": ["a", "b"], "scalar_right": ["a"], "scalar_left": ["b"]}[self.form]

    def _value(self, s: tir.KernelScope, loaded: dict[str, Any]) -> Any:
        values = {name: keep(value) for name, value in loaded.items()}
        if self.op in UNARY:
            return UNARY[self.op](self.vector, values["a"])
        scalars = {n: keep(splat(s[n][0], self.vector.lanes)) for n in ("a", "b")
                   if n not in values}  # fmt: skip
        values |= scalars
        return BINARY[self.op](values["a"], values["b"])


class PointwiseFamily:
    """The unary and binary tables above; other shapes and dtypes are generic."""

    ops = tuple(sorted({*UNARY, *BINARY} - {"gelu_tanh"}))

    def workload(self, node: Node) -> Workload:
        op = "gelu_tanh" if node.attrs.get("approximate") == "tanh" else node.op
        types = {str(v.type.dtype) for v in node.inputs if v is not None}
        return Workload(op, (), "/".join(sorted(types)), epilogue=_form(node) or "broadcast")

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        fits = workload.dtype == str(DType.F32) and workload.epilogue in SHAPES
        return vector_schedules("pointwise", target) if fits else []

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        work = self.workload(node)
        kernel = Pointwise(by_name(schedule.isa), work.op, work.epilogue)
        y = node.output
        count = floordiv(y.type.nbytes, y.type.dtype.bytes)
        operands = [binder.ref(v) for v in (*node.inputs, y) if v is not None]
        return [
            KernelCall(
                kernel,
                (*operands, count),
                ceildiv(count, CHUNK),
                f"{node.name}: {work.op}",
                grain=2,
            )
        ]

    def variants(self) -> list[Kernel]:
        unary: list[Kernel] = [Pointwise(v, op) for v in VECTOR_ISAS for op in UNARY]
        binary = [Pointwise(v, op, form) for v in VECTOR_ISAS for op in BINARY for form in SHAPES]
        return [*unary, *binary]


def _form(node: Node) -> str | None:
    """Which operand is a scalar; None when the shapes broadcast in another way."""
    values = [v for v in node.inputs if v is not None]
    shape = node.output.type.shape
    if all(v.type.shape == shape for v in values):
        return "same"
    if len(values) == 2 and values[0].type.shape == shape and _is_scalar(values[1]):
        return "scalar_right"
    if len(values) == 2 and values[1].type.shape == shape and _is_scalar(values[0]):
        return "scalar_left"
    return None


def _is_scalar(value: Value) -> bool:
    return all(d == 1 for d in value.type.shape)
