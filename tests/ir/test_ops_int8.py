"""The quantised ops: exact integers, one rounding where one is promised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.errors import InvalidGraph
from sparsec.ir import ops_int8
from sparsec.ir.dims import symbol
from sparsec.ir.fma import fma_f32
from sparsec.ir.graph import Graph
from sparsec.ir.layouts import Bsr, Panels
from sparsec.ir.ops import OPS
from sparsec.ir.printer import print_graph
from sparsec.ir.types import DType, QuantParams, TensorType
from sparsec.ir.verifier import verify

B, S = symbol("batch"), symbol("seq")
F32, U8, I8 = DType.F32, DType.U8, DType.I8
PLAIN = {"activation": "none", "out_scale": None, "out_zero_point": 0}


def evaluate(op: str, *arrays: Any, **attrs: Any) -> list[np.ndarray]:
    return OPS[op].evaluate([None if a is None else np.asarray(a) for a in arrays], attrs, {})


@pytest.mark.parametrize("dtype", [U8, I8])
@pytest.mark.parametrize("zero_point", [0, 100, 127])
def test_quantize_rounds_half_to_even_and_clips(dtype: DType, zero_point: int):
    x = np.float32([0.25, 0.75, -0.25, -0.75, 1.2, 1e9, -1e9, np.inf, -np.inf, 3e38])
    (got,) = evaluate("quantize", x, scale=0.5, zero_point=zero_point, dtype=dtype)
    low, high = np.iinfo(dtype.numpy).min, np.iinfo(dtype.numpy).max
    steps = [0, 2, 0, -2, 2, 1000, -1000, 1000, -1000, 1000]  # round() of x / 0.5, or far out
    assert got.tolist() == [min(max(n + zero_point, low), high) for n in steps]
    assert got.dtype == dtype.numpy


def test_quantize_multiplies_by_the_reciprocal_in_fp32(rng: np.random.Generator):
    x, scale = rng.standard_normal(10000).astype(np.float32), 0.013
    (got,) = evaluate("quantize", x, scale=scale, zero_point=128, dtype=U8)
    products = x * np.float32(1.0 / np.float64(np.float32(scale)))
    assert products.dtype == np.float32
    np.testing.assert_array_equal(got, np.clip(np.rint(products).astype(int) + 128, 0, 255))


def test_nan_is_stored_as_the_lowest():
    (got,) = evaluate("quantize", np.float32([np.nan]), scale=1.0, zero_point=9, dtype=U8)
    assert got.tolist() == [0]


def test_dequantize_inverts_quantize_on_every_stored_number():
    stored = np.arange(256, dtype=np.uint8)
    (real,) = evaluate("dequantize", stored, scale=0.037, zero_point=77)
    (again,) = evaluate("quantize", real, scale=0.037, zero_point=77, dtype=U8)
    np.testing.assert_array_equal(again, stored)


def product(rng: np.random.Generator, tokens: int = 7, k: int = 96, m: int = 5) -> list[Any]:
    x = rng.integers(0, 256, (tokens, k)).astype(np.uint8)
    w = rng.integers(-127, 128, (m, k)).astype(np.int8)
    scale = rng.random(m).astype(np.float32) / 100
    bias = rng.standard_normal(m).astype(np.float32)
    return [x, w, scale, bias, rng.standard_normal((tokens, m)).astype(np.float32)]


def test_a_plain_product_joins_its_scales_before_it_is_stored(rng: np.random.Generator):
    """As ONNX Runtime's QLinearMatMul: one rounding between the sum and the step."""
    x, w, scale, bias, _ = product(rng)
    attrs = {**PLAIN, "x_scale": 0.02, "x_zero_point": 130}
    attrs |= {"out_scale": 0.05, "out_zero_point": 30}
    sums = ((x.astype(np.int64) - 130) @ w.T.astype(np.int64)).astype(np.float32)
    joined = np.float32(0.02) * scale / np.float32(0.05)
    for given, start in ((None, np.float32(0)), (bias, bias / np.float32(0.05))):
        (got,) = evaluate("linear_int8", x, w, scale, given, None, **attrs)
        steps = np.rint(fma_f32(sums, joined, start))
        np.testing.assert_array_equal(got, np.clip(steps + 30, 0, 255))
    # Where the joined scale is too large for fp32 the result is scaled in two steps.
    attrs |= {"out_scale": 2e-37, "x_scale": 1e3}
    (got,) = evaluate("linear_int8", x, w, np.full_like(scale, 1e3), None, None, **attrs)
    assert set(got[sums != 0]) <= {0, 255}
    assert (got[sums == 0] == 30).all()


def test_scales_of_tokens_multiply_sums_first(rng: np.random.Generator):
    x, w, scale, bias, residual = product(rng)
    attrs = {**PLAIN, "x_scale": 1.0, "x_zero_point": 130}
    tokens = rng.random((len(x), 1)).astype(np.float32)
    sums = ((x.astype(np.int64) - 130) @ w.T.astype(np.int64)).astype(np.float32)
    (got,) = evaluate("linear_int8", x, w, scale, bias, residual, tokens, **attrs)
    np.testing.assert_array_equal(got, fma_f32(sums * tokens, scale, bias) + residual)


@pytest.mark.parametrize("zero_point", [0, 16, 128])
def test_tokens_have_the_finest_scale_that_holds_them(rng: np.random.Generator, zero_point: int):
    x = rng.standard_normal((50, 30)).astype(np.float32)
    x = np.abs(x) if zero_point == 0 else x
    stored, scale = evaluate("quantize_tokens", x, zero_point=zero_point)
    real = (stored.astype(np.float32) - zero_point) * scale
    assert (np.abs(real - x) <= 0.5001 * scale).all()
    ends = (stored.max(axis=1) == 255) | (stored.min(axis=1) == 0)
    assert ends.all()


@pytest.mark.parametrize("zero_point", [-1, 255])
def test_a_zero_point_of_tokens_leaves_levels_above_it(zero_point: int):
    with pytest.raises(InvalidGraph, match=r"0\.\.254"):
        OPS["quantize_tokens"].infer([TensorType(F32, (B, S, 8))], {"zero_point": zero_point})


def test_linear_int8_is_an_exact_sum_and_one_fma(rng: np.random.Generator):
    x, w, scale, bias, residual = product(rng)
    attrs = {**PLAIN, "x_scale": 0.02, "x_zero_point": 130}
    sums = (x.astype(np.int64) - 130) @ w.T.astype(np.int64)
    wanted = fma_f32(sums.astype(np.float32), np.float32(0.02) * scale, bias)
    (got,) = evaluate("linear_int8", x, w, scale, bias, None, **attrs)
    np.testing.assert_array_equal(got, wanted)
    (got,) = evaluate("linear_int8", x, w, scale, bias, residual, **attrs)
    np.testing.assert_array_equal(got, wanted + residual)
    stored = {"out_scale": 0.05, "out_zero_point": 30}
    (got,) = evaluate("linear_int8", x, w, scale, bias, residual, **(attrs | stored))
    (again,) = evaluate("quantize", wanted + residual, scale=0.05, zero_point=30, dtype=U8)
    np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize(("dtype", "least"), [(I8, -128), (DType.I16, -255)], ids=str)
def test_the_deepest_product_does_not_overflow(dtype: DType, least: int):
    """The largest sum at the greatest depth fits int32; one column more is refused."""
    k = ops_int8.MAX_DEPTHS[dtype]
    assert 255 * -least * k < 2**31
    x, w = np.full((1, k), 255, np.uint8), np.full((1, k), least, dtype.numpy)
    attrs = {**PLAIN, "x_scale": 1.0, "x_zero_point": 0}
    (got,) = evaluate("linear_int8", x, w, np.float32([1]), None, None, **attrs)
    assert got.tolist() == [[255 * least * k]]
    types = [TensorType(U8, (B, k + 1)), TensorType(dtype, (1, k + 1)), TensorType(F32, (1,))]
    with pytest.raises(InvalidGraph, match="overflow int32"):
        OPS["linear_int8"].infer([*types, None, None], attrs)


def test_chunks_of_tokens_do_not_show(rng: np.random.Generator, monkeypatch: Any):
    operands = product(rng)
    attrs = {**PLAIN, "activation": "gelu", "x_scale": 0.02, "x_zero_point": 130}
    (whole,) = evaluate("linear_int8", *operands, **attrs)
    monkeypatch.setattr(ops_int8, "_CHUNK", 11)  # two tokens of five channels
    np.testing.assert_array_equal(evaluate("linear_int8", *operands, **attrs)[0], whole)


def test_the_second_result_of_layer_norm_is_the_first_quantised(rng: np.random.Generator):
    x, gamma = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 8), (8,)))
    (plain,) = evaluate("layer_norm", x, gamma, None, None, epsilon=1e-5)
    stored = {"out_scale": 0.02, "out_zero_point": 120}
    first, second = evaluate("layer_norm", x, gamma, None, None, epsilon=1e-5, **stored)
    np.testing.assert_array_equal(first, plain)
    (wanted,) = evaluate("quantize", plain, scale=0.02, zero_point=120, dtype=U8)
    np.testing.assert_array_equal(second, wanted)


def test_attention_is_stored_quantised(rng: np.random.Generator):
    qkv = rng.standard_normal((2, 5, 24)).astype(np.float32)
    attrs = {"heads": 2, "head_size": 4, "scale": 0.5}
    attrs |= {"q_offset": 0, "k_offset": 8, "v_offset": 16}
    (plain,) = evaluate("attention", qkv, qkv, qkv, None, **attrs)
    (got,) = evaluate(
        "attention", qkv, qkv, qkv, None, **attrs, out_scale=0.02, out_zero_point=120
    )
    (wanted,) = evaluate("quantize", plain, scale=0.02, zero_point=120, dtype=U8)
    np.testing.assert_array_equal(got, wanted)


BAD_SCALES = [0.0, -1.0, float("nan"), float("inf"), 1e-40, 1e38]


@pytest.mark.parametrize("scale", BAD_SCALES)
def test_scales_are_positive_numbers_of_fp32(scale: float):
    attrs = {"scale": scale, "zero_point": 0, "dtype": U8}
    with pytest.raises(InvalidGraph, match="positive finite"):
        OPS["quantize"].infer([TensorType(F32, (B, 8))], attrs)


@pytest.mark.parametrize(("dtype", "zero_point"), [(U8, -1), (U8, 256), (I8, 128), (I8, -129)])
def test_zero_points_are_stored_numbers(dtype: DType, zero_point: int):
    attrs = {"scale": 1.0, "zero_point": zero_point, "dtype": dtype}
    with pytest.raises(InvalidGraph, match="outside"):
        OPS["quantize"].infer([TensorType(F32, (B, 8))], attrs)


X = TensorType(U8, (B, S, 8), Panels(), QuantParams((0.5,), (3,)))
W, SCALE = TensorType(I8, (4, 8)), TensorType(F32, (4,))
READ = {**PLAIN, "x_scale": 0.5, "x_zero_point": 3}


def test_results_follow_the_layout_of_x_and_carry_their_scale():
    (y,) = OPS["linear_int8"].infer([X, W, SCALE, None, None], READ)
    assert y == TensorType(F32, (B, S, 4), Panels())
    attrs = {**READ, "out_scale": 0.25, "out_zero_point": 9}
    (y,) = OPS["linear_int8"].infer([X, W, SCALE, None, None], attrs)
    assert y == TensorType(U8, (B, S, 4), Panels(), QuantParams((0.25,), (9,)))
    (real,) = OPS["dequantize"].infer([X], {"scale": 0.5, "zero_point": 3})
    assert real == TensorType(F32, (B, S, 8), Panels())


REFUSALS = [
    ([X, W, SCALE, None, None], {**READ, "x_scale": 0.25}, "is read with"),
    ([X, W, SCALE, None, None], {**READ, "activation": "sine"}, "no activation"),
    ([X.with_dtype(I8), W, SCALE, None, None], READ, "x in u8 and w in i8"),
    ([X, TensorType(I8, (4, 9)), SCALE, None, None], READ, "columns of the weight"),
    ([X, W, TensorType(F32, (3,)), None, None], READ, "w_scale"),
    ([X, W, SCALE, TensorType(F32, (8,)), None], READ, "bias"),
    ([X, W, SCALE, None, TensorType(F32, (B, S, 8))], READ, "residual"),
]


@pytest.mark.parametrize(("types", "attrs", "message"), REFUSALS, ids=[r[2] for r in REFUSALS])
def test_linear_int8_refuses(types: list[Any], attrs: dict[str, Any], message: str):
    with pytest.raises(InvalidGraph, match=message):
        OPS["linear_int8"].infer(types, attrs)


def test_only_fp32_is_quantised_on_the_way_out():
    types = [TensorType(DType.F64, (B, 8)), TensorType(DType.F64, (8,)), None, None]
    with pytest.raises(InvalidGraph, match="only f32"):
        OPS["layer_norm"].infer(types, {"epsilon": 0.0, "out_scale": 1.0})


def small() -> Graph:
    graph = Graph("small")
    x = graph.add_input("x", F32, (B, S, 8))
    w = graph.add_constant(np.ones((4, 8), np.int8), "w")
    scale = graph.add_constant(np.ones(4, np.float32), "scale")
    attrs = {"scale": 0.5, "zero_point": 3, "dtype": U8}
    stored = graph.add("quantize", [x], attrs)
    graph.add_output("y", graph.add("linear_int8", [stored, w, scale, None, None], READ))
    graph.set_type(w, w.type.with_layout(Bsr(4, 1)))
    return graph


def test_the_text_shows_layouts_and_scales():
    graph = small()
    verify(graph)
    text = print_graph(graph)
    assert "const %w : i8[4, 8] bsr4x1 sha" in text
    assert ": u8[batch, seq, 8] q(0.5, 3)\n" in text


def _other_scale(graph: Graph) -> None:
    value = graph.nodes[0].output
    quant = QuantParams((0.25,), (3,))
    graph.set_type(value, TensorType(U8, value.type.shape, quant=quant))


def _constant_in_panels(graph: Graph) -> None:
    w = graph.nodes[1].input(1)
    graph.set_type(w, w.type.with_layout(Panels()))


def _blocks_of_a_row(graph: Graph) -> None:
    scale = graph.nodes[1].input(2)
    graph.set_type(scale, scale.type.with_layout(Bsr(4, 1)))


def _few_scales(graph: Graph) -> None:
    w = graph.nodes[1].input(1)
    graph.set_type(w, TensorType(I8, (4, 8), quant=QuantParams((1.0,) * 3, (0,) * 3, 0)))


FAULTS = [
    (_other_scale, "%quantize has the type"),
    (_constant_in_panels, "%w is in panels"),
    (_blocks_of_a_row, "%scale is no matrix of blocks"),
    (_few_scales, "%w needs 4 scales"),
]


@pytest.mark.parametrize(("break_it", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_the_verifier_refuses(break_it: Any, message: str):
    graph = small()
    break_it(graph)
    with pytest.raises(InvalidGraph, match=message):
        verify(graph)


def look_up(rng: np.random.Generator) -> tuple[list[Any], tuple[int, ...]]:
    """Operands and zero points of an embedding_int8 of one fp32 and two int8 tables."""
    kinds = rng.standard_normal((2, 6)).astype(np.float32)
    words, places = (rng.integers(-128, 128, (n, 6)).astype(np.int8) for n in (9, 5))
    scales = [rng.random(n).astype(np.float32) / 100 for n in (9, 5)]
    ids = [rng.integers(-n, n, (3, 5)) for n in (2, 9)]
    operands = [ids[0], kinds, None, ids[1], words, scales[0], np.arange(5)[None], places]
    return [*operands, scales[1]], (0, 0, 7)


def test_embedding_int8_is_a_sum_with_one_fma_per_int8_table(rng: np.random.Generator):
    operands, zero_points = look_up(rng)
    (got,) = evaluate("embedding_int8", *operands, zero_points=zero_points)
    kind_ids, kinds, _, word_ids, words, word_scale, _, places, place_scale = operands
    total = kinds[kind_ids]
    total = fma_f32(words[word_ids].astype(np.float32), word_scale[word_ids][..., None], total)
    centred = (places.astype(int) - 7).astype(np.float32)
    np.testing.assert_array_equal(got, fma_f32(centred, place_scale[:, None], total))


def test_embedding_int8_refuses_an_id_outside_of_its_table(rng: np.random.Generator):
    operands, zero_points = look_up(rng)
    operands[3] = np.full((3, 5), 9)
    with pytest.raises(IndexError, match="index 9 is outside"):
        evaluate("embedding_int8", *operands, zero_points=zero_points)


@pytest.mark.parametrize(
    ("change", "zero_points", "message"),
    [
        ({2: None}, (0,), "f32, or i8 with a scale"),
        ({1: TensorType(F32, (9, 4))}, (0,), "f32, or i8 with a scale"),
        ({2: TensorType(F32, (8,))}, (0,), "not one f32 per row"),
        ({0: TensorType(F32, (B, S))}, (0,), "integer"),
        ({}, (0, 0), "2 zero points for 1 tables"),
        ({}, (257,), "zero point 257"),
    ],
)
def test_embedding_int8_refuses(change: Any, zero_points: Any, message: str):
    types: list[Any] = [TensorType(DType.I64, (B, S)), TensorType(I8, (9, 4))]
    types.append(TensorType(F32, (9,)))
    for index, type in change.items():
        types[index] = type
    with pytest.raises(InvalidGraph, match=message):
        OPS["embedding_int8"].infer(types, {"zero_points": zero_points})
