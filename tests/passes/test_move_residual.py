"""move_residual: int8 products add the residual of the normalisation that reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.interpreter import run
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph
from sparsec.ir.types import DType
from sparsec.passes.manager import PassManager
from sparsec.passes.move_residual import MoveResidual

CHANNELS = 8
ATTRS = {
    "x_scale": 0.05, "x_zero_point": 7, "activation": "none", "out_scale": None,
    "out_zero_point": None,
}  # fmt: skip


def model(rng: np.random.Generator, *, by_token: bool = False) -> Graph:
    """layer_norm(linear_int8(x), residual=r)"""
    graph = Graph("block")
    rows = (symbol("tokens"), CHANNELS)
    x = graph.add_input("x", DType.U8, rows)
    r = graph.add_input("r", DType.F32, rows)
    w = graph.add_constant(rng.integers(-127, 128, (CHANNELS, CHANNELS)).astype(np.int8), "w")
    scale, bias, gamma, beta = (
        graph.add_constant(rng.random(CHANNELS, np.float32), n)
        for n in ("scale", "bias", "gamma", "beta")
    )
    scales = [graph.add_input("s", DType.F32, (symbol("tokens"), 1))] if by_token else []
    operands = [x, w, scale, bias, *([None, *scales] if scales else [])]
    y = graph.add("linear_int8", operands, ATTRS, name="product")
    z = graph.add("layer_norm", [y, gamma, beta, r], {"epsilon": 1e-5}, name="norm")
    graph.outputs, graph.output_names = [z], ["z"]
    return graph


def feed(graph: Graph, rng: np.random.Generator) -> dict[str, Any]:
    made = {
        "x": rng.integers(0, 256, (5, CHANNELS)).astype(np.uint8),
        "r": rng.standard_normal((5, CHANNELS)).astype(np.float32),
        "s": rng.random((5, 1), np.float32),
    }
    return {v.name: made[v.name] for v in graph.inputs}


@pytest.mark.parametrize("by_token", [False, True])
def test_the_sum_is_the_same_to_the_bit(by_token: bool, rng: np.random.Generator) -> None:
    graph = model(rng, by_token=by_token)
    inputs = feed(graph, rng)
    before = run(graph, inputs)["z"]
    (record,) = PassManager([MoveResidual()]).run(graph)
    assert record["changed"] == 1
    product, norm = graph.nodes
    assert (product.name, norm.name) == ("product", "norm")
    assert product.optional_input(4) is not None
    assert norm.optional_input(3) is None
    np.testing.assert_array_equal(run(graph, inputs)["z"], before)
    (again,) = PassManager([MoveResidual()]).run(graph)
    assert again["changed"] == 0


def test_a_product_that_is_read_twice_stays(rng: np.random.Generator) -> None:
    graph = model(rng)
    graph.outputs.append(graph.nodes[0].output)
    graph.output_names.append("y")
    (record,) = PassManager([MoveResidual()]).run(graph)
    assert record["changed"] == 0


def test_a_product_with_a_residual_of_its_own_stays(rng: np.random.Generator) -> None:
    graph = model(rng)
    product, norm = graph.nodes
    r = next(v for v in graph.inputs if v.name == "r")
    product = graph.add_node("linear_int8", [*product.inputs, r], product.attrs, name="other")
    graph.replace_uses(norm.input(0), product.output)
    graph.sort()
    graph.drop_dead_nodes()
    (record,) = PassManager([MoveResidual()]).run(graph)
    assert record["changed"] == 0
