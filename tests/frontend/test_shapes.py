"""Symbolic shapes at import: names of dims, dims that must agree, limits, shape arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsec.errors import CompilerError, InvalidGraph, InvalidInput, InvalidModel, UnsupportedOp
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.graph import Graph
from sparsec.ir.verifier import verify


def model(signature: str, body: str, opset: int = 17) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g {signature} {{ {body} }}'
    )


def shapes(graph: Graph) -> list[str]:
    return [str(v.type) for v in graph.inputs]


def test_dim_names_become_c_identifiers():
    proto = model(
        "(float[b, s] x, float[b, t] y, float[b, u] z, float[b, v] w) => (float[b] o)",
        "o = Concat <axis = 1> (x, y, z, w)",
    )
    names = ["batch size", "batch.size", "2x", "int"]
    for info, name in zip(proto.graph.input, names, strict=True):
        info.type.tensor_type.shape.dim[1].dim_param = name
    assert shapes(import_model(proto)) == [
        "f32[b, batch_size]",
        "f32[b, batch_size_2]",
        "f32[b, dim_2x]",
        "f32[b, dim_int]",
    ]


def test_unnamed_dims_are_named_by_input_and_axis():
    proto = model("(float[a, b] x) => (float[a] y)", "y = Relu (x)")
    first, second = proto.graph.input[0].type.tensor_type.shape.dim
    first.ClearField("dim_param")
    second.dim_value = -1
    assert shapes(import_model(proto)) == ["f32[x_0, x_1]"]


def test_dims_that_an_op_joins_become_one_and_are_checked():
    graph = import_model(
        model(
            "(float[batch, seq, 8] x, float[batch_size, 1, 8] y) => (float[n] z)",
            "z = Add (x, y)",
        )
    )
    assert shapes(graph) == ["f32[batch, seq, 8]", "f32[batch, 1, 8]"]
    inputs = {"x": np.ones((2, 3, 8), np.float32), "y": np.ones((3, 1, 8), np.float32)}
    with pytest.raises(InvalidInput, match="y axis 0 is 3, but batch is 2 by x axis 0"):
        run(graph, inputs)


def test_renaming_reaches_nodes_and_known_shapes_made_before():
    """`n` is read from y's shape before y's dims turn out to be x's."""
    graph = import_model(
        model(
            "(float[B, S] x, float[C, T] y) => (float[n] z)",
            """s = Shape (y)  w = Exp (y)  v = Add (x, w)
               f = Reshape (v, minus)  z = Expand (e, s)  e = ReduceSum <keepdims = 0> (f)
               minus = Constant <value_ints = [-1]> ()""",
        )
    )
    verify(graph)
    assert shapes(graph) == ["f32[B, S]", "f32[B, S]"]
    assert [str(v.type) for v in graph.outputs] == ["f32[B, S]"]
    assert not any("C" in str(v.type) or "T" in str(v.type) for v in graph.outputs)


def test_a_symbol_that_must_be_a_number_becomes_it():
    graph = import_model(
        model(
            "(float[B, H] x) => (float[n] z)",
            "w = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> ()  z = MatMul (x, w)",
        )
    )
    assert shapes(graph) == ["f32[B, 2]"]


def test_reshape_finds_the_size_of_an_unnamed_axis():
    graph = import_model(
        model(
            "(float[B, S, H] x) => (float[n] z)",
            """s = Shape (x)  bs = Slice (s, zero, two)  tail = Constant <value_ints = [4, 16]> ()
               zero = Constant <value_ints = [0]> ()  two = Constant <value_ints = [2]> ()
               all = Concat <axis = 0> (bs, tail)  z = Reshape (x, all)""",
        )
    )
    assert shapes(graph) == ["f32[B, S, 64]"]
    assert [str(v.type) for v in graph.outputs] == ["f32[B, S, 4, 16]"]


TABLE = ", ".join(str(float(i)) for i in range(12))
POSITIONS = f"""
    s = Shape (x)  one = Constant <value_ints = [1]> ()  two = Constant <value_ints = [2]> ()
    zero = Constant <value_ints = [0]> ()  n = Slice (s, one, two)
    table = Constant <value = float[6, 2] {{ {TABLE} }}> ()
    rows = Slice (table, zero, n, zero)"""


def test_a_table_sliced_to_the_sequence_limits_it():
    graph = import_model(
        model("(float[B, S, 2] x) => (float[B] y)", POSITIONS + "  y = Add (x, rows)")
    )
    assert [(str(x.dim), x.most) for x in graph.limits] == [("S", 6)]
    assert [str(v.type) for v in graph.outputs] == ["f32[B, S, 2]"]
    x = np.zeros((1, 6, 2), np.float32)
    np.testing.assert_array_equal(run(graph, {"x": x})["y"][0, 5], [10, 11])
    with pytest.raises(InvalidInput, match=r"S is 7, at most 6: .* has no more rows"):
        run(graph, {"x": np.zeros((1, 7, 2), np.float32)})


def test_a_limit_on_a_size_that_becomes_a_number_is_checked_at_import():
    """S turns out to be 5, or 7, only after the table of 6 rows was joined to it."""
    for size, sound in ((5, True), (7, False)):
        values = ", ".join(["1.0"] * size)
        fixed = f"  w = Constant <value = float[{size}, 1] {{ {values} }}> ()  y = Add (z, w)"
        body = POSITIONS + "  z = Add (x, rows)" + fixed
        proto = model("(float[B, S, 2] x) => (float[B] y)", body)
        if sound:
            graph = import_model(proto)
            assert shapes(graph) == ["f32[B, 5, 2]"]
            assert not graph.limits
        else:
            with pytest.raises(InvalidGraph, match=r"7 is more than 6: .* has no more rows"):
                import_model(proto)


def test_a_slice_that_nothing_joins_stays_clamped():
    graph = import_model(
        model("(float[B, S, 2] x) => (float[B] y)", POSITIONS + "  y = Exp (rows)")
    )
    assert not graph.limits
    for size, expected in ((3, 3), (9, 6)):
        y = run(graph, {"x": np.zeros((1, size, 2), np.float32)})["y"]
        assert y.shape == (expected, 2)


def test_shape_arithmetic_leaves_no_nodes():
    """The reshape of every attention layer: no Shape, Gather or Concat is left."""
    graph = import_model(
        model(
            "(float[B, S, 8] x) => (float[B] y)",
            """s = Shape (x)  i = Constant <value_int = 0> ()  j = Constant <value_int = 1> ()
               b = Gather (s, i)  n = Gather (s, j)  axes = Constant <value_ints = [0]> ()
               b1 = Unsqueeze (b, axes)  n1 = Unsqueeze (n, axes)
               h = Constant <value_ints = [2]> ()  d = Constant <value_ints = [-1]> ()
               shape = Concat <axis = 0> (b1, n1, h, d)  r = Reshape (x, shape)
               y = Transpose <perm = [0, 2, 1, 3]> (r)""",
        )
    )
    assert [n.op for n in graph.nodes] == ["reshape", "transpose"]
    assert str(graph.outputs[0].type) == "f32[B, 2, S, 4]"


def test_shape_arithmetic_that_data_needs_becomes_dims():
    graph = import_model(
        model("(float[B, S] x) => (int64[n] y)", "s = Shape (x)  y = Identity (s)")
    )
    assert [n.op for n in graph.nodes] == ["dims"]
    assert run(graph, {"x": np.zeros((3, 7), np.float32)})["y"].tolist() == [3, 7]


def test_a_comparison_that_depends_on_sizes_is_left_to_the_run():
    graph = import_model(
        model(
            "(float[B, S] x) => (float[n] y)",
            """s = Shape (x)  i = Constant <value_int = 1> ()  n = Gather (s, i)
               five = Constant <value_int = 5> ()  c = Less (n, five)  z = Neg (x)
               y = Where (c, x, z)""",
        )
    )
    for size, sign in ((4, 1), (6, -1)):
        x = np.ones((1, size), np.float32)
        np.testing.assert_array_equal(run(graph, {"x": x})["y"], sign * x)


def test_constants_are_folded_and_weights_keep_their_names():
    graph = import_model(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17]> g (float[B, 2] x) => (float[B] y)
            <float[3, 2] weight = {1, 2, 3, 4, 5, 6}>
            { t = Transpose <perm = [1, 0]> (weight)  y = MatMul (x, t) }"""
        )
    )
    assert [n.op for n in graph.nodes] == ["matmul"]
    (constant,) = graph.constants()
    assert constant.name.startswith("weight")


def test_folding_does_not_grow_the_file():
    graph = import_model(
        model(
            "(float[B, 2] x) => (float[B] y)",
            """big = Constant <value_ints = [1000, 1000]> ()  one = Constant <value_float = 1.0> ()
               y = Expand (one, big)""",
        )
    )
    assert [n.op for n in graph.nodes] == ["broadcast_to"]


TWO = "(float[batch, seq] x, int64[batch, seq] ids) => (float[n] y)"
TWO_BODY = "f = Cast <to = 1> (ids)  y = Mul (x, f)"


def test_an_override_of_one_input_reaches_the_others():
    graph = import_model(model(TWO, TWO_BODY), {"x": (2, "tokens")})
    assert shapes(graph) == ["f32[2, tokens]", "i64[2, tokens]"]


def test_an_override_gives_a_shape_to_an_input_without_one():
    proto = model("(float[a] x) => (float[n] y)", "y = Relu (x)")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(InvalidModel, match="'x' has no shape; give one"):
        import_model(proto)
    assert shapes(import_model(proto, {"x": ("n", 3)})) == ["f32[n, 3]"]


BAD_OVERRIDES = [
    ({"z": (1,)}, "no input 'z' .* inputs: x, ids"),
    ({"x": (1,)}, "has 2 axes, but the shape given has 1"),
    ({"x": (0, 4)}, "has the size 0"),
    ({"x": (2, 4), "ids": (3, 4)}, "'batch' both 2 and 3"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_OVERRIDES)
def test_bad_overrides_are_named(overrides, message: str):
    with pytest.raises(InvalidInput, match=message):
        import_model(model(TWO, TWO_BODY), overrides)


REFUSED: list[tuple[str, type[CompilerError], str]] = [
    ("i = Cast <to = 7> (x)  y = Expand (x, i)", UnsupportedOp, "depends on the data"),
    ("y = NonZero (x)", UnsupportedOp, "NonZero gives depends on the data"),
    ("t = Transpose (x)  y = Add (x, t)  z = Neg (y)", InvalidGraph, "broadcast"),
    ("s = Constant <value_ints = [5, 7]> ()  y = Reshape (x, s)", InvalidGraph, "elements"),
]


@pytest.mark.parametrize(("body", "error", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_shapes_that_cannot_be_known_are_refused(body, error, message: str):
    proto = model("(float[2, 3] x) => (float[n] y)", body)
    with pytest.raises(error, match=message):
        import_model(proto)
