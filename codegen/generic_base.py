"""What the generic ops share: dims as TIR, typed reads, and the plan of a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from sparsec.codegen.te_lowering import Definition, IndexCheck, te_function
from sparsec.ir.dims import Call, Dim, Symbol, product
from sparsec.ir.op_spec import Attrs
from sparsec.ir.types import DType, TensorType

GRAIN_ELEMENTS = 16384  # results that are worth a worker of their own
UNKNOWN_ELEMENTS = 128  # what a symbolic size counts for in the grain
Index = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Application:
    """One op applied to operands of known types; `sizes` are its symbols as TIR variables."""

    op: str
    attrs: Attrs
    operands: tuple[TensorType, ...]
    result: TensorType
    sizes: Mapping[str, Any]
    vector_bytes: int  # of the ISA's widest register

    def size(self, dim: Dim) -> Any:
        """`dim` as an int64 expression."""
        if isinstance(dim, int):
            return int64(dim)
        total: Any = None
        for monomial, coefficient in dim.terms:
            term: Any = int64(coefficient) if coefficient != 1 or not monomial else None
            for atom in monomial:
                factor = self._atom(atom)
                term = factor if term is None else term * factor
            total = term if total is None else total + term
        return total

    def shape(self, dims: Sequence[Dim]) -> tuple[Any, ...]:
        return tuple(self.size(d) for d in dims)

    def placeholder(self, index: int, dims: Sequence[Dim]) -> Any:
        """Operand `index`, seen in the shape `dims`."""
        dtype = storage(self.operands[index].dtype)
        return te.placeholder(self.shape(dims or (1,)), dtype, f"x{index}")

    def _atom(self, atom: Symbol | Call) -> Any:
        match atom:
            case Symbol(name):
                return self.sizes[name]
            case Call(function, args):
                return _DIM_FUNCTIONS[function](*(self.size(a) for a in args))


_DIM_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "floordiv": tirx.floordiv,
    "mod": tirx.floormod,
    "max": tirx.max,
    "min": tirx.min,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A function to be made: how many items it has and how it is built, given its name."""

    items: Dim
    grain: int
    build: Callable[[str], Any]


def size_name(symbol: str) -> str:
    """The kernel parameter that holds a symbol."""
    return f"size_{symbol}"


def int64(value: int) -> Any:
    return tirx.const(value, "int64")


def storage(dtype: DType) -> str:
    """The TVM name of an element in memory: a bool is a byte, 0 or 1."""
    return "uint8" if dtype is DType.BOOL else dtype.value


def wide(dtype: DType) -> str:
    """The TVM name of the type to compute in: float16 is rounded only at the end."""
    return "float32" if dtype is DType.F16 else storage(dtype)


def convert(value: Any, dtype: str) -> Any:
    """`value` as `dtype`; float16 and float64 meet in float32, which needs no library call."""
    kinds = {str(value.ty.dtype), dtype}
    if kinds == {"float16", "float64"}:
        value = value.astype("float32")
    return value if str(value.ty.dtype) == dtype else value.astype(dtype)


def grain(dims: Sequence[Dim]) -> int:
    """The least number of items worth a worker, when each makes `dims` results."""
    each = math.prod(d if isinstance(d, int) else UNKNOWN_ELEMENTS for d in dims)
    return max(1, GRAIN_ELEMENTS // max(1, each))


def injective(
    app: Application,
    dims: Sequence[Dim],
    inputs: Sequence[Any],
    value: Index,
    checks: Sequence[IndexCheck] = (),
) -> Plan:
    """Every element of the result, of shape `dims`, by `value` of its index alone.

    The last axis is the inner loop, all others together are the items; a result with one axis is
    cut anywhere.
    """
    real = [axis for axis, dim in enumerate(dims) if dim != 1]

    def element(*loops: Any) -> Any:
        index: list[Any] = [int64(0)] * len(dims)
        for axis, loop in zip(real, loops, strict=False):
            index[axis] = loop
        return convert(value(*index), storage(app.result.dtype))

    sizes = [dims[axis] for axis in real]
    output = te.compute(app.shape(sizes or (1,)), element, name="y")
    item_loops = len(sizes) - 1 if len(sizes) > 1 else len(sizes)
    definition = Definition(tuple(inputs), output, item_loops, checks=tuple(checks))
    return te_plan(app, definition, sizes[:item_loops], sizes[item_loops:])


def te_plan(
    app: Application, definition: Definition, items: Sequence[Dim], each: Sequence[Dim]
) -> Plan:
    """A plan from TE: `items` are the fused loops, `each` the sizes inside of them."""

    def build(name: str) -> Any:
        return te_function(name, definition, list(app.sizes.values()))

    return Plan(product(items), grain(each), build)


def from_front(index: Any, size: Any) -> Any:
    """An index that counts from the end when it is negative, counted from the front."""
    index = convert(index, "int64")
    return tirx.Select(index < 0, index + size, index)


def flat(indices: Sequence[Any], sizes: Sequence[Any]) -> Any:
    """The row-major offset of an index."""
    offset: Any = int64(0)
    for index, size in zip(indices, sizes, strict=True):
        offset = offset * size + index
    return offset


def unflat(offset: Any, sizes: Sequence[Any]) -> list[Any]:
    """The index whose row-major offset is `offset`."""
    index: list[Any] = []
    for size in reversed(sizes):
        index.insert(0, tirx.floormod(offset, size))
        offset = tirx.floordiv(offset, size)
    return index


def tvm_bits(dtype: str) -> int:
    """The bits of an element of the TVM type `dtype`."""
    return int(dtype.lstrip("uintfloa"))
