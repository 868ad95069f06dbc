"""One ONNX node as its converter sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import GraphProto

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend.builder import Builder, Operand
from sparsec.ir.dims import Dim
from sparsec.ir.types import DType

Result = Operand | list[Operand | None]


@dataclass(frozen=True, slots=True)
class Call:
    """Operands are what earlier nodes gave; an optional operand that is absent is None.

    `outputs` are the names of the results, "" for one that nothing reads. `subgraph` converts a
    graph attribute in place and gives its results.
    """

    op_type: str
    opset: int
    inputs: tuple[Operand | None, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    g: Builder
    subgraph: Callable[[GraphProto], list[Operand]]

    def input(self, index: int) -> Operand:
        item = self.optional(index)
        if item is None:
            raise InvalidModel(f"operand {index} is required and absent")
        return item

    def optional(self, index: int) -> Operand | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def present(self) -> list[Operand]:
        """All operands of a variadic op."""
        return [self.input(i) for i in range(len(self.inputs))]

    def attr(self, name: str, default: Any) -> Any:
        return self.attrs.get(name, default)

    def required(self, name: str) -> Any:
        if name not in self.attrs:
            raise InvalidModel(f"the attribute {name!r} is required and absent")
        return self.attrs[name]

    def shape(self, index: int = 0) -> tuple[Dim, ...]:
        return self.input(index).type.shape

    def rank(self, index: int = 0) -> int:
        return self.input(index).type.rank

    def dtype(self, index: int = 0) -> DType:
        return self.input(index).type.dtype

    def axis(self, default: int | None = None, rank: int | None = None) -> int:
        """The attribute `axis`, counted from the front."""
        axis = self.required("axis") if default is None else self.attr("axis", default)
        return wrap_axis(axis, self.rank() if rank is None else rank)

    def ints(self, name: str, index: int) -> tuple[int, ...] | None:
        """Integers that older opsets have as an attribute and newer ones as an operand."""
        if name in self.attrs:
            return tuple(self.attrs[name])
        operand = self.optional(index)
        return None if operand is None else self.g.ints(operand, f"operand {index} ({name})")

    def refuse(self, what: str) -> UnsupportedOp:
        return UnsupportedOp(f"{what} is not supported")


Converter = Callable[[Call], Result]


def wrap_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front; InvalidModel when there is no such axis."""
    if not -rank <= axis < rank:
        raise InvalidModel(f"axis {axis} does not exist: the operand has {rank} axes")
    return axis % rank


def wrap_axes(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    wrapped = tuple(wrap_axis(a, rank) for a in axes)
    if len(set(wrapped)) != len(wrapped):
        raise InvalidModel(f"axes {list(axes)} repeat")
    return wrapped
