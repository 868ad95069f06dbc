"""Converters against the ONNX reference evaluator: every form of every op, at two sizes.

A case is an opset and the body of a model in ONNX's text syntax. Float inputs named `x`, `x2` and
so on are `[B, S, 4]`; see INPUTS for the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.verifier import verify

INPUTS = {
    "x": "float[B, S, 4]",
    "x2": "float[B, S, 4]",
    "row": "float[4]",
    "square": "float[B, S, S]",
    "ids": "int64[B, S]",
    "mask": "int64[B, S]",
    "flag": "bool[B, S]",
    "scalar": "float",
}
SIZES = [{"B": 1, "S": 1}, {"B": 2, "S": 5}]
MAX_ID = 4


@dataclass(frozen=True)
class Case:
    opset: int
    body: str

    @property
    def inputs(self) -> list[str]:
        words = self.body.replace("(", " ").replace(")", " ").replace(",", " ").split()
        return [name for name in INPUTS if name in words]

    def model(self) -> onnx.ModelProto:
        arguments = ", ".join(f"{INPUTS[name]} {name}" for name in self.inputs)
        model = onnx.parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : {self.opset}]>\n'
            f"g ({arguments}) => (float[N] y) {{ {self.body} }}"
        )
        for info in model.graph.input:
            info.type.tensor_type.shape.SetInParent()  # no axes; the syntax cannot say it
        return model


def feed(case: Case, sizes: dict[str, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    arrays = {}
    for name in case.inputs:
        kind, _, dims = INPUTS[name].partition("[")
        shape = tuple(sizes.get(d.strip()) or int(d) for d in dims.rstrip("]").split(",") if d)
        if kind == "float":
            arrays[name] = (rng.standard_normal(shape) * 1.5).astype(np.float32)
        elif kind == "bool":
            arrays[name] = rng.random(shape) < 0.5
        else:
            arrays[name] = rng.integers(0, 2 if name == "mask" else MAX_ID, shape)
    return arrays


def ints(name: str, *values: int) -> str:
    return f"{name} = Constant <value_ints = [{', '.join(map(str, values))}]> ()"


UNARY = """Abs Neg Exp Sqrt Reciprocal Tanh Erf Sigmoid Relu Floor Ceil Round Sign Sin Cos Softplus
    Softsign Identity Log Atan Sinh Cosh Asinh HardSwish Mish Elu Selu LeakyRelu HardSigmoid
    ThresholdedRelu Celu""".split()  # noqa: SIM905 (readable)
REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()  # noqa: SIM905
BINARY = "Add Sub Mul Div Max Min Sum Mean".split()  # noqa: SIM905

CASES = [
    *[Case(18, f"y = {op} (x)") for op in UNARY],
    *[Case(17, f"y = {op} (x, row)") for op in BINARY],
    *[Case(11, f"p = Abs (x)  y = Reduce{r} <axes = [1, -1]> (p)") for r in REDUCTIONS],
    *[
        Case(18, f"p = Abs (x)  {ints('a', 0, 2)}  y = Reduce{r} <keepdims = 0> (p, a)")
        for r in REDUCTIONS
    ],
    *[Case(18, f"p = Abs (x)  y = Reduce{r} (p)") for r in REDUCTIONS],
    Case(18, "y = ReduceSum <noop_with_empty_axes = 1> (x)"),
    Case(13, f"{ints('a', 1)}  y = ReduceSum (x, a)"),
    # arithmetic
    Case(13, "y = Add (scalar, x)"),
    Case(13, "two = Constant <value_int = 2> ()  y = Pow (x, two)"),
    Case(13, "y = Mod <fmod = 1> (x, row)"),
    Case(
        13,
        "z = Constant <value_int = -3> ()  one = Constant <value_int = 1> ()"
        "  n = Add (ids, one)  y = Mod (z, n)",
    ),
    Case(13, "z = Constant <value_int = 3> ()  n = Neg (ids)  y = Div (n, z)"),
    Case(20, "y = Gelu (x)"),
    Case(20, 'y = Gelu <approximate = "tanh"> (x)'),
    Case(24, "y = Swish <alpha = 1.5> (x)"),
    Case(16, "y = PRelu (x, row)"),
    Case(13, "lo = Constant <value_float = -0.5> ()  y = Clip (x, lo)"),
    Case(
        13,
        "lo = Constant <value_float = -0.5> ()  hi = Constant <value_float = 0.5> ()"
        "  y = Clip (x, lo, hi)",
    ),
    Case(13, "hi = Constant <value_float = 0.5> ()  y = Clip (x, , hi)"),
    Case(13, "y = Clip (x, scalar)"),
    # logic
    Case(16, "c = Less (x, x2)  y = Where (c, x, x2)"),
    Case(16, "c = GreaterOrEqual (x, x2)  d = Not (c)  e = Or (c, d)  y = Where (e, x, row)"),
    Case(
        16,
        "c = LessOrEqual (x, x2)  d = Greater (x, row)  e = And (c, d)  f = Xor (e, c)"
        "  y = Cast <to = 1> (f)",
    ),
    Case(16, "c = Equal (ids, mask)  y = Cast <to = 7> (c)"),
    Case(16, "c = IsNaN (x)  l = Log (x)  d = IsNaN (l)  e = Or (c, d)  y = Cast <to = 6> (e)"),
    Case(
        20,
        "z = Sub (x, x)  i = Div (x, z)  c = IsInf <detect_negative = 0> (i)"
        "  y = Cast <to = 1> (c)",
    ),
    Case(15, "y = CastLike (ids, x)"),
    # shapes
    Case(11, "u = Unsqueeze <axes = [1, -1]> (x)  y = Squeeze <axes = [1]> (u)"),
    Case(13, f"{ints('a', 1, -1)}  u = Unsqueeze (x, a)  y = Squeeze (u, a)"),
    Case(13, f"{ints('a', 0)}  r = ReduceSum (x, a)  u = Unsqueeze (row, a)  y = Squeeze (u)"),
    Case(13, f"{ints('s', 0, -1, 2, 2)}  y = Reshape (x, s)"),
    Case(14, f"{ints('s', -1, 4)}  y = Reshape (x, s)"),
    Case(13, "y = Flatten <axis = 2> (x)"),
    Case(13, "y = Flatten <axis = -3> (x)"),
    Case(13, "y = Transpose (x)"),
    Case(13, "y = Transpose <perm = [1, 0, 2]> (x)"),
    Case(13, "s = Shape (x)  z = ConstantOfShape <value = float[1] {2.5}> (s)  y = Add (z, x)"),
    Case(15, "s = Shape <start = 1> (x)  y = Cast <to = 1> (s)"),
    Case(15, "s = Shape <start = -3, end = -1> (x)  y = Identity (s)"),
    Case(13, "y = Size (x)"),
    Case(13, "s = Shape (x)  y = Expand (row, s)"),
    Case(13, f"{ints('s', 3, 1, 1, 1)}  y = Expand (x, s)"),
    Case(13, "y = Concat <axis = -1> (x, x2, x)"),
    Case(11, "y, z = Split <axis = 2, split = [1, 3]> (x)"),
    Case(13, f"{ints('p', 3, 1)}  z, y = Split <axis = -1> (x, p)"),
    Case(13, "z, y = Split <axis = 2> (x)"),
    Case(18, "a, b, y = Split <axis = 2, num_outputs = 3> (x)"),
    Case(13, f"{ints('s', 1)}  {ints('e', -1)}  {ints('a', 2)}  y = Slice (x, s, e, a)"),
    Case(
        13,
        f"{ints('s', -1, 0)}  {ints('e', -9223372036854775807, 9223372036854775807)}"
        f"  {ints('a', 1, 2)}  {ints('t', -1, 2)}  y = Slice (x, s, e, a, t)",
    ),
    Case(13, f"{ints('s', 1, 1)}  {ints('e', 100, 3)}  y = Slice (x, s, e)"),
    Case(13, f"{ints('r', 2, 1, 3)}  y = Tile (x, r)"),
    Case(
        13,
        f"{ints('p', 0, 1, 0, 0, 2, 1)}  v = Constant <value_float = 7.0> ()  y = Pad (x, p, v)",
    ),
    Case(18, f"{ints('p', 1, 0)}  {ints('a', 1)}  y = Pad (x, p, , a)"),
    Case(
        13,
        "i = Constant <value_int = 0> ()  e = Gather <axis = 0> (square, i)"
        "  y = EyeLike <k = 1> (e)",
    ),
    # indices
    Case(13, "i = Constant <value_int = -1> ()  y = Gather <axis = 1> (x, i)"),
    Case(13, "t = Constant <value = float[4, 2] {1,2,3,4,5,6,7,8}> ()  y = Gather (t, ids)"),
    Case(
        13,
        "n = Constant <value_int = 0> ()  z = Mul (ids, n)"
        "  y = GatherElements <axis = 1> (ids, z)",
    ),
    Case(
        13,
        f"{ints('a', -1)}  n = Constant <value_int = 0> ()  z = Mul (ids, n)"
        "  i = Unsqueeze (z, a)  y = GatherND (x, i)",
    ),
    Case(14, "y = Trilu (square)"),
    Case(14, "k = Constant <value_int = -1> ()  y = Trilu <upper = 0> (square, k)"),
    Case(
        13,
        "d = Constant <value_int = 5> ()  v = Constant <value_floats = [0.5, 2.0]> ()"
        "  y = OneHot <axis = 1> (ids, d, v)",
    ),
    Case(14, "a = Constant <value_int = 1> ()  y = CumSum (mask, a)"),
    Case(14, "a = Constant <value_int = -1> ()  y = CumSum <exclusive = 1, reverse = 1> (x, a)"),
    Case(13, "y = ArgMax <axis = -1> (x)"),
    Case(13, "y = ArgMin <axis = 1, keepdims = 0> (x)"),
    # contractions and normalisations
    Case(13, "t = Transpose <perm = [0, 2, 1]> (x2)  y = MatMul (x, t)"),
    Case(13, "y = MatMul (x, row)"),
    Case(13, 'y = Einsum <equation = "bsd,btd->bst"> (x, x2)'),
    Case(13, 'y = Einsum <equation = "...d,d->..."> (x, row)'),
    Case(13, 'y = Einsum <equation = "bsd->ds"> (x)'),
    Case(13, 'y = Einsum <equation = "bij,bjd"> (square, x)'),
    Case(
        13,
        "f = Flatten <axis = 2> (x)  w = Constant <value = float[2, 4] {1,2,3,4,5,6,7,8}> ()"
        "  c = Constant <value_floats = [0.5, -1.0]> ()"
        "  y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (f, w, c)",
    ),
    Case(
        13,
        "f = Flatten <axis = 2> (x)  g2 = Flatten <axis = 2> (x2)  y = Gemm <transA = 1> (f, g2)",
    ),
    Case(13, "y = Softmax (x)"),
    Case(13, "y = LogSoftmax <axis = 1> (x)"),
    Case(17, "y = LayerNormalization (x, row)"),
    Case(17, "y = LayerNormalization <epsilon = 0.1> (x, row, row)"),
    Case(17, "a, m, v = LayerNormalization (x, row)  b = Add (a, m)  y = Add (b, v)"),
    Case(
        17,
        "o = Shape <start = 1> (x)  w = ConstantOfShape <value = float[1]"
        " {2.0}> (o)  y = LayerNormalization <axis = 1> (x, w)",
    ),
    Case(23, "y = RMSNormalization (x, row)"),
    Case(23, "y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x2, x)"),
    Case(23, "y = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (x, x2, x)"),
    Case(13, "y = Dropout (x)"),
    Case(13, "d, m = Dropout (x)  f = Cast <to = 1> (m)  y = Mul (d, f)"),
    # shape arithmetic
    Case(
        13,
        "s = Shape (ids)  i = Constant <value_int = 1> ()  n = Gather <axis = 0> (s, i)"
        "  z = Constant <value_int = 0> ()  y = Range (z, n, i)",
    ),
    Case(
        13,
        "s = Shape (ids)  i = Constant <value_int = 1> ()  n = Gather <axis = 0> (s, i)"
        "  z = Constant <value_int = -1> ()  y = Range (n, z, z)",
    ),
    Case(
        13,
        f"s = Shape (x)  {ints('m', -1, 1, 1)}  {ints('t', -1, 1, 1)}  e = Equal (m, t)"
        "  p = Where (e, s, m)  y = Expand (row, p)",
    ),
    Case(
        13,
        "s = Shape (x)  p = ReduceProd <keepdims = 0> (s)  f = Cast <to = 1> (p)  y = Mul (x, f)",
    ),
    Case(13, "s = Shape (x)  f = Cast <to = 1> (s)  r = Sqrt (f)  y = Mul (f, r)"),
    Case(
        13,
        f"s = Shape (ids)  {ints('two', 2)}  h = Div (s, two)  m = Mod (s, two)"
        "  d = Mul (h, two)  y = Add (d, m)",
    ),
    Case(13, f"s = Shape (ids)  {ints('two', 2)}  c = Less (s, two)  y = Cast <to = 7> (c)"),
    Case(
        13,
        f"{ints('z', 0)}  s = Shape (ids)  {ints('o', 1)}  {ints('t', 2)}"
        "  n = Slice (s, o, t)  w = Slice (x, z, n, o)  y = Add (w, x)",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.opset}: {c.body[:60]}")
def test_equals_the_reference(case: Case, rng: np.random.Generator):
    model = case.model()
    graph = import_model(model)
    verify(graph)
    for sizes in SIZES:
        inputs = feed(case, sizes, rng)
        with np.errstate(all="ignore"):
            (expected,) = ReferenceEvaluator(model).run(None, inputs)
        (got,) = run(graph, inputs).values()
        assert got.dtype == expected.dtype
        # fp32 against fp32 in another order of operations, on values of a few units
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("op", "log"), [("Softmax", False), ("LogSoftmax", True)])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_softmax_before_opset_13_flattens(op: str, log: bool, axis: int, rng: np.random.Generator):
    """The reference evaluator knows only the newer meaning."""
    case = Case(11, f"y = {op} <axis = {axis}> (x)")
    for sizes in SIZES:
        inputs = feed(case, sizes, rng)
        x = inputs["x"].astype(np.float64)
        rows = int(np.prod(x.shape[: axis % 3]))
        powers = np.exp(x.reshape(rows, -1))
        expected = (powers / powers.sum(axis=1, keepdims=True)).reshape(x.shape)
        (got,) = run(import_model(case.model()), inputs).values()
        # fp32 sums of up to 40 terms
        np.testing.assert_allclose(got, np.log(expected) if log else expected, rtol=0, atol=2e-6)


def test_negative_pads_cut(rng: np.random.Generator):
    case = Case(13, f"{ints('p', 0, 0, -1, 0, 1, -1)}  y = Pad (x, p)")
    inputs = feed(case, SIZES[1], rng)
    (got,) = run(import_model(case.model()), inputs).values()
    np.testing.assert_array_equal(got[:, :-1], inputs["x"][:, :, 1:-1])
    assert not got[:, -1].any()
