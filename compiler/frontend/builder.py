"""Adds ops to the Graph being imported: folds constants, computes shapes, makes dims agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend import known
from sparsec.frontend.known import Known, Undecided
from sparsec.frontend.unify import Unifier
from sparsec.ir.dims import Dim
from sparsec.ir.graph import Graph, Value
from sparsec.ir.op_helpers import text
from sparsec.ir.op_spec import Array
from sparsec.ir.ops import OPS
from sparsec.ir.ops_int8 import moved_quant
from sparsec.ir.types import DType

Operand = Value | Known

_FOLD_ELEMENTS = 4096  # a folded constant may be this large whatever it was made of
_FOLD_GROWTH = 2  # or this many times what it was made of


class Builder:
    """`name` is the name of the ONNX node being converted: nodes of the Graph are named so."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.name = ""
        self._unifier = Unifier(graph)

    # operands

    def shape(self, operand: Operand) -> tuple[Dim, ...]:
        return operand.type.shape

    def value(self, operand: Operand) -> Value:
        """The operand as a Value: shape arithmetic that data ops read becomes a `dims` node."""
        if isinstance(operand, Value):
            return operand
        if operand.is_number:
            return self.constant(operand.numbers())
        values = tuple(self._unifier.resolve(d) for d in operand.data.reshape(-1))
        attrs = {"values": values, "dtype": operand.dtype, "shape": operand.data.shape}
        return self.graph.add("dims", [], attrs, name=self.name)

    def constant(self, data: Array) -> Value:
        return self.graph.add_constant(data, f"{self.name}.const" if self.name else "const")

    def scalar(self, number: float, dtype: DType) -> Value:
        """A constant of rank 0."""
        return self.constant(np.asarray(number, dtype.numpy))

    def known(self, operand: Operand) -> Known | None:
        """The operand as known dims, or None when it is data."""
        if isinstance(operand, Known):
            data = np.empty(operand.data.shape, object)
            data.reshape(-1)[:] = [self._unifier.resolve(d) for d in operand.data.reshape(-1)]
            return Known(data, operand.dtype)
        data_ = operand.data
        if data_ is None or data_.dtype.kind not in "iub" or data_.size > known.MAX_ELEMENTS:
            return None
        return known.from_numbers(data_)

    def dims(self, operand: Operand, what: str) -> tuple[Dim, ...]:
        """The elements of a rank 0 or 1 operand; UnsupportedOp when they depend on data."""
        item = self.known(operand)
        if item is None:
            raise UnsupportedOp(
                f"{what} depends on the data, so the shape of the result is not known before the "
                "model runs; export the model so that it depends on input shapes only"
            )
        return tuple(item.data.reshape(-1))

    def ints(self, operand: Operand, what: str) -> tuple[int, ...]:
        """The elements of a constant operand; UnsupportedOp when it is not one."""
        items = self.dims(operand, what)
        if not all(isinstance(i, int) for i in items):
            raise UnsupportedOp(f"{what} is {text(items)}; it must be constant")
        return tuple(int(i) for i in items if isinstance(i, int))

    # nodes

    def add(self, op: str, operands: Sequence[Operand | None], **attrs: Any) -> Operand:
        """The result of an op: known dims, a folded constant or the output of a new node."""
        result = self._known_result(op, operands, attrs)
        if result is not None:
            return self.constant(result.numbers()) if result.is_number else result
        values = [None if x is None else self.value(x) for x in operands]
        self._unifier.place = self.name
        self._unifier.operands(op, [v for v in values if v is not None], attrs)
        attrs = {name: self._unifier.resolve_all(item) for name, item in attrs.items()}
        folded = self._folded(op, values, attrs)
        if folded is not None:
            return self._folded_constant(op, values, attrs, folded)
        return self.graph.add(op, values, attrs, name=self.name or None)

    def reshape(self, x: Operand, shape: Sequence[Dim]) -> Operand:
        """`x` itself when it has that shape already."""
        if tuple(shape) == self.shape(x):
            return x
        return self.add("reshape", [x], shape=tuple(shape))

    def transpose(self, x: Operand, perm: Sequence[int]) -> Operand:
        if list(perm) == list(range(len(perm))):
            return x
        return self.add("transpose", [x], perm=tuple(perm))

    def cast(self, x: Operand, to: DType) -> Operand:
        return x if x.type.dtype is to else self.add("cast", [x], to=to)

    def broadcast_to(self, x: Operand, shape: Sequence[Dim]) -> Operand:
        return x if tuple(shape) == self.shape(x) else self.add("broadcast_to", [x], shape=shape)

    def joint_shape(self, shapes: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...]:
        """The broadcast of shapes, after making dims equal that must be."""
        self._unifier.place = self.name
        return self._unifier.broadcast(shapes)

    def equal(self, a: Dim, b: Dim) -> None:
        """Make two dims equal that must be, if a symbol can be replaced to do so."""
        self._unifier.equal(a, b)

    def slice(self, x: Operand, axis: int, start: Dim, end: Dim, step: int = 1) -> Operand:
        if step == 1 and start == 0 and end == self.shape(x)[axis]:
            return x
        return self.add("slice", [x], axes=(axis,), starts=(start,), ends=(end,), steps=(step,))

    def _known_result(
        self, op: str, operands: Sequence[Operand | None], attrs: Mapping[str, Any]
    ) -> Known | None:
        present = [x for x in operands if x is not None]
        if not any(isinstance(x, Known) for x in present) or len(present) != len(operands):
            return None
        items = [k for k in map(self.known, present) if k is not None]
        if len(items) != len(present):
            return None
        try:
            return known.evaluate(op, items, attrs)
        except Undecided:
            return None

    def _folded(
        self, op: str, values: Sequence[Value | None], attrs: Mapping[str, Any]
    ) -> Array | None:
        data = [None if v is None else v.data for v in values]
        if any(v is not None and v.data is None for v in values):
            return None
        (type,) = OPS[op].infer([None if v is None else v.type for v in values], attrs)
        if not all(isinstance(d, int) for d in type.shape) or _has_symbols(attrs):
            return None
        source = sum(d.size for d in data if d is not None)
        limit = max(_FOLD_ELEMENTS, _FOLD_GROWTH * source)
        if not isinstance(type.elements, int) or type.elements > limit:
            return None
        try:
            (result,) = OPS[op].evaluate(data, attrs, {})
        except (IndexError, ValueError) as error:
            raise InvalidModel(f"its constant operands do not fit: {error}") from error
        return result

    def _folded_constant(
        self, op: str, values: Sequence[Value | None], attrs: Mapping[str, Any], data: Array
    ) -> Value:
        value = self.graph.add_constant(data, self._folded_name(values))
        if values and values[0] is not None:
            quant = moved_quant(op, values[0].type, attrs)
            self.graph.set_type(value, replace(value.type, quant=quant))
        return value

    def _folded_name(self, values: Sequence[Value | None]) -> str:
        """The name of the largest constant it is made of: weights keep theirs."""
        sources = [v for v in values if v is not None and v.data is not None and v.data.ndim]
        largest = max(
            sources, key=lambda v: v.data.size if v.data is not None else 0, default=None
        )
        return largest.name if largest is not None else f"{self.name}.const"


def _has_symbols(attrs: Mapping[str, Any]) -> bool:
    items = [i for v in attrs.values() for i in (v if isinstance(v, tuple) else (v,))]
    return any(not isinstance(i, (int, float, str, DType, type(None))) for i in items)
