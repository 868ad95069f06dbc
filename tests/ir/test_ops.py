"""Every row of OPS: what `infer` says of symbolic shapes is what `evaluate` makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from sparsec.errors import InvalidGraph
from sparsec.ir import dims
from sparsec.ir.dims import minimum, symbol
from sparsec.ir.layouts import ROW_MAJOR, Panels
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType, TensorType

B, S, T = symbol("batch"), symbol("seq"), symbol("tokens")
ENV = {"batch": 2, "seq": 5, "tokens": 4}

F32, I64, BOOL, I8, U8 = DType.F32, DType.I64, DType.BOOL, DType.I8, DType.U8
BF16 = DType.BF16


@dataclass(frozen=True)
class Case:
    op: str
    shapes: tuple[Any, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    dtypes: tuple[DType, ...] = ()
    below: int = 2  # integer operands lie in [0, below)

    def types(self) -> list[TensorType | None]:
        dtypes = self.dtypes or (F32,) * len(self.shapes)
        pairs = zip(dtypes, self.shapes, strict=True)
        return [None if s is None else TensorType(d, s) for d, s in pairs]

    def arrays(self, rng: np.random.Generator) -> list[np.ndarray | None]:
        return [None if t is None else _random(rng, t, self.below) for t in self.types()]


def _random(rng: np.random.Generator, type: TensorType, below: int) -> np.ndarray:
    shape = tuple(dims.evaluate(d, ENV) for d in type.shape)
    if type.dtype.is_float or type.dtype is BF16:
        return (rng.random(shape) + 0.25).astype(type.dtype.numpy)
    return rng.integers(0, below, shape).astype(type.dtype.numpy)


BINARY = ((B, S, 8), (8,))
FLOAT_UNARY = tuple(
    """neg abs exp log sqrt reciprocal tanh erf sigmoid relu silu floor ceil round sign sin cos tan
    sinh cosh asin acos atan asinh acosh atanh softplus softsign mish hard_swish is_nan is_inf
    """.split()  # noqa: SIM905 (readable)
)
FLOAT_BINARY = tuple(
    """add sub mul div pow maximum minimum equal less less_equal greater greater_equal
    """.split()  # noqa: SIM905 (readable)
)
REDUCTIONS = ["reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_prod", "reduce_l2"]
HEADS = {"heads": 2, "head_size": 4, "scale": 0.5, "q_offset": 0, "k_offset": 8, "v_offset": 16}
PRODUCT = {
    "activation": "gelu",
    "x_scale": 0.1,
    "x_zero_point": 128,
    "out_scale": 0.2,
    "out_zero_point": 7,
}
INT8 = (U8, I8, F32, F32, F32)
CONV = {"strides": (2,), "dilations": (1,), "begins": (1,), "ends": (0,), "groups": 1}
CONV_2D = {
    "strides": (1, 2),
    "dilations": (2, 1),
    "begins": (2, 0),
    "ends": (1, 1),
    "groups": 2,
}
GATE = {"activation": "silu", "channels": 3, "offset": 4, "gate_offset": 1}
SLICE = {"axes": (1, 2), "starts": (1, 7), "ends": (S, -1), "steps": (2, -3)}

CASES = [
    *[Case(op, ((B, S, 8),)) for op in FLOAT_UNARY],
    *[Case(op, BINARY) for op in FLOAT_BINARY],
    *[Case(op, ((B, 1), (S,)), dtypes=(BOOL,) * 2) for op in ("logical_and", "logical_or")],
    Case("logical_xor", ((B, S), ()), dtypes=(BOOL,) * 2),
    Case("logical_not", ((B, S),), dtypes=(BOOL,)),
    Case("bitwise_not", ((B, S),), dtypes=(I64,)),
    *[Case(f"bitwise_{n}", ((B, S), (S,)), dtypes=(I64,) * 2) for n in ("and", "or", "xor")],
    Case("mod", BINARY, {"fmod": True}),
    Case("gelu", ((B, S, 8),), {"approximate": "none"}),
    Case("gelu", ((B, S, 8),), {"approximate": "tanh"}),
    Case("leaky_relu", ((B, 3),), {"alpha": 0.1}),
    Case("elu", ((B, 3),), {"alpha": 0.1}),
    Case("selu", ((B, 3),), {"alpha": 1.6, "gamma": 1.05}),
    Case("hard_sigmoid", ((B, 3),), {"alpha": 0.2, "beta": 0.5}),
    Case("clip", ((B, 3),), {"min": 0.5, "max": None}),
    Case("cast", ((B, 3),), {"to": DType.I32}),
    Case("where", ((B, 1, S), (), (S, S)), dtypes=(BOOL, F32, F32)),
    *[Case(op, ((B, S, 8),), {"axes": (0, 2), "keepdims": True}) for op in REDUCTIONS],
    *[Case(op, ((B, S, 8),), {"axes": (1,), "keepdims": False}) for op in REDUCTIONS],
    Case("arg_max", ((B, S),), {"axis": 1, "keepdims": True}),
    Case("arg_min", ((B, S),), {"axis": 0, "keepdims": False}),
    Case("softmax", ((B, S, 8),), {"axis": 1}),
    Case("log_softmax", ((B, S, 8),), {"axis": 2}),
    Case("cumsum", ((B, S),), {"axis": 1, "exclusive": False, "reverse": False}, (I64,)),
    Case("cumsum", ((B, S),), {"axis": 0, "exclusive": True, "reverse": True}),
    Case("reshape", ((B, S, 8),), {"shape": (B * S, 2, 4)}),
    Case("transpose", ((B, S, 8),), {"perm": (2, 0, 1)}),
    Case("broadcast_to", ((S, 1),), {"shape": (B, S, 4)}),
    Case("concat", ((B, S, 8), (B, 3, 8)), {"axis": 1}),
    Case("slice", ((B, S, 8),), SLICE),
    Case("gather", ((8, S), (B, 3)), {"axis": 0}, (F32, I64)),
    Case("gather_elements", ((B, S), (B, 3)), {"axis": 1}, (F32, I64)),
    Case("gather_nd", ((B, S, 8), (S, 2)), {"batch_dims": 0}, (F32, I64)),
    Case("gather_nd", ((B, S, 8), (B, 1)), {"batch_dims": 1}, (F32, I64)),
    Case("pad", ((B, S),), {"pads_before": (0, 2), "pads_after": (1, -1), "value": 7.0}),
    Case("trilu", ((B, S, S),), {"upper": True, "k": 1}),
    Case("one_hot", ((B, S), (2,)), {"depth": 3, "axis": 1}, (I64, F32)),
    Case("iota", (), {"start": 1, "step": 2, "length": S, "dtype": I64}),
    Case("dims", (), {"values": (B, S, 3, B * S), "dtype": I64, "shape": (2, 2)}),
    Case("matmul", ((B, 1, S, 8), (3, 8, 4))),
    Case("matmul", ((8,), (B, 8, 4))),
    Case("matmul", ((B, S, 8), (8,))),
    Case("linear", ((B, S, 8), (3, 8), (3,), (B, S, 3)), {"activation": "gelu"}),
    Case("linear", ((B, 8), (3, 8), None, None), {"activation": "none"}),
    Case("attention", ((B, S, 24),) * 3 + ((B, 1, 1, S),), HEADS),
    Case("layer_norm", ((B, S, 8), (8,), (8,), (B, S, 8)), {"epsilon": 1e-5}),
    Case("layer_norm", ((B, 8), (8,), None, None), {"epsilon": 1e-5}),
    Case(
        "layer_norm",
        ((B, S, 8), (8,), None, None),
        {"epsilon": 1e-5, "out_scale": 0.5, "out_zero_point": 3},
    ),
    Case(
        "attention",
        ((B, S, 24),) * 3 + (None,),
        {**HEADS, "out_scale": 0.5, "out_zero_point": 128},
    ),
    Case("quantize", ((B, S, 8),), {"scale": 0.5, "zero_point": -3, "dtype": I8}),
    Case("dequantize", ((B, S, 8),), {"scale": 0.5, "zero_point": 3}, (U8,)),
    Case("linear_int8", ((B, S, 8), (3, 8), (3,), (3,), (B, S, 3)), PRODUCT, INT8),
    Case("linear_int8", ((B, 8), (3, 8), (3,), None, None), {**PRODUCT, "out_scale": None}, INT8),
    Case(
        "linear_int8",
        ((B, S, 8), (3, 8), (3,), (3,), None, (B, S, 1)),
        {**PRODUCT, "out_scale": None},
        (*INT8, F32),
    ),
    Case("quantize_tokens", ((B, S, 8),), {"zero_point": 128}),
    Case("round_tokens", ((B, S, 8),), {"zero_point": 0}),
    Case("dynamic_quantize", ((B, S, 8),)),
    Case("matmul_integer", ((B, S, 8), (8, 3), (), (3,)), dtypes=(U8, I8, U8, I8)),
    Case("matmul_integer", ((B, 1, S, 8), (3, 8, 4), None, None), dtypes=(I8, U8, F32, F32)),
    Case(
        "attention_int8",
        ((B, S, 24),) * 3 + ((B, 1, 1, S),),
        {**HEADS, "q_scale": 0.1, "k_scale": 0.2, "v_scale": 0.3},
        (U8,) * 3 + (F32,),
    ),
    Case(
        "pack_tokens",
        ((B, S), (B, S)),
        {"tokens": T, "most": B * S, "seen": 0.5, "keep_first": True},
        (BOOL, F32),
    ),
    Case("unpack_tokens", ((1, T, 8), (T,), (B, S)), dtypes=(F32, I64, I64)),
    Case(
        "embedding_int8",
        ((B, S), (9, 4), None, (1, S), (5, 4), (5,)),
        {"zero_points": (0, 3)},
        (I64, F32, F32, I64, I8, F32),
    ),
    Case("to_bf16", ((B, S, 8),)),
    Case(
        "linear_bf16",
        ((B, S, 8), (3, 8), (3,), (B, S, 3)),
        {"activation": "gelu"},
        (BF16, BF16, F32, F32),
    ),
    Case(
        "linear_bf16",
        ((B, 8), (4, 8), (4,), None),
        {"activation": "none", "out_bf16": True},
        (BF16, BF16, F32, F32),
    ),
    Case("attention_bf16", ((B, S, 24),) * 3 + ((B, 1, 1, S),), HEADS, (BF16, BF16, BF16, F32)),
    Case("layer_norm", ((B, S, 4), (4,)), {"epsilon": 1e-5, "out_bf16": True}),
    Case("embedding", ((B, S), (9, 4), (1, S), (5, 4)), dtypes=(I64, F32, I64, F32)),
    Case("conv", ((B, 6, S), (4, 6, 3), (4,)), CONV),
    Case("conv", ((B, 6, S, 8), (4, 3, 2, 3), None), CONV_2D),
    Case("gated", ((B, S, 8),), GATE),
    Case("rotary", ((B, S, 9), (B, S, 4), (1, S, 4)), {"heads": 2, "head_size": 4, "offset": 1}),
    Case("to_panels", ((B, S, 8),), {"width": 64}),
    Case("from_panels", ((B, S, 8),)),
]


def test_every_op_has_a_case():
    assert {c.op for c in CASES} == set(OPS)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{len(c.shapes)}")
def test_infer_agrees_with_evaluate(case: Case, rng: np.random.Generator):
    spec = OPS[case.op]
    assert set(case.attrs) - set(spec.optional_attrs) == set(spec.attrs)
    types = spec.infer(case.types(), case.attrs)
    with np.errstate(all="ignore"):
        results = spec.evaluate(case.arrays(rng), case.attrs, ENV)
    env = ENV if spec.binds is None else {**ENV, "tokens": int(results[0])}
    for type, result in zip(types, results, strict=True):
        assert result.dtype == type.dtype.numpy
        assert result.shape == tuple(dims.evaluate(d, env) for d in type.shape)


def evaluate(op: str, *arrays: Any, **attrs: Any) -> np.ndarray:
    (result,) = OPS[op].evaluate([None if a is None else np.asarray(a) for a in arrays], attrs, {})
    return result


def test_integer_division_truncates():
    got = evaluate("div", np.array([7, -7, 7, -7]), np.array([2, 2, -2, -2]))
    assert got.tolist() == [3, -3, -3, 3]


def test_round_is_half_to_even():
    x = np.array([0.5, 1.5, 2.5, -0.5], np.float32)
    assert evaluate("round", x).tolist() == [0, 2, 2, 0]


def test_softmax_of_a_row_of_minus_infinity_is_nan():
    x = np.array([[0.0, -np.inf], [-np.inf, -np.inf]], np.float32)
    got = evaluate("softmax", x, axis=1)
    assert got[0].tolist() == [1.0, 0.0]
    assert np.isnan(got[1]).all()


def test_cumsum_exclusive_and_reverse():
    x = np.array([1, 2, 3, 4])
    flags = {"exclusive": True, "reverse": False, "axis": 0}
    assert evaluate("cumsum", x, **flags).tolist() == [0, 1, 3, 6]
    assert evaluate("cumsum", x, **{**flags, "reverse": True}).tolist() == [9, 7, 4, 0]


def test_slice_backwards_to_the_first_element():
    x = np.arange(6)
    got = evaluate("slice", x, axes=(0,), starts=(4,), ends=(-1,), steps=(-2,))
    assert got.tolist() == [4, 2, 0]


def test_gather_counts_negative_indices_from_the_end():
    assert evaluate("gather", np.arange(5), np.array([-1, 0]), axis=0).tolist() == [4, 0]


@pytest.mark.parametrize("bad", [5, -6])
def test_gather_refuses_an_index_outside(bad: int):
    with pytest.raises(IndexError, match=str(bad)):
        evaluate("gather", np.arange(5), np.array([0, bad]), axis=0)


def test_embedding_refuses_an_id_outside_of_any_table():
    table = np.ones((4, 2), np.float32)
    with pytest.raises(IndexError, match="index 4"):
        evaluate("embedding", np.array([1]), table, np.array([4]), table)


def test_attention_equals_its_spelled_out_form(rng: np.random.Generator):
    batch, seq, heads, size = 2, 5, 3, 4
    qkv = rng.standard_normal((batch, seq, 3 * heads * size)).astype(np.float32)
    mask = np.where(rng.random((batch, 1, 1, seq)) < 0.3, -1e9, 0).astype(np.float32)
    width = heads * size
    offsets = {"q_offset": 0, "k_offset": width, "v_offset": 2 * width}
    attrs = {"heads": heads, "head_size": size, "scale": 0.5, **offsets}
    got = evaluate("attention", qkv, qkv, qkv, mask, **attrs)
    for b in range(batch):
        for h in range(heads):
            q, k, v = (
                qkv[b, :, o + h * size : o + (h + 1) * size].astype(np.float64)
                for o in (0, width, 2 * width)
            )
            powers = np.exp(0.5 * q @ k.T + mask[b, 0])
            expected = powers / powers.sum(-1, keepdims=True) @ v
            # fp32 sums over 5 keys and 4 channels
            np.testing.assert_allclose(
                got[b, :, h * size : (h + 1) * size], expected, rtol=0, atol=2e-6
            )


def test_layer_norm_adds_the_residual_first(rng: np.random.Generator):
    x, r = rng.standard_normal((2, 3, 8)), rng.standard_normal((2, 3, 8))
    gamma, beta = rng.standard_normal(8), rng.standard_normal(8)
    total = x + r
    mean, variance = total.mean(-1, keepdims=True), total.var(-1, keepdims=True)
    expected = (total - mean) / np.sqrt(variance + 1e-5) * gamma + beta
    got = evaluate("layer_norm", x, gamma, beta, r, epsilon=1e-5)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)  # float64


REFUSALS = [
    (Case("add", ((B, S), (B, 7))), r"\[batch, seq\] and \[batch, 7\]"),
    (Case("add", ((3,), (4,))), "differ"),
    (Case("add", ((3,), (3,)), dtypes=(F32, I64)), "dtypes f32 and i64"),
    (Case("exp", ((3,),), dtypes=(I64,)), "float"),
    (Case("matmul", ((B, 3), (4, 2))), "inner dims"),
    (Case("reshape", ((B, S),), {"shape": (B, 7)}), "elements"),
    (Case("transpose", ((B, S),), {"perm": (0, 0)}), "permutation"),
    (Case("softmax", ((B, S),), {"axis": 2}), "axis 2"),
    (Case("concat", ((B, 3), (4, 3)), {"axis": 1}), "axis 0"),
    (Case("reduce_max", ((S - 1,),), {"axes": (0,), "keepdims": False}), "may be empty"),
    (Case("linear", ((B, 8), (3, 9), None, None), {"activation": "none"}), "columns"),
    (Case("attention", ((B, S, 20),) * 3 + (None,), HEADS), "channels 16..24 of v"),
    (Case("layer_norm", ((B, 8), (9,), None, None), {"epsilon": 0.0}), "gamma"),
]


@pytest.mark.parametrize(("case", "message"), REFUSALS, ids=[c.op for c, _ in REFUSALS])
def test_infer_refuses(case: Case, message: str):
    with pytest.raises(InvalidGraph, match=message):
        OPS[case.op].infer(case.types(), case.attrs)


def test_panels_go_through_elementwise_ops_when_all_full_operands_have_them():
    rows = TensorType(F32, (B, S, 8))
    panels = rows.with_layout(Panels())
    bias = TensorType(F32, (8,))
    layout = [OPS["add"].infer(t, {})[0].layout for t in ([panels, bias], [panels, rows])]
    assert layout == [Panels(), ROW_MAJOR]


def test_panel_ops_keep_the_layout_of_their_operands():
    rows = TensorType(F32, (B, S, 8))
    for x in (rows, rows.with_layout(Panels())):
        weight = TensorType(F32, (3, 8))
        (y,) = OPS["linear"].infer([x, weight, None, None], {"activation": "none"})
        assert y.layout == x.layout
    (changed,) = OPS["to_panels"].infer([rows], {"width": 32})
    assert changed.layout == Panels(32)
    assert OPS["from_panels"].infer([changed], {})[0].layout == ROW_MAJOR


def test_a_clamped_dim_is_known_to_be_positive():
    x = TensorType(F32, (minimum(S, 128),))
    (y,) = OPS["reduce_max"].infer([x], {"axes": (0,), "keepdims": True})
    assert y.shape == (1,)
