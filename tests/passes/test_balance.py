"""Balancing keeps what a graph computes, and makes the channels of what is quantised alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sparsec.calibration import calibrate, channel_maxima
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.graph import Graph, Value
from sparsec.ir.ops import OPS
from sparsec.models.tiny import tiny_model
from sparsec.passes import (
    Balance,
    Quantization,
    Unbalance,
    attention_values,
    balanced_values,
    graph_pipeline,
    int8_pipeline,
    quantized_values,
)
from sparsec.passes.balance import balance_factors
from sparsec.passes.fold_quantize import FoldQuantize
from sparsec.passes.manager import PassManager

Array = np.ndarray
Weight = Callable[..., Array]
OUTLIER, GROWTH = 3, 60.0  # this channel is so much larger than the others


def feeds() -> list[dict[str, Array]]:
    rng = np.random.default_rng(5)
    mask = np.ones((6, 12), np.int64)
    mask[::2, 9:] = 0
    ids = rng.integers(0, 100, (6, 12))
    return [{"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}]


def encoder() -> Graph:
    """A tiny BERT of graph_pipeline, whose normalisations make one channel an outlier."""
    graph = import_model(tiny_model())
    PassManager(graph_pipeline()).run(graph)
    for node in graph.nodes:
        if node.op == "layer_norm":
            gamma = node.input(1).data.copy()
            gamma[OUTLIER] *= GROWTH
            graph.replace_input(node, 1, graph.add_constant(gamma, node.input(1).name))
    return graph


def balance(graph: Graph, alpha: float = 0.5, keep: tuple[str, ...] = ()) -> Balance:
    maxima = channel_maxima(graph, feeds(), balanced_values(graph, keep))
    return Balance(maxima, alpha, keep)


def quantization(graph: Graph, fallback: frozenset[str] = frozenset()) -> Quantization:
    observed = calibrate(graph, feeds(), [*quantized_values(graph), *attention_values(graph)])
    ranges = {name: (o.low, o.high) for name, o in observed.items()}
    return Quantization(ranges, fallback=fallback)


def answers(graph: Graph) -> Array:
    (feed,) = feeds()
    return run(graph, feed)["last_hidden_state"][feed["attention_mask"] == 1]


def error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def copies(graph: Graph) -> list[str]:
    """The divided copies that are steps of their own."""
    return [n.name for n in graph.nodes if n.op == "mul" and n.name.endswith(".balance")]


def rows_linear(graph: Graph, x: Value, w: Array, activation: str = "none") -> Value:
    bias = graph.add_constant(np.linspace(-1, 1, len(w), dtype=np.float32))
    return graph.add("linear", [x, graph.add_constant(w), bias, None], {"activation": activation})


def test_factors_share_the_span_by_alpha():
    x, w = np.array([4.0, 1.0, 0.25]), np.array([1.0, 0.25, 4.0])
    np.testing.assert_allclose(balance_factors(x, w, 1.0), x)
    np.testing.assert_allclose(balance_factors(x, w, 0.0), 1 / w)
    np.testing.assert_allclose(balance_factors(x, w, 0.5), np.sqrt(x / w))


@pytest.mark.parametrize("x", [[0.0, 2.0, 8.0], [1e-30, 2.0, 8.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("w", [[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
def test_factors_of_channels_without_values_are_finite(x: list[float], w: list[float]):
    for alpha in (0.0, 0.5, 1.0):
        s = balance_factors(np.array(x, np.float32), np.array(w, np.float32), alpha)
        assert np.isfinite(s).all()
        assert (s > 0.01).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_model_computes_the_same(alpha: float):
    graph = encoder()
    before = answers(graph)
    (record,) = PassManager([balance(graph, alpha)]).run(graph)
    # Of each layer qkv, attention output and ffn input; the ffn output reads GELU.
    assert record["changed"] == 6
    assert sum("gelu" in note for note in record["notes"]) == 2
    assert error(answers(graph), before) < 1e-5


def test_channels_become_alike_and_zeros_stay():
    graph = encoder()
    for node in graph.nodes:
        if node.op == "linear":
            node.input(1).data[::2, 1::3] = 0
    zeros = {n.name: n.input(1).data == 0 for n in graph.nodes if n.op == "linear"}
    names = balanced_values(graph)
    before = channel_maxima(graph, feeds(), names)
    PassManager([balance(graph, 1.0)]).run(graph)
    after = channel_maxima(graph, feeds(), balanced_values(graph))
    assert len(after) == len(names)
    moved = [most for name, most in after.items() if name not in before]
    assert len(moved) == 4  # copies of what normalisations make, two in each layer
    for most in moved:
        np.testing.assert_allclose(most, 1.0, rtol=1e-5)
    for node in graph.nodes:
        if node.op == "linear":
            np.testing.assert_array_equal(node.input(1).data == 0, zeros[node.name])


def test_int8_is_nearer_to_fp32_where_a_channel_is_an_outlier():
    errors = []
    for passes in (0, 1):
        graph = encoder()
        exact = answers(graph)
        PassManager([balance(graph)] * passes).run(graph)
        PassManager(int8_pipeline(quantization(graph))).run(graph)
        assert not copies(graph)
        assert "quantize" not in {n.op for n in graph.nodes}
        factors = [n for n in graph.nodes if n.op == "layer_norm" and n.optional_input(4)]
        assert len(factors) == 4 * passes
        errors.append(error(answers(graph), exact))
    assert errors[1] < 0.6 * errors[0]


def test_folding_the_factor_changes_no_bit():
    graph = encoder()
    PassManager([balance(graph)]).run(graph)
    pipeline = int8_pipeline(quantization(graph))
    PassManager(pipeline[:1]).run(graph)
    assert len(copies(graph)) == 4
    before = answers(graph)
    PassManager([FoldQuantize()]).run(graph)
    assert not copies(graph)
    np.testing.assert_array_equal(answers(graph), before)


def test_products_that_fall_back_read_what_they_did():
    graph = encoder()
    exact = answers(graph)
    names = [n.name for n in graph.nodes if n.op == "linear"]
    PassManager([balance(graph)]).run(graph)
    chosen = quantization(graph, frozenset(names))
    (record, *_) = PassManager([Unbalance(chosen.fallback), *int8_pipeline(chosen)]).run(graph)
    assert record["changed"] == 4
    assert not copies(graph)
    assert not {"linear_int8", "quantize"} & {n.op for n in graph.nodes}
    assert error(answers(graph), exact) < 1e-5


def test_layers_kept_in_fp32_are_left_alone():
    graph = encoder()
    node = next(n for n in graph.nodes if n.attrs.get("activation") == "gelu")
    before = node.inputs
    PassManager([balance(graph, keep=(node.name,))]).run(graph)
    assert node.inputs == before


def test_a_normalisation_of_these_products_alone_takes_the_factor(x32, weight: Weight):
    graph, x = x32
    gamma, beta = (graph.add_constant(v) for v in (weight(8) + 2, weight(8)))
    y = graph.add("layer_norm", [x, gamma, beta, None], {"epsilon": 1e-5})
    graph.add_output("y", rows_linear(graph, y, weight(4, 8)))
    feed = {"x": np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)}
    (before,) = run(graph, feed).values()
    maxima = {y.name: np.linspace(1, 9, 8, dtype=np.float32)}
    assert PassManager([Balance(maxima, 0.5)]).run(graph)[0]["changed"] == 1
    assert [n.op for n in graph.nodes] == ["layer_norm", "linear"]
    assert graph.nodes[0].input(1) is not gamma
    np.testing.assert_allclose(next(iter(run(graph, feed).values())), before, 1e-5, 1e-5)


@pytest.mark.parametrize(("activation", "changed"), [("relu", 1), ("none", 1), ("gelu", 0)])
def test_a_product_in_front_takes_the_factor_unless_its_activation_does_not(
    activation: str, changed: int, x32, weight: Weight
):
    graph, x = x32
    y = rows_linear(graph, x, weight(6, 8), activation)
    graph.add_output("y", rows_linear(graph, y, weight(4, 6)))
    feed = {"x": np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)}
    (before,) = run(graph, feed).values()
    maxima = {y.name: np.linspace(1, 9, 6, dtype=np.float32), "x": np.ones(8, np.float32)}
    (record,) = PassManager([Balance(maxima, 0.5)]).run(graph)
    assert record["changed"] == changed
    assert "%x is an input" in "\n".join(record["notes"])
    np.testing.assert_allclose(next(iter(run(graph, feed).values())), before, 1e-5, 1e-5)


def test_a_weight_of_several_layers_is_not_copied(x32, weight: Weight):
    graph, x = x32
    w, gamma = graph.add_constant(weight(8, 8)), graph.add_constant(np.ones(8, np.float32))
    for _ in range(2):
        y = graph.add("layer_norm", [x, gamma, None, None], {"epsilon": 1e-5})
        x = graph.add("linear", [y, w, None, None], {"activation": "none"})
    graph.add_output("y", x)
    maxima = {name: np.ones(8, np.float32) for name in balanced_values(graph)}
    (record,) = PassManager([Balance(maxima, 0.5)]).run(graph)
    assert record["changed"] == 0
    assert all("the weight of other layers too" in note for note in record["notes"])


def test_the_factor_multiplies_before_the_scale(rng: np.random.Generator):
    x, gamma = rng.standard_normal((3, 8)).astype(np.float32), np.ones(8, np.float32)
    factor = rng.uniform(0.1, 3, 8).astype(np.float32)
    attrs = {"epsilon": 1e-5, "out_scale": 0.013, "out_zero_point": 100}
    y, copy = OPS["layer_norm"].evaluate([x, gamma, None, None, factor], attrs, {})
    steps = np.rint(y * factor * (np.float32(1) / np.float32(0.013))) + 100
    np.testing.assert_array_equal(copy, np.clip(steps, 0, 255).astype(np.uint8))
