"""Any op without a hand-made kernel family: costs speed, never correctness.

An op is an entry of `BUILDERS`: from its types to a `Plan`, most through a tensor expression.
Sizes that are not known stay parameters, so one function serves every batch and length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tvm import tirx

from sparsec.codegen.generic_base import Application, Plan, size_name
from sparsec.codegen.generic_conv import CONV
from sparsec.codegen.generic_elementwise import ELEMENTWISE
from sparsec.codegen.generic_loops import LOOPS, parameters
from sparsec.codegen.generic_matmul import MATMUL
from sparsec.codegen.generic_reduce import REDUCE
from sparsec.codegen.generic_shape import SHAPE
from sparsec.codegen.kernels.base import Binder
from sparsec.codegen.program import BufferRef, Kernel, KernelCall, Parameter
from sparsec.errors import UnsupportedOp
from sparsec.ir.dims import Expr, floordiv, symbol, symbols
from sparsec.ir.graph import Node
from sparsec.ir.layouts import ROW_MAJOR
from sparsec.ir.op_spec import Attrs
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import TensorType
from sparsec.target import Isa, Target

BUILDERS: dict[str, Callable[[Application], Plan]] = {
    **ELEMENTWISE,
    **SHAPE,
    **REDUCE,
    **LOOPS,
    **MATMUL,
    **CONV,
}
VECTOR_BYTES = {Isa.AVX2.value: 32, Isa.AVX512.value: 64}


@dataclass(frozen=True, slots=True)
class GenericOp:
    """The kernel of one op with one signature: nodes that agree in it share the function.

    Parameters: the operands, the result, then the value of each symbol of the types and the
    attributes, by name.
    """

    op: str
    attrs: tuple[tuple[str, Any], ...]
    operands: tuple[TensorType, ...]
    result: TensorType
    isa: str
    has_scratch: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        return f"{self.op}_{self._digest()}_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return parameters(self._application())

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols whose values are passed, in order."""
        shapes = [t.shape for t in (*self.operands, self.result)]
        return tuple(sorted(_symbols(shapes) | _symbols([v for _, v in self.attrs])))

    def plan(self) -> Plan:
        return BUILDERS[self.op](self._application())

    def build(self) -> Any:
        return self.plan().build(self.name)

    def _application(self) -> Application:
        sizes = {s: tirx.Var(size_name(s), "int64") for s in self.symbols}
        attrs = MappingProxyType(dict(self.attrs))
        vector_bytes = VECTOR_BYTES[self.isa]
        return Application(self.op, attrs, self.operands, self.result, sizes, vector_bytes)

    def _digest(self) -> str:
        types = [str(t) for t in (*self.operands, self.result)]
        text = repr((types, [(n, _text(v)) for n, v in self.attrs]))
        return hashlib.sha256(text.encode()).hexdigest()[:8]


class GenericFamily:
    """The kernel family of last resort."""

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(BUILDERS)

    def workload(self, node: Node) -> Workload:
        return Workload(node.op, (), node.output.type.dtype.value)

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        isa = Isa.AVX512 if target.has(Isa.AVX512) else Isa.AVX2
        return [Schedule("generic", isa.value)]

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        """One call, or none for a result without elements.

        Raises UnsupportedOp when there is no generic form of the op.
        """
        operands = [v for v in node.inputs if v is not None]
        kernel = _kernel(node, schedule.isa)
        if node.output.type.elements == 0:
            return []
        refs = [binder.ref(v) for v in (*operands, node.output)]
        return [_call(kernel, refs, _comment(node))]

    def copy(self, source: BufferRef, to: BufferRef, target: Target) -> KernelCall:
        """The elements of `source`, in their order, to `to`."""
        attrs = {"shape": to.type.shape}
        isa = self.schedules(Workload("reshape", (), ""), target)[0].isa
        kernel = generic_op("reshape", attrs, (source.type,), to.type, isa)
        return _call(kernel, [source, to], f"{to.name} = copy of {source.name}")

    def variants(self) -> list[Kernel]:
        """None in advance: a kernel is made for each signature that a model has."""
        return []


GENERIC = GenericFamily()


def generic_op(
    op: str,
    attrs: Attrs,
    operands: tuple[TensorType, ...],
    result: TensorType,
    isa: str,
) -> GenericOp:
    return GenericOp(op, tuple(sorted(attrs.items())), operands, result, isa)


def _kernel(node: Node, isa: str) -> GenericOp:
    types = [v.type for v in (*node.inputs, node.output) if v is not None]
    shown = f"{node.name} ({node.op} of {', '.join(map(str, types[:-1]))})"
    if node.op not in BUILDERS:
        raise UnsupportedOp(
            f"{shown}: there is no kernel for this op on operands of these types; "
            "convert the model to float32, or export it with this op decomposed"
        )
    if any(t.layout != ROW_MAJOR for t in types):
        flat = _without_panels(node.op, types)
        if flat is None:
            raise UnsupportedOp(
                f"{shown}: the generic kernel reads and writes row-major tensors only; "
                "put from_panels before it"
            )
        types = flat
    return generic_op(node.op, node.attrs, tuple(types[:-1]), types[-1], isa)


def _without_panels(op: str, types: list[TensorType]) -> list[TensorType] | None:
    """Elementwise on panels of one form, and scalars: all lanes as one axis, else None.

    Lanes past the last token are computed too; nothing reads them.
    """
    result = types[-1]
    scalars = [t.elements == 1 and t.layout == ROW_MAJOR for t in types]
    alike = [(t.shape, t.layout) == (result.shape, result.layout) for t in types]
    if op not in ELEMENTWISE or not all(s or a for s, a in zip(scalars, alike, strict=True)):
        return None
    return [
        TensorType(t.dtype, () if scalar else (floordiv(t.nbytes, t.dtype.bytes),))
        for t, scalar in zip(types, scalars, strict=True)
    ]


def _call(kernel: GenericOp, refs: list[BufferRef], comment: str) -> KernelCall:
    plan = kernel.plan()
    sizes = [symbol(s) for s in kernel.symbols]
    return KernelCall(kernel, (*refs, *sizes), plan.items, comment, grain=plan.grain)


def _comment(node: Node) -> str:
    operands = ", ".join(f"{v.name} {v.type}" for v in node.inputs if v is not None)
    return f"{node.output.name} {node.output.type} = {node.op}({operands})"


def _symbols(value: Any) -> set[str]:
    match value:
        case Expr():
            return symbols(value)
        case tuple() | list():
            return {name for item in value for name in _symbols(item)}
    return set()


def _text(value: Any) -> str:
    """An attribute as text that is the same in every process."""
    match value:
        case tuple() | list():
            return f"({', '.join(_text(v) for v in value)})"
        case Expr():
            return str(value)
    return repr(value)
