"""quantize_attention: q, k and v in int8, with a scale each."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.calibration import calibrate
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.graph import Graph, Node
from sparsec.models.tiny import tiny_model
from sparsec.passes import Quantization, attention_values, graph_pipeline, quantized_values
from sparsec.passes.fold_quantize import FoldQuantize
from sparsec.passes.manager import PassManager
from sparsec.passes.quantize import Quantize
from sparsec.passes.quantize_attention import QuantizeAttention
from sparsec.ranges import choose_range


def feed(rng: np.random.Generator) -> dict[str, np.ndarray]:
    mask = np.ones((3, 9), np.int64)
    mask[1, 5:] = 0
    return {
        "input_ids": rng.integers(0, 100, (3, 9)),
        "attention_mask": mask,
        "token_type_ids": np.zeros((3, 9), np.int64),
    }


@pytest.fixture
def prepared(rng: np.random.Generator) -> tuple[Graph, Quantization]:
    """The graph after fold_quantize, and ranges of all that can be quantised."""
    graph = import_model(tiny_model("bert"))
    PassManager(graph_pipeline()).run(graph)
    names = [*quantized_values(graph), *attention_values(graph)]
    observed = calibrate(graph, [feed(rng) for _ in range(4)], names)
    ranges = {name: choose_range(o, "minmax") for name, o in observed.items()}
    PassManager([Quantize(ranges), FoldQuantize()]).run(graph)
    return graph, Quantization(ranges)


def count(graph: Graph, op: str) -> int:
    return sum(node.op == op for node in graph.nodes)


def test_attention_becomes_int8_and_stays_near(
    prepared: tuple[Graph, Quantization], rng: np.random.Generator
) -> None:
    graph, quantization = prepared
    arrays = feed(rng)
    before = run(graph, arrays)["last_hidden_state"]
    (record,) = PassManager([QuantizeAttention(quantization.ranges)]).run(graph)
    assert (record["changed"], count(graph, "attention")) == (2, 0)
    after = run(graph, arrays)["last_hidden_state"]
    # Probabilities have 255 steps and q, k, v 127: an average over keys is off by less than one
    # step of v and a few hundredths of its spread; layer norm keeps the scale of order 1.
    real = arrays["attention_mask"] == 1
    assert np.abs(after - before)[real].max() < 0.15
    a, b = before[real].ravel(), after[real].ravel()
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


def test_each_part_has_its_own_scale(prepared: tuple[Graph, Quantization]) -> None:
    graph, quantization = prepared
    PassManager([QuantizeAttention(quantization.ranges)]).run(graph)
    node = next(n for n in graph.nodes if n.op == "attention_int8")
    for name in "qkv":
        low, high = quantization.ranges[
            f"{node.input(0).name}[{node.attrs[f'{name}_offset']}:"
            f"{node.attrs[f'{name}_offset'] + 32}]"
        ]
        most = max(abs(low), abs(high))
        assert node.attrs[f"{name}_scale"] == pytest.approx(most / 127, rel=1e-6)


def test_without_ranges_it_stays(prepared: tuple[Graph, Quantization]) -> None:
    graph, _ = prepared
    (record,) = PassManager([QuantizeAttention({})]).run(graph)
    assert (record["changed"], count(graph, "attention")) == (0, 2)
    assert "no range" in record["notes"][0]


def test_without_a_kernel_it_stays(prepared: tuple[Graph, Quantization]) -> None:
    graph, quantization = prepared
    never = QuantizeAttention(quantization.ranges, lambda node: False)
    (record,) = PassManager([never]).run(graph)
    assert (record["changed"], count(graph, "attention")) == (0, 2)
    assert "no int8 kernel" in record["notes"][0]
    assert count(graph, "linear_int8") == 2 * 4  # nothing of the trial stays


def test_what_is_read_elsewhere_stays_fp32_beside_its_bytes(
    prepared: tuple[Graph, Quantization], rng: np.random.Generator
) -> None:
    graph, quantization = prepared
    arrays = feed(rng)
    node = next(n for n in graph.nodes if n.op == "attention")
    graph.add_output("qkv", node.input(0))
    before = run(graph, arrays)
    before_quantize = count(graph, "quantize")
    (record,) = PassManager([QuantizeAttention(quantization.ranges)]).run(graph)
    assert (record["changed"], count(graph, "attention")) == (2, 0)
    assert count(graph, "quantize") == before_quantize + 3  # parts have scales of their own
    after = run(graph, arrays)
    np.testing.assert_array_equal(after["qkv"], before["qkv"])
    real = arrays["attention_mask"] == 1
    assert np.abs(after["last_hidden_state"] - before["last_hidden_state"])[real].max() < 0.15


def test_an_objection_is_a_reason_to_stay(prepared: tuple[Graph, Quantization]) -> None:
    graph, quantization = prepared
    asked = []

    def objection(fp32: Node, int8: Node) -> str:
        asked.append((fp32.op, int8.op))
        return "slow"

    (record,) = PassManager([QuantizeAttention(quantization.ranges, objection=objection)]).run(
        graph
    )
    assert (record["changed"], count(graph, "attention")) == (0, 2)
    assert asked == [("attention", "attention_int8")] * 2
    assert record["notes"][0].endswith("stays fp32 inside: slow")
