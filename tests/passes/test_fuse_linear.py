"""Products with constant matrices."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.ir.graph import Graph
from sparsec.ir.types import DType
from sparsec.passes.canonicalize import Canonicalize
from sparsec.passes.fuse_linear import FuseLinear


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4)], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_product_and_bias(x32, check, weight, shape, swapped):
    graph, x = x32
    product = graph.add("matmul", [x, graph.add_constant(weight(8, 4))])
    bias = graph.add_constant(weight(*shape))
    graph.add_output("y", graph.add("add", [bias, product] if swapped else [product, bias]))
    assert check(graph, FuseLinear()).ops == {"linear": 1}
    _, w, b, residual = graph.nodes[0].inputs
    assert (w.type.shape, b.type.shape, residual) == ((4, 8), (4,), None)


@pytest.mark.parametrize("shape", [(4, 1), (1, 4, 1)], ids=str)
def test_a_number_per_token_is_no_bias(shape, check, weight):
    """Not even where there are as many tokens as channels."""
    graph = Graph("square")
    x = graph.add_input("x", DType.F32, (2, 4, 8))
    product = graph.add("matmul", [x, graph.add_constant(weight(8, 4))])
    graph.add_output("y", graph.add("add", [product, graph.add_constant(weight(*shape))]))
    assert check(graph, FuseLinear()).ops == {"linear": 1, "add": 1}


def test_one_number_is_the_bias_of_one_channel(x32, check, weight):
    graph, x = x32
    product = graph.add("matmul", [x, graph.add_constant(weight(8, 1))])
    graph.add_output("y", graph.add("add", [product, graph.add_constant(np.float32(0.5))]))
    assert check(graph, FuseLinear()).ops == {"linear": 1}


def test_a_transposed_weight_as_gemm_has_it(x32, check, weight):
    graph, x = x32
    w = graph.add("transpose", [graph.add_constant(weight(4, 8))], {"perm": (1, 0)})
    graph.add_output("y", graph.add("matmul", [x, w]))
    assert check(graph, Canonicalize(), FuseLinear()).ops == {"linear": 1}


def test_a_shared_weight_stays_shared(x32, check, weight):
    graph, x = x32
    w = graph.add_constant(weight(8, 8))
    y = graph.add("matmul", [graph.add("matmul", [x, w]), w])
    graph.add_output("y", y)
    assert check(graph, FuseLinear()).ops == {"linear": 2}
    assert len(graph.constants()) == 1


def test_a_product_that_is_read_twice_keeps_its_bias_apart(x32, check, weight):
    graph, x = x32
    product = graph.add("matmul", [x, graph.add_constant(weight(8, 4))])
    graph.add_output("y", graph.add("add", [product, graph.add_constant(weight(4))]))
    graph.add_output("z", product)
    checked = check(graph, FuseLinear())
    assert checked.ops == {"linear": 1, "add": 1}
    assert "the product is read elsewhere" in checked.notes


def test_other_products_stay(x32, check, weight):
    graph, x = x32
    wide = graph.add("cast", [x], {"to": DType.F64})
    w64 = graph.add_constant(weight(8, 4).astype(np.float64))
    graph.add_output("double", graph.add("matmul", [wide, w64]))
    graph.add_output("batched", graph.add("matmul", [x, graph.add_constant(weight(1, 8, 4))]))
    checked = check(graph, FuseLinear())
    assert checked.ops == {"cast": 1, "matmul": 2}
    assert "computed in f64" in checked.notes


def test_a_summand_of_another_size_is_no_bias(x32, check, weight):
    graph, x = x32
    product = graph.add("matmul", [x, graph.add_constant(weight(8, 4))])
    graph.add_output("y", graph.add("add", [product, graph.add_constant(weight(1))]))
    assert "is not one value per row" in check(graph, FuseLinear()).notes


def test_zoo_model_keeps_its_answer(encoder, check):
    Canonicalize().run(encoder)
    ops = check(encoder, FuseLinear()).ops
    assert ops["linear"] >= 2 * 6
    assert ops["matmul"] == 2 * 2  # scores and context of two layers


@pytest.mark.parametrize("flat", [True, False], ids=["flattened", "two token axes"])
def test_tokens_are_not_flattened_for_a_product(x32, check, weight, flat):
    graph, x = x32
    batch, seq, _ = x.type.shape
    rows = graph.add("reshape", [x], {"shape": (batch * seq, 8)})
    product = graph.add("matmul", [rows, graph.add_constant(weight(8, 4))])
    y = graph.add("add", [product, graph.add_constant(weight(4))])
    shape = (batch, seq, 4) if flat else (batch, seq, 2, 2)
    graph.add_output("y", graph.add("reshape", [y], {"shape": shape}))
    assert check(graph, FuseLinear()).ops == {"linear": 1} | ({} if flat else {"reshape": 1})
    linear = next(n for n in graph.nodes if n.op == "linear")
    assert linear.inputs[0] is x


def test_a_reshape_that_changes_the_channels_stays(x32, check, weight):
    graph, x = x32
    batch, seq, _ = x.type.shape
    rows = graph.add("reshape", [x], {"shape": (batch, seq * 2, 4)})
    product = graph.add("matmul", [rows, graph.add_constant(weight(4, 4))])
    graph.add_output("y", graph.add("reshape", [product], {"shape": (batch, seq, 8)}))
    checked = check(graph, FuseLinear())
    assert checked.ops == {"linear": 1, "reshape": 2}
    assert "changes the channels" in checked.notes
