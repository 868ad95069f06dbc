"""Types are inferred again, with some symbols fixed."""

from __future__ import annotations

import pytest

from sparsec.errors import InvalidGraph
from sparsec.ir.dims import symbol
from sparsec.ir.types import DType
from sparsec.passes.infer_types import InferTypes


def test_nothing_fixed_changes_nothing(encoder, check):
    assert InferTypes().run(encoder).changed == 0
    check(encoder, InferTypes())


def test_fixed_sizes_reach_types_and_attributes(x32, check):
    graph, x = x32
    rows = graph.add("reshape", [x], {"shape": (symbol("batch") * symbol("seq"), 8)})
    graph.add_output("y", rows)
    check(graph, InferTypes({"seq": 5}), sizes=[(2, 5), (1, 5)])
    assert str(x.type) == "f32[batch, 5, 8]"
    assert str(graph.outputs[0].type) == "f32[5*batch, 8]"
    assert str(graph.nodes[0].attrs["shape"][0]) == "5*batch"


def test_zoo_model_with_fixed_sizes(encoder, check):
    names = [str(d) for d in encoder.inputs[0].type.shape]
    check(encoder, InferTypes(dict(zip(names, (2, 7), strict=True))), sizes=[(2, 7)])
    assert all(isinstance(d, int) for n in encoder.nodes for d in n.output.type.shape)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [({"sequence": 5}, "no input has a dim 'sequence'"), ({"seq": 0}, "it must be >= 1")],
)
def test_wrong_fixed_sizes(x32, fixed, message):
    graph, x = x32
    graph.add_output("y", x)
    with pytest.raises(InvalidGraph, match=message):
        InferTypes(fixed).run(graph)


def test_a_fixed_size_over_a_limit_is_refused(x32):
    graph, x = x32
    graph.add_output("y", x)
    graph.add_limit(symbol("seq"), 512, "the position table has 512 rows")
    InferTypes({"seq": 512}).run(graph)
    graph.add_limit(symbol("batch"), 4, "made up")
    with pytest.raises(InvalidGraph, match="batch <= 4: made up; it would be 5"):
        InferTypes({"batch": 5}).run(graph)


def test_operands_that_no_longer_fit_are_named(x32):
    graph, x = x32
    other = graph.add_input("other", DType.F32, (symbol("batch"), symbol("seq"), 8))
    graph.add_output("y", graph.add("add", [x, other], name="sum"))
    graph.set_type(other, other.type.with_shape((symbol("batch"), 3, 8)))
    with pytest.raises(InvalidGraph, match="sum"):
        InferTypes({"seq": 4}).run(graph)
