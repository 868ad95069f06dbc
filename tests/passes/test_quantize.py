"""Products in int8, what stays fp32 and why, and folding that changes no bit."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sparsec.calibration import calibrate
from sparsec.errors import InvalidInput
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.layouts import Panels
from sparsec.ir.ops import OPS
from sparsec.ir.printer import print_graph
from sparsec.ir.schedule import Schedule
from sparsec.ir.types import DType
from sparsec.models.tiny import tiny_model
from sparsec.passes import (
    Quantization,
    default_pipeline,
    graph_pipeline,
    int8_pipeline,
    quantized_values,
)
from sparsec.passes.assign_layouts import AssignLayouts
from sparsec.passes.fold_quantize import FoldQuantize
from sparsec.passes.manager import PassManager
from sparsec.passes.plan_memory import check_plan, plan_memory
from sparsec.passes.quantize import (
    CENTRE,
    Quantize,
    affine_u8,
    quantize_weight,
    token_zero_point,
)
from sparsec.ranges import choose_range

BATCH, SEQ = symbol("batch"), symbol("seq")
Feed = dict[str, np.ndarray]


def linear(graph: Graph, x: Value, w: np.ndarray, name: str | None = None, **attrs) -> Value:
    bias = graph.add_constant(np.linspace(-1, 1, len(w), dtype=np.float32))
    attrs = {"activation": "none", **attrs}
    return graph.add("linear", [x, graph.add_constant(w), bias, None], attrs, name=name)


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 255.0, (1.0, 0)),
        (-100.0, 155.0, (1.0, 100)),
        (-10.0, 0.2, (10.2 / 255, 250)),
        (-255.0, 0.0, (1.0, 255)),
        (51.0, 255.0, (1.0, 0)),  # widened to hold zero
        (-255.0, -51.0, (1.0, 255)),
        (0.0, 0.0, (1.0, 0)),
        (0.0, 1e-40, (1.0, 0)),  # the scale would underflow
    ],
)
def test_affine_u8(low: float, high: float, wanted: tuple[float, int]):
    scale, zero_point = affine_u8(low, high)
    assert (scale, zero_point) == (float(np.float32(wanted[0])), wanted[1])


def test_weights_use_127_levels_of_each_sign_and_keep_their_zeros(rng: np.random.Generator):
    w = rng.standard_normal((6, 40)).astype(np.float32)
    w[rng.random(w.shape) < 0.5] = 0
    w[2] = 0
    w[3] *= 1e-38
    data, scale = quantize_weight(w)
    assert (data.dtype, scale.dtype) == (np.int8, np.float32)
    assert (data[w == 0] == 0).all()
    assert scale[2] == scale[3] == 1.0
    assert not data[2:4].any()
    rows = [0, 1, 4, 5]
    assert (np.abs(data[rows]).max(axis=1) == 127).all()
    error = np.abs(data[rows] * scale[rows, None] - w[rows])
    assert (error <= scale[rows, None] * (0.5 + 1e-4)).all()  # fp32 rounding of the scale


def test_a_product_becomes_int8(x32, weight):
    graph, x = x32
    w = weight(4, 8)
    graph.add_output("y", linear(graph, x, w, "dense", activation="gelu"))
    feed = {"x": np.random.default_rng(1).uniform(-2, 2, (2, 5, 8)).astype(np.float32)}
    (before,) = run(graph, feed).values()
    assert PassManager([Quantize({"x": (-2.0, 2.0)})]).run(graph)[0]["changed"] == 1
    assert [(n.op, n.name) for n in graph.nodes] == [
        ("quantize", "x.quantize"),
        ("linear_int8", "dense"),
    ]
    (after,) = run(graph, feed).values()
    # Each of 8 products is off by half a step of x times |w|, and |x| times half a step of w;
    # GELU's slope is below 1.13.
    step = 4 / 255 / 2 * np.abs(w).sum(1) + 2 * 8 * np.abs(w).max(1) / 127 / 2
    assert (np.abs(after - before) <= 1.13 * step + 1e-5).all()


def test_readers_share_the_quantized_value_and_weights_are_shared(x32, weight):
    graph, x = x32
    w = graph.add_constant(weight(4, 8))
    y = [graph.add("linear", [x, w, None, None], {"activation": "none"}) for _ in range(2)]
    graph.add_output("y", graph.add("add", y))
    PassManager([Quantize({"x": (-2.0, 2.0)})]).run(graph)
    assert ops(graph) == {"quantize": 1, "linear_int8": 2, "add": 1}
    first, second = (n for n in graph.nodes if n.op == "linear_int8")
    assert first.inputs == second.inputs


def test_what_stays_fp32_is_noted(x32, weight):
    graph, x = x32
    first = linear(graph, x, weight(8, 8), "ranged")
    second = linear(graph, first, weight(8, 8), "no range")
    kept = linear(graph, x, weight(8, 8), "head.out")
    row = graph.add("reduce_max", [second], {"axes": (1,), "keepdims": False}, name="row")
    bad = weight(8, 8)
    bad[0, 0] = np.inf
    graph.add_output("y", linear(graph, row, weight(8, 8), "pooler"))
    graph.add_output("kept", kept)
    graph.add_output("wild", linear(graph, x, bad, "wild"))
    quantize = Quantize({"x": (-1.0, 1.0), "row": (-1.0, 1.0)}, ("head.*",))
    notes = "\n".join(PassManager([quantize]).run(graph)[0]["notes"])
    assert ops(graph) == {"quantize": 1, "linear_int8": 1, "linear": 4, "reduce_max": 1}
    assert "no range stays fp32: no range was given for its input %ranged" in notes
    assert "head.out stays fp32: its name matches 'head.*'" in notes
    assert "pooler stays fp32: its input f32[batch, 8] is not over all tokens" in notes
    assert "wild stays fp32: its weight is not finite" in notes


@pytest.mark.parametrize("limits", [(1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_a_range_that_is_none_is_refused(x32, weight, limits):
    graph, x = x32
    graph.add_output("y", linear(graph, x, weight(8, 8)))
    with pytest.raises(InvalidInput, match="range of %x must be finite, low first"):
        PassManager([Quantize({"x": limits})]).run(graph)


def test_a_pattern_that_fits_no_product_is_refused(x32, weight):
    graph, x = x32
    graph.add_output("y", linear(graph, x, weight(8, 8), "dense"))
    with pytest.raises(InvalidInput, match=r"named like 'head.\*'; there are dense"):
        quantized_values(graph, ("head.*",))


def fold_equals(graph: Graph, feed: Feed) -> str:
    """Folds, checks that no bit of any output changed, and returns the notes."""
    before = run(graph, feed)
    (record,) = PassManager([FoldQuantize()]).run(graph)
    for name, found in run(graph, feed).items():
        np.testing.assert_array_equal(found, before[name])
    return "\n".join(record["notes"])


def feed_x(rng: np.random.Generator) -> Feed:
    return {"x": rng.standard_normal((2, 5, 8)).astype(np.float32)}


RANGES = dict.fromkeys(("x", "a", "b", "norm"), (-3.0, 3.0))


def test_a_product_stores_what_only_the_next_reads(x32, weight, rng):
    graph, x = x32
    a = linear(graph, x, weight(8, 8), "a", activation="gelu")
    graph.add_output("y", linear(graph, a, weight(8, 8), "b"))
    Quantize(RANGES).run(graph)
    notes = fold_equals(graph, feed_x(rng))
    assert ops(graph) == {"quantize": 1, "linear_int8": 2}
    assert notes == "x.quantize is a step of its own: %x is an input"
    assert graph.nodes[1].output.type.dtype is DType.U8


def test_a_product_that_is_read_elsewhere_is_stored_twice(x32, weight, rng):
    graph, x = x32
    a = linear(graph, x, weight(8, 8), "a")
    graph.add_output("y", linear(graph, a, weight(8, 8), "b"))
    graph.add_output("a", a)
    Quantize(RANGES).run(graph)
    assert "%a is read elsewhere" in fold_equals(graph, feed_x(rng))
    assert ops(graph) == {"quantize": 2, "linear_int8": 2}


def test_layer_norm_has_both_results_when_the_residual_reads_one(x32, weight, rng):
    graph, x = x32
    gamma = graph.add_constant(weight(8))
    norm = graph.add("layer_norm", [x, gamma, None, None], {"epsilon": 1e-5}, name="norm")
    y = linear(graph, norm, weight(8, 8))
    graph.add_output("y", graph.add("add", [y, norm]))
    Quantize(RANGES).run(graph)
    assert fold_equals(graph, feed_x(rng)) == ""
    assert ops(graph) == {"layer_norm": 1, "linear_int8": 1, "add": 1}
    node = graph.nodes[0]
    assert node.name == node.outputs[0].name == "norm"
    assert [v.type.dtype for v in node.outputs] == [DType.F32, DType.U8]


def test_other_scales_of_one_layer_norm_are_steps_of_their_own(x32, rng):
    graph, x = x32
    gamma = graph.add_constant(np.ones(8, np.float32))
    norm = graph.add("layer_norm", [x, gamma, None, None], {"epsilon": 1e-5}, name="norm")
    for index, scale in enumerate((0.1, 0.2, 0.1)):
        attrs = {"scale": scale, "zero_point": 128, "dtype": DType.U8}
        graph.add_output(f"y{index}", graph.add("quantize", [norm], attrs))
    assert "stores u8" in fold_equals(graph, feed_x(rng))
    assert ops(graph) == {"layer_norm": 1, "quantize": 1}


def test_a_reshape_between_is_passed(x32, weight, rng):
    graph, x = x32
    a = linear(graph, x, weight(8, 8), "a")
    flat = graph.add("reshape", [a], {"shape": (BATCH * SEQ, 8)})
    whole = graph.add("reshape", [flat], {"shape": (BATCH, SEQ, 8)}, name="b")
    graph.add_output("y", linear(graph, whole, weight(8, 8)))
    Quantize(RANGES).run(graph)
    fold_equals(graph, feed_x(rng))
    assert [n.op for n in graph.nodes] == [
        "quantize", "linear_int8", "reshape", "reshape", "linear_int8",
    ]  # fmt: skip
    assert graph.nodes[2].output.type.dtype is DType.U8


def test_signed_numbers_are_not_folded(x32, weight, rng):
    graph, x = x32
    a = linear(graph, x, weight(8, 8), "a")
    attrs = {"scale": 0.1, "zero_point": 0, "dtype": DType.I8}
    graph.add_output("y", graph.add("quantize", [a], attrs))
    Quantize(RANGES).run(graph)
    assert "kernels store u8, not i8" in fold_equals(graph, feed_x(rng))


# The zoo


def feeds(graph: Graph, rng: np.random.Generator, count: int = 4) -> list[Feed]:
    """Random tokens, with padding at the end of every other sequence."""
    made = []
    for _ in range(count):
        feed = {}
        for value in graph.inputs:
            most = 100 if value.name == "input_ids" else 2
            feed[value.name] = rng.integers(0, most, (2, 33))
            if "mask" in value.name:
                feed[value.name][:] = 1
                feed[value.name][0, 20:] = 0
        made.append(feed)
    return made


def calibrated(graph: Graph, samples: list[Feed]) -> Quantization:
    observed = calibrate(graph, samples, quantized_values(graph))
    return Quantization({name: choose_range(o, "minmax") for name, o in observed.items()})


@pytest.fixture
def fused(encoder: Graph) -> Graph:
    PassManager(graph_pipeline()).run(encoder)
    return encoder


def test_the_zoo_in_int8_stays_near_fp32(fused, rng):
    samples = feeds(fused, rng)
    before = [run(fused, f) for f in samples]
    quantization = calibrated(fused, samples)
    PassManager([Quantize(quantization.ranges), FoldQuantize()]).run(fused)
    assert ops(fused)["linear_int8"] == 8
    assert ops(fused)["quantize"] == 0
    for feed, wanted in zip(samples, before, strict=True):
        for name, found in run(fused, feed).items():
            # A step is 1/255 of a range of about 6 deviations: noise of 6/255/sqrt(12) = 0.7 %
            # from activations, half of that from weights; 8 products in a row: 2.3 %.
            error = np.linalg.norm(found - wanted[name]) / np.linalg.norm(wanted[name])
            assert error < 0.023, name


def test_every_product_is_that_of_the_stored_numbers(fused, rng):
    """linear_int8 against fp32 arithmetic on its dequantised operands, node by node."""
    samples = feeds(fused, rng, 1)
    PassManager([Quantize(calibrated(fused, samples).ranges)]).run(fused)
    values: dict[Value, np.ndarray] = {}
    run(fused, samples[0], values.__setitem__)
    products = [n for n in fused.nodes if n.op == "linear_int8"]
    assert len(products) == 8
    for node in products:
        fake, size = fake_quantised(node, values)
        # Sums of k fp32 products in any order: k + 2 roundings of at most 2**-24 of their sizes.
        # GELU's slope is below 1.13, its own rounding is one more.
        k = node.input(0).type.channels
        bound = 1.13 * (k + 3) * 2.0**-24 * size + 2.0**-23
        assert (np.abs(values[node.output] - fake) <= bound).all(), node.name


def fake_quantised(node: Node, values: dict[Value, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The product in fp32 of what the stored numbers mean, and the sum of its terms' sizes."""
    scale, zero_point = node.attrs["x_scale"], node.attrs["x_zero_point"]
    x = (values[node.input(0)].astype(np.float32) - zero_point) * np.float32(scale)
    w = node.input(1).data * node.input(2).data[:, None]
    bias = node.optional_input(3)
    bias_data = None if bias is None else bias.data
    attrs = {"activation": node.attrs["activation"]}
    (result,) = OPS["linear"].evaluate([x, w, bias_data, None], attrs, {})
    size = np.abs(x) @ np.abs(w).T + (0 if bias_data is None else np.abs(bias_data))
    return result, size


def test_names_of_calibration_are_those_that_quantize_wants(fused):
    names = quantized_values(fused)
    assert len(names) == len(set(names)) == 8
    record = PassManager([Quantize(dict.fromkeys(names, (-1.0, 1.0)))]).run(fused)[0]
    assert record["changed"] == 8
    assert not any("no range" in note for note in record["notes"])


def test_layouts_and_memory_of_the_zoo(fused, rng):
    samples = feeds(fused, rng, 1)
    quantization = calibrated(fused, samples)
    PassManager([Quantize(quantization.ranges), FoldQuantize()]).run(fused)
    before = run(fused, samples[0])
    PassManager([AssignLayouts()]).run(fused)
    after = run(fused, samples[0])
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert ops(fused)["to_panels"] + ops(fused)["from_panels"] <= 3
    made = [v for n in fused.nodes for v in n.outputs]
    stored = [v for v in made if v.type.dtype is DType.U8]
    assert len(stored) == 8
    assert all(isinstance(v.type.layout, Panels) for v in stored)
    check_plan(fused, plan_memory(fused))


@pytest.mark.parametrize("head", ["classify", "qa"])
def test_the_whole_pipeline(head, rng):
    graph = import_model(tiny_model("bert", head=head))
    twin = import_model(tiny_model("bert", head=head))
    PassManager(graph_pipeline()).run(twin)
    samples = feeds(twin, rng, 1)
    pipeline = default_pipeline(
        schedules=lambda node, bucket: Schedule(node.op, "avx2"),
        quantization=calibrated(twin, samples),
    )
    PassManager(pipeline).run(graph)
    over_tokens = 8 + (head == "qa")  # the span head reads every token, a classifier one
    assert ops(graph)["linear_int8"] == over_tokens
    assert all(n.schedules for n in graph.nodes)
    check_plan(graph, plan_memory(graph))


def test_golden_text(golden):
    graph = import_model(tiny_model("bert"))
    PassManager(graph_pipeline()).run(graph)
    quantization = Quantization(dict.fromkeys(quantized_values(graph), (-4.0, 4.0)))
    PassManager([*int8_pipeline(quantization), AssignLayouts()]).run(graph)
    golden("passes_tiny_bert_int8", print_graph(graph))


@pytest.mark.parametrize("gate", ["sigmoid", "relu", "gelu", "silu"])
def test_a_gated_value_has_both_signs(gate):
    """Its activation is that of the gate alone."""
    graph = Graph("gated")
    x = graph.add_input("x", DType.F32, (symbol("batch"), symbol("seq"), 8))
    attrs = {"activation": gate, "channels": 4, "offset": 0, "gate_offset": 4}
    assert token_zero_point(graph.add("gated", [x], attrs)) == CENTRE
