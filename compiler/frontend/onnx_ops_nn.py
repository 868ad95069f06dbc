"""ONNX matrix products and normalisations."""

from __future__ import annotations

from sparsec.errors import UnsupportedOp
from sparsec.frontend import einsum as einsum_terms
from sparsec.frontend.builder import Builder, Operand
from sparsec.frontend.call import Call, Converter
from sparsec.frontend.onnx_ops_math import quantised


def matmul(call: Call) -> Operand:
    return call.g.add("matmul", [call.input(0), call.input(1)])


def gemm(call: Call) -> Operand:
    """alpha * a @ b + beta * c, either operand transposed."""
    g = call.g
    a = g.transpose(call.input(0), (1, 0)) if call.attr("transA", 0) else call.input(0)
    b = g.transpose(call.input(1), (1, 0)) if call.attr("transB", 0) else call.input(1)
    result = _scaled(call, g.add("matmul", [a, b]), call.attr("alpha", 1.0))
    c = call.optional(2)
    beta = call.attr("beta", 1.0)
    return result if c is None or beta == 0 else g.add("add", [result, _scaled(call, c, beta)])


def _scaled(call: Call, x: Operand, factor: float) -> Operand:
    if factor == 1.0:
        return x
    return call.g.add("mul", [x, call.g.scalar(factor, x.type.dtype)])


def einsum(call: Call) -> Operand:
    return einsum_terms.einsum(call.g, call.required("equation"), call.present())


def layer_norm(call: Call) -> list[Operand | None]:
    """One op over the last axis; spelled out for more axes or when the statistics are read."""
    x, gamma, beta = call.input(0), call.input(1), call.optional(2)
    axis, epsilon = call.axis(-1), call.attr("epsilon", 1e-5)
    per_channel = all(p is None or p.type.shape == x.type.shape[-1:] for p in (gamma, beta))
    if axis == x.type.rank - 1 and per_channel and not any(call.outputs[1:]):
        return [call.g.add("layer_norm", [x, gamma, beta, None], epsilon=epsilon)]
    return _spelled_out(call, x, axis, epsilon)


def _spelled_out(call: Call, x: Operand, axis: int, epsilon: float) -> list[Operand | None]:
    g, axes = call.g, tuple(range(axis, x.type.rank))
    average = g.add("reduce_mean", [x], axes=axes, keepdims=True)
    centred = g.add("sub", [x, average])
    square = g.add("mul", [centred, centred])
    variance = g.add("reduce_mean", [square], axes=axes, keepdims=True)
    shifted = g.add("add", [variance, g.scalar(epsilon, x.type.dtype)])
    inverse = g.add("reciprocal", [g.add("sqrt", [shifted])])
    normal = g.add("mul", [centred, inverse])
    result = g.add("mul", [normal, call.input(1)])
    beta = call.optional(2)
    return [result if beta is None else g.add("add", [result, beta]), average, inverse]


def simplified_layer_norm(call: Call) -> list[Operand | None]:
    """What ONNX Runtime makes of an RMS norm, in the standard's domain; 1 / rms is its second."""
    x = call.input(0)
    axes = tuple(range(call.axis(-1), x.type.rank))
    epsilon = call.attr("epsilon", 1e-5)
    return list(root_mean_square(call.g, x, call.input(1), axes, epsilon))


def root_mean_square(
    g: Builder, x: Operand, gamma: Operand, axes: tuple[int, ...], epsilon: float
) -> tuple[Operand, Operand]:
    """gamma * x / rms(x), and 1 / rms(x)"""
    mean = g.add("reduce_mean", [g.add("mul", [x, x])], axes=axes, keepdims=True)
    shifted = g.add("add", [mean, g.scalar(epsilon, x.type.dtype)])
    inverse = g.add("reciprocal", [g.add("sqrt", [shifted])])
    return g.add("mul", [g.add("mul", [x, inverse]), gamma]), inverse


def batch_norm(call: Call) -> Operand:
    """Inference: scale and shift per channel (axis 1) by the stored statistics."""
    if call.attr("training_mode", 0) or any(call.outputs[1:]):
        raise UnsupportedOp("training mode is not supported; export the model with eval()")
    g, x = call.g, call.input(0)
    tail = [1] * max(call.rank() - 2, 0)
    scale, shift, mean, variance = (
        g.reshape(call.input(i), [call.shape()[1], *tail]) for i in range(1, 5)
    )
    epsilon = g.scalar(call.attr("epsilon", 1e-5), x.type.dtype)
    factor = g.add("div", [scale, g.add("sqrt", [g.add("add", [variance, epsilon])])])
    offset = g.add("sub", [shift, g.add("mul", [mean, factor])])
    return g.add("add", [g.add("mul", [x, factor]), offset])


NN: dict[str, Converter] = {
    "BatchNormalization": batch_norm,
    "ConvInteger": quantised,
    "Einsum": einsum,
    "Gemm": gemm,
    "LayerNormalization": layer_norm,
    "SimplifiedLayerNormalization": simplified_layer_norm,
    "MatMul": matmul,
    "QLinearConv": quantised,
}
