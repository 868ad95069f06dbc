"""What a product applies before it stores its result."""

from __future__ import annotations

import pytest

from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.passes import graph_pipeline
from sparsec.passes.fuse_epilogue import FuseEpilogue


def linear(graph: Graph, x: Value, weight, activation: str = "none") -> Value:
    w, b = graph.add_constant(weight(8, 8)), graph.add_constant(weight(8))
    return graph.add("linear", [x, w, b, None], {"activation": activation})


ACTIVATIONS = {
    "relu": ("relu", {}),
    "tanh": ("tanh", {}),
    "silu": ("silu", {}),
    "sigmoid": ("sigmoid", {}),
    "gelu": ("gelu", {"approximate": "none"}),
    "gelu_tanh": ("gelu", {"approximate": "tanh"}),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_residual(x32, check, weight, name):
    graph, x = x32
    op, attrs = ACTIVATIONS[name]
    y = graph.add(op, [linear(graph, x, weight)], attrs)
    graph.add_output("y", graph.add("add", [x, y]))
    assert check(graph, FuseEpilogue()).ops == {"linear": 1}
    (node,) = graph.nodes
    assert node.attrs["activation"] == name
    assert node.input(3) is x


def test_residual_of_its_own_input_in_a_chain(x32, check, weight):
    """Pre-norm encoders: the sum is read by the next sum as well."""
    graph, x = x32
    for _ in range(2):
        x = graph.add("add", [linear(graph, graph.add("tanh", [x]), weight), x])
    graph.add_output("y", x)
    assert check(graph, FuseEpilogue()).ops == {"tanh": 2, "linear": 2}


def test_an_activation_after_a_residual_stays(x32, check, weight):
    graph, x = x32
    y = graph.add("add", [x, linear(graph, x, weight)])
    graph.add_output("y", graph.add("relu", [y]))
    checked = check(graph, FuseEpilogue())
    assert checked.ops == {"linear": 1, "relu": 1}
    assert "has an activation or a residual already" in checked.notes


def test_a_product_that_is_read_twice_stays(x32, check, weight):
    graph, x = x32
    y = linear(graph, x, weight)
    graph.add_output("y", graph.add("relu", [y]))
    graph.add_output("z", y)
    checked = check(graph, FuseEpilogue())
    assert checked.ops == {"linear": 1, "relu": 1}
    assert "the product is read elsewhere" in checked.notes


@pytest.mark.parametrize("shape", [(1, 1, 8), (symbol("batch"), 1, 8)], ids=str)
def test_a_summand_of_another_shape_stays(x32, check, weight, shape):
    graph, x = x32
    other = graph.add_input("other", DType.F32, shape)
    graph.add_output("y", graph.add("add", [linear(graph, x, weight), other]))
    checked = check(graph, FuseEpilogue())
    assert checked.ops == {"linear": 1, "add": 1}
    assert "does not have the shape" in checked.notes


def test_zoo_model_keeps_its_answer(encoder, check):
    for one in graph_pipeline()[:-1]:
        one.run(encoder)
    ops = check(encoder, FuseEpilogue()).ops
    assert not ops["gelu"]
    assert sum(n.attrs.get("activation") == "gelu" for n in encoder.nodes) == 2
