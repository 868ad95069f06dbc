"""ONNX reductions, scans and softmax."""

from __future__ import annotations

from sparsec.errors import UnsupportedOp
from sparsec.frontend.builder import Operand
from sparsec.frontend.call import Call, Converter, wrap_axes, wrap_axis
from sparsec.ir.dims import product
from sparsec.ir.types import DType


def reduction(op: str, before: str | None = None, after: str | None = None) -> Converter:
    """A reduction: axes as attribute or operand, with a unary op before or after it."""

    def convert(call: Call) -> Operand:
        x = call.input(0)
        x = x if before is None else _before(call, x, before)
        result = _reduced(call, op, x, _axes(call))
        return result if after is None else call.g.add(after, [result])

    return convert


def _axes(call: Call) -> tuple[int, ...]:
    """Those to reduce, in order: where none is given all, or none with `noop_with_empty_axes`."""
    given = wrap_axes(call.ints("axes", 1) or (), call.rank())
    is_noop = not given and call.attr("noop_with_empty_axes", 0)
    return tuple(sorted(given)) if given or is_noop else tuple(range(call.rank()))


def _before(call: Call, x: Operand, op: str) -> Operand:
    return call.g.add("mul", [x, x]) if op == "square" else call.g.add(op, [x])


def _reduced(call: Call, op: str, x: Operand, axes: tuple[int, ...]) -> Operand:
    keepdims = bool(call.attr("keepdims", 1))
    if not axes:
        return x
    if x.type.dtype is DType.BOOL:  # opset 20: ReduceMax and ReduceMin of bools
        small = call.g.add(op, [call.g.cast(x, DType.U8)], axes=axes, keepdims=keepdims)
        return call.g.cast(small, DType.BOOL)
    return call.g.add(op, [x], axes=axes, keepdims=keepdims)


def log_sum_exp(call: Call) -> Operand:
    """max + log(sum(exp(x - max))), which does not overflow."""
    x = call.input(0)
    wrapped = _axes(call)
    if not wrapped:
        return x
    top = call.g.add("reduce_max", [x], axes=wrapped, keepdims=True)
    powers = call.g.add("exp", [call.g.add("sub", [x, top])])
    total = call.g.add("reduce_sum", [powers], axes=wrapped, keepdims=True)
    result = call.g.add("add", [top, call.g.add("log", [total])])
    if call.attr("keepdims", 1):
        return result
    shape = [d for i, d in enumerate(result.type.shape) if i not in wrapped]
    return call.g.reshape(result, shape)


def arg(op: str) -> Converter:
    def convert(call: Call) -> Operand:
        if call.attr("select_last_index", 0):
            raise UnsupportedOp(f"{call.op_type} with select_last_index=1 is not supported")
        keepdims = bool(call.attr("keepdims", 1))
        return call.g.add(op, [call.input(0)], axis=call.axis(0), keepdims=keepdims)

    return convert


def softmax(op: str) -> Converter:
    """Before opset 13 all axes from `axis` on are flattened into one."""

    def convert(call: Call) -> Operand:
        x = call.input(0)
        if call.opset >= 13:
            return call.g.add(op, [x], axis=call.axis(-1))
        axis, shape = call.axis(1) if x.type.rank > 1 else 0, x.type.shape
        if axis == x.type.rank - 1:
            return call.g.add(op, [x], axis=axis)
        flat = call.g.reshape(x, [product(shape[:axis]), product(shape[axis:])])
        return call.g.reshape(call.g.add(op, [flat], axis=1), shape)

    return convert


def cumsum(call: Call) -> Operand:
    (axis,) = call.g.ints(call.input(1), "the axis of CumSum")
    flags = {name: bool(call.attr(name, 0)) for name in ("exclusive", "reverse")}
    return call.g.add("cumsum", [call.input(0)], axis=wrap_axis(axis, call.rank()), **flags)


REDUCE: dict[str, Converter] = {
    "ArgMax": arg("arg_max"),
    "ArgMin": arg("arg_min"),
    "CumSum": cumsum,
    "LogSoftmax": softmax("log_softmax"),
    "ReduceL1": reduction("reduce_sum", before="abs"),
    "ReduceL2": reduction("reduce_l2"),
    "ReduceLogSum": reduction("reduce_sum", after="log"),
    "ReduceLogSumExp": log_sum_exp,
    "ReduceMax": reduction("reduce_max"),
    "ReduceMean": reduction("reduce_mean"),
    "ReduceMin": reduction("reduce_min"),
    "ReduceProd": reduction("reduce_prod"),
    "ReduceSum": reduction("reduce_sum"),
    "ReduceSumSquare": reduction("reduce_sum", before="square"),
    "Softmax": softmax("softmax"),
}
