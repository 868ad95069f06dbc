"""ONNX ops that select elements by index."""

from __future__ import annotations

from sparsec.frontend.builder import Operand
from sparsec.frontend.call import Call, Converter, wrap_axis
from sparsec.ir.types import DType


def gather(call: Call) -> Operand:
    return call.g.add("gather", [call.input(0), call.input(1)], axis=call.axis(0))


def gather_elements(call: Call) -> Operand:
    return call.g.add("gather_elements", [call.input(0), call.input(1)], axis=call.axis(0))


def gather_nd(call: Call) -> Operand:
    batch = call.attr("batch_dims", 0)
    return call.g.add("gather_nd", [call.input(0), call.input(1)], batch_dims=batch)


def trilu(call: Call) -> Operand:
    offset = call.optional(1)
    k = 0 if offset is None else call.g.ints(offset, "k of Trilu")[0]
    x, upper = call.input(0), bool(call.attr("upper", 1))
    if x.type.dtype is not DType.BOOL:
        return call.g.add("trilu", [x], upper=upper, k=k)
    small = call.g.add("trilu", [call.g.cast(x, DType.U8)], upper=upper, k=k)
    return call.g.cast(small, DType.BOOL)


def one_hot(call: Call) -> Operand:
    (depth,) = call.g.dims(call.input(1), "the depth of OneHot")
    axis = wrap_axis(call.attr("axis", -1), call.rank() + 1)
    indices = call.input(0)
    if indices.type.dtype.is_float:
        indices = call.g.cast(indices, DType.I64)
    return call.g.add("one_hot", [indices, call.input(2)], depth=depth, axis=axis)


INDEX: dict[str, Converter] = {
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "OneHot": one_hot,
    "Trilu": trilu,
}
