"""Fake quantisation is what ONNX computes, bit for bit; its gradients are those of LSQ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

torch = pytest.importorskip("torch", reason="compress needs the extra compress")

from sparsec.ir.ops import OPS  # noqa: E402
from sparsec.models.compress import rounding  # noqa: E402
from sparsec.models.compress.rounding import (  # noqa: E402
    PIECE,
    Round,
    Rounding,
    RoundProbabilities,
    RowRounding,
    WeightRounding,
    rounded_attention,
)
from sparsec.models.evaluate import evaluator  # noqa: E402
from sparsec.passes.quantize import affine_u8, quantize_weight  # noqa: E402

# Less than a piece, one and a half of them, rows that do not divide it.
SHAPES = [(1, 3), (2, 5, 7), (3, PIECE // 64, 32), (100, 999)]


def onnx_pair(x: Any, scale: Any, zero_point: Any, axis: int = 0) -> Any:
    """What QuantizeLinear and DequantizeLinear make of x."""
    names = ("x", "scale", "zero")
    nodes = [
        helper.make_node("QuantizeLinear", list(names), ["q"], axis=axis),
        helper.make_node("DequantizeLinear", ["q", *names[1:]], ["y"], axis=axis),
    ]
    values = dict(zip(names, (x, scale, zero_point), strict=True))
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in values.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)
    graph = helper.make_graph(nodes, "pair", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return evaluator(model, optimise=False)(values)["y"]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_activation_is_rounded_as_onnx_does(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    one = Rounding()
    one.set_range(-1.3, 2.9)
    scale = np.asarray(one.scale, np.float32)
    step = float(scale)
    assert (one.scale, one.zero_point) == pytest.approx(affine_u8(-1.3, 2.9), rel=1e-6)
    x = 2 * torch.randn(shape)  # many are outside
    x.view(-1)[::2] = torch.round(x.view(-1)[::2] / step) * step + step / 2  # ties
    expected = onnx_pair(x.numpy(), scale, np.asarray(one.zero_point, np.uint8))
    np.testing.assert_array_equal(one(x).detach().numpy(), expected)


@pytest.mark.parametrize("shape", [(5, 7), (100, 999), (3, 2 * PIECE)])
def test_a_weight_is_rounded_as_onnx_does(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[:, ::3] = 0
    weight[1] = 0
    one = WeightRounding(shape[0])
    one.fit(weight)
    scale = one.scale.numpy()
    rounded = one(weight).detach().numpy()
    most = 127 * scale[:, None]
    inside = np.clip(weight.numpy(), -most, most)  # ONNX has a step more below
    zeros = np.zeros(shape[0], np.int8)
    np.testing.assert_array_equal(rounded, onnx_pair(inside, scale, zeros))
    assert not rounded[:, ::3].any()
    assert not rounded[1].any()


def test_rows_are_rounded_as_the_compiler_rounds_tables() -> None:
    torch.manual_seed(0)
    table = torch.nn.Embedding(50, 24)
    table.weight.data[3] = 0
    rows = RowRounding()
    table.register_forward_hook(rows.round_result)
    numbers, scale = quantize_weight(table.weight.detach().numpy())
    expected = numbers.astype(np.float32) * scale[:, None]
    ids = torch.tensor([[3, 49], [0, 3]])
    np.testing.assert_array_equal(table(ids).detach().numpy(), expected[ids])
    rows.active = False
    np.testing.assert_array_equal(table(ids).detach(), table.weight[ids].detach())


def straight_through(x: Any, log_scale: Any, zero_share: Any) -> Any:
    """The definition, one torch operation at a time."""

    def rounded(t: Any) -> Any:
        return t + (t.round() - t).detach()

    scale = log_scale.exp()
    if zero_share is None:
        return rounded(x / scale).clamp(-127, 127) * scale
    zero_point = rounded(zero_share * 255)
    return ((rounded(x / scale) + zero_point).clamp(0, 255) - zero_point) * scale


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (300, 700)])
def test_gradients_are_those_of_the_definition(shape: tuple[int, int], per_row: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    scales = torch.rand(shape[0], 1) if per_row else torch.tensor(0.5)
    log_scale = (scales / 80).log().requires_grad_()
    zero_share = None if per_row else torch.tensor(0.31, requires_grad=True)
    parameters = [p for p in (x, log_scale, zero_share) if p is not None]
    g = torch.randn(shape)
    wanted = torch.autograd.grad(straight_through(x, log_scale, zero_share), parameters, g)
    got = torch.autograd.grad(Round.apply(x, log_scale, zero_share), parameters, g)
    # The definition divides by the scale and multiplies by it again.
    np.testing.assert_allclose(got[0], wanted[0], rtol=5e-7)
    for a, b in zip(got[1:], wanted[1:], strict=True):
        # Sums of up to 210,000 terms of both signs and of size up to 255, in fp32: an absolute
        # error of about sqrt(210,000) * 255 * 6e-8 is rounded up.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-2)


def test_probabilities_are_those_of_the_int8_kernel() -> None:
    """Queries of one, of equal and of very different scores, and one with a masked key."""
    torch.manual_seed(0)
    scores = 4 * torch.randn(2, 3, 5, 5)
    scores[0, 0, 0] = 1.0
    scores[1, :, :, 4] = torch.finfo(torch.float32).min
    scores.requires_grad_()
    p = RoundProbabilities.apply(scores)
    plain = scores.detach().numpy()
    steps = np.rint(255 * np.exp(plain - plain.max(-1, keepdims=True)))
    np.testing.assert_allclose(p.detach(), steps / steps.sum(-1, keepdims=True), rtol=1e-6)
    g = torch.randn(p.shape)
    (got,) = torch.autograd.grad(p, scores, g)
    p = p.detach()
    # The derivative of a softmax of these probabilities; rtol: sums of five in another order.
    wanted = p * (g - (g * p).sum(-1, keepdim=True))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)


class Holder(torch.nn.Module):  # type: ignore[misc]
    """A module that attention is computed for."""

    def __init__(self) -> None:
        super().__init__()
        self.rounding = rounding.AttentionRounding()


def test_attention_is_that_of_the_int8_op() -> None:
    torch.manual_seed(0)
    batch, heads, seq, size = 2, 3, 6, 4
    operands = [torch.randn(batch, seq, heads, size) for _ in "qkv"]
    mask = torch.zeros(batch, 1, 1, seq)
    mask[1, ..., 4:] = torch.finfo(torch.float32).min
    module = Holder().eval()
    for one, x in zip(module.rounding.operands, operands, strict=True):
        one.set_range(float(x.min()), float(x.max()))
        assert one.zero_point == 128
    with torch.no_grad():
        moved = [x.transpose(1, 2) for x in operands]
        context, _ = rounded_attention(module, *moved, mask, scaling=0.5)
    scales = [one.scale for one in module.rounding.operands]
    stored = [
        np.clip(np.rint(x.numpy() / np.float32(s)) + 128, 0, 255).astype(np.uint8)
        for x, s in zip(operands, scales, strict=True)
    ]
    attrs = {"heads": heads, "head_size": size, "scale": 0.5}
    attrs |= {f"{n}_offset": 0 for n in "qkv"}
    attrs |= {f"{n}_scale": s for n, s in zip("qkv", scales, strict=True)}
    flat = [x.reshape(batch, seq, -1) for x in stored]
    (wanted,) = OPS["attention_int8"].evaluate([*flat, mask.numpy()], attrs, {})
    # Sums of six products in another order; no probability lies on the edge between two steps.
    np.testing.assert_allclose(context.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_rounds_in_fp32() -> None:
    torch.manual_seed(0)
    one = Rounding()
    one.set_range(-3.0, 3.0)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = one(x.bfloat16())
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.detach(), one(x.bfloat16().float()).detach())


def test_an_empty_range_keeps_zero() -> None:
    for symmetric in (False, True):
        one = Rounding(symmetric=symmetric)
        assert math.isnan(one.scale)
        one.set_range(0.0, 0.0)
        assert one.scale == 1.0
        assert not one(torch.zeros(2, 2)).any()
