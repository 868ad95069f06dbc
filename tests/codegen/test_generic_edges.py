"""Generic kernels at the limits: NaN, integers that trap, bad indices; and their calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.generic_op import GENERIC, GenericOp, generic_op
from sparsec.codegen.program import BufferRef, Region
from sparsec.errors import UnsupportedOp
from sparsec.ir.dims import Dim, ceildiv, symbol
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.layouts import Panels
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType, TensorType
from sparsec.target import Target

B, S = symbol("batch"), symbol("seq")
F32, F64 = DType.F32, DType.F64
I8, U8, I32, I64, BOOL = DType.I8, DType.U8, DType.I32, DType.I64, DType.BOOL
Array = np.ndarray[Any, Any]


def t(dtype: DType, *shape: Dim) -> TensorType:
    return TensorType(dtype, shape)


def case(op: str, *operands: TensorType, **attrs: Any) -> GenericOp:
    (result,) = OPS[op].infer(operands, attrs)
    return generic_op(op, attrs, operands, result, "avx2")


def title(kernel: GenericOp) -> str:
    """A test's name."""
    types = "-".join(str(t).replace(" ", "") for t in kernel.operands)
    return f"{kernel.op}-{types}-{'-'.join(str(v) for _, v in kernel.attrs)}"


SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e30, -1e-30, 0.5, 2.5, -3.5])
UNARY = [
    *("neg", "abs", "sign", "relu", "exp", "sqrt", "tanh", "erf", "sigmoid", "floor", "ceil"),
    *("round", "is_nan", "is_inf"),
]
BINARY = [
    *("equal", "less", "less_equal", "greater", "greater_equal"),
    *("maximum", "minimum", "div", "mul"),
]
FLOAT_CASES = [
    *(case(op, t(d, B, S)) for op in UNARY for d in (F32, F64)),
    *(case(op, t(F32, B, S), t(F32, B, S)) for op in BINARY),
    case("clip", t(F32, B, S), min=-1.0, max=1.0),
    *(case("cast", t(F32, B, S), to=d) for d in (BOOL, F64)),
    *(
        case(op, t(F32, B, S), axes=(1,), keepdims=False)
        for op in ("reduce_max", "reduce_min", "reduce_sum")
    ),
    *(case(op, t(F32, B, S), axis=1, keepdims=False) for op in ("arg_max", "arg_min")),
    case("softmax", t(F32, B, S), axis=1),
]
LIMITED = [I8, I32, I64, U8]
INTEGER_CASES = [
    *(case(op, t(d, B, S), t(d, B, S)) for op in ("div", "mul", "add", "sub") for d in LIMITED),
    *(case("mod", t(d, B, S), t(d, B, S), fmod=f) for d in LIMITED for f in (True, False)),
]
GATHERS = [
    case("gather", t(F32, 5, 6), t(I64, B, S), axis=0),
    case("gather", t(F32, B, S, 5, 3), t(I32, 4), axis=2),
    case("gather", t(F32, B, 5), t(I64), axis=1),
    case("gather", t(F32, 5, S), t(I8, 1), axis=0),
    case("gather_elements", t(F32, 5, S), t(I64, 5, S), axis=0),
    case("gather_elements", t(F32, B, 5, 3), t(I32, B, S, 2), axis=1),
    case("gather_nd", t(F32, 5, 5, S), t(I64, B, 2), batch_dims=0),
    case("gather_nd", t(F32, B, 5, 3), t(I64, B, 1), batch_dims=1),
]
POWER = case("pow", t(I32, S), t(I32, S))
ADD = case("add", t(F32, B, S), t(F32, S))
CASES = [*FLOAT_CASES, *INTEGER_CASES, *GATHERS, POWER, ADD]


@pytest.fixture(scope="module")
def kernels(link_kernels: Any) -> Any:
    return link_kernels(CASES)


def oracle(kernel: GenericOp, arrays: list[Array], env: Mapping[str, int]) -> Array:
    (result,) = OPS[kernel.op].evaluate(arrays, dict(kernel.attrs), env)
    return result


@pytest.mark.parametrize("kernel", FLOAT_CASES, ids=title)
def test_not_a_number_and_infinity(kernel: GenericOp, kernels: Any) -> None:
    dtype = kernel.operands[0].dtype.numpy
    first, second = np.broadcast_arrays(SPECIAL[:, None], SPECIAL[None, :])
    arrays = [np.array(a, dtype, order="C") for a in (first, second)][-len(kernel.operands) :]
    if len(arrays) == 1:
        arrays[0][4:, 0] = 7.0  # these rows have no NaN, the last ones no infinity
        arrays[0][8:, 1:3] = 8.0
    env = {"batch": len(SPECIAL), "seq": len(SPECIAL)}
    _, result = kernels.run(kernel, arrays, env)
    # 4 roundings; where it is exact (comparisons, maximum) the difference is 0 anyway.
    room = 4 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(result, oracle(kernel, arrays, env), rtol=room, atol=room)


@pytest.mark.parametrize("kernel", INTEGER_CASES, ids=title)
def test_integers_at_their_limits_never_trap(kernel: GenericOp, kernels: Any) -> None:
    dtype = kernel.operands[0].dtype.numpy
    info = np.iinfo(dtype)
    numbers = [info.min, info.min + 1, 0, 1, 2, 7, info.max, *((-1, -7) if info.min else ())]
    values = np.array(numbers, dtype)
    pairs = np.broadcast_arrays(values[:, None], values[None, :])
    arrays = [np.array(a, order="C") for a in pairs]
    env = {"batch": len(values), "seq": len(values)}
    _, result = kernels.run(kernel, arrays, env)
    with np.errstate(all="ignore"):
        expected = oracle(kernel, arrays, env)
    np.testing.assert_array_equal(result, expected)


def test_negative_integer_power_truncates(kernels: Any) -> None:
    base = np.array([1, -1, -1, 2, -3, 0], np.int32)
    power = np.array([-5, -5, -4, -1, -2, -1], np.int32)
    _, result = kernels.run(POWER, [base, power], {"seq": len(base)})
    np.testing.assert_array_equal(result, [1, -1, 1, 0, 0, 0])


@pytest.mark.parametrize("kernel", GATHERS, ids=title)
@pytest.mark.parametrize("bad", [5, -6, 127, -128])
@pytest.mark.parametrize("place", [0, -1])
def test_index_out_of_range_is_status_1(
    kernel: GenericOp, bad: int, place: int, kernels: Any, rng: np.random.Generator
) -> None:
    """Every indexed axis has 5 elements."""
    env = {"batch": 2, "seq": 3}
    shapes = [[env.get(str(d), d) for d in type.shape] for type in kernel.operands]
    indices = rng.integers(-5, 5, shapes[1]).astype(kernel.operands[1].dtype.numpy)
    data = rng.standard_normal(shapes[0]).astype(np.float32)
    assert kernels.run(kernel, [data, indices], env)[0] == 0
    indices = np.array(indices)
    indices.reshape(-1)[place] = bad
    assert kernels.run(kernel, [data, indices], env, pieces=3)[0] == 1


@pytest.mark.parametrize("bad", [-(1 << 63), (1 << 63) - 1, 1 << 40, -(1 << 40)])
def test_far_index_reads_inside_the_table(bad: int, kernels: Any) -> None:
    """A read at such an index would end the process."""
    env = {"batch": 1, "seq": 1}
    arrays = [np.zeros((5, 6), np.float32), np.array([[bad]], np.int64)]
    assert kernels.run(GATHERS[0], arrays, env)[0] == 1


def test_element_aligned_memory_is_enough(kernels: Any, rng: np.random.Generator) -> None:
    """Model inputs and outputs lie where the caller has them."""
    env = {"batch": 3, "seq": 37}
    room = rng.standard_normal(3 * 37 + 1).astype(np.float32)
    arrays = [room[1:].reshape(3, 37), room[1:38]]
    assert arrays[0].ctypes.data % 16
    _, result = kernels.run(ADD, arrays, env)
    np.testing.assert_array_equal(result, arrays[0] + arrays[1])


class Memory:
    """A binder that puts every value in the same slot."""

    def ref(self, value: Value) -> BufferRef:
        return BufferRef(Region.ARENA, 0, value.type, value.name)

    def weight(self, name: str, data: Array) -> BufferRef:
        raise AssertionError(name)

    def optional(self, value: Value | None) -> Any:
        return None if value is None else self.ref(value)


def lower(node: Node | None, host: Target) -> Any:
    assert node is not None
    schedule = GENERIC.schedules(GENERIC.workload(node), host)[0]
    return GENERIC.lower(node, schedule, Memory())


def test_lower_gives_one_call_and_shares_kernels(host: Target) -> None:
    graph = Graph("g")
    y = graph.add("exp", [graph.add_input("x", F32, (B, S, 6))])
    z = graph.add("exp", [y])
    (first,), (second,) = lower(y.producer, host), lower(z.producer, host)
    assert first.kernel == second.kernel
    assert first.kernel.name == second.kernel.name
    assert first.items == 6 * B * S
    assert [p.name for p in first.kernel.parameters] == ["x0", "y", "size_batch", "size_seq"]
    assert first.args[2:] == (B, S)


def test_result_without_elements_needs_no_call(host: Target) -> None:
    graph = Graph("g")
    assert lower(graph.add("exp", [graph.add_input("x", F32, (0, 6))]).producer, host) == []


def test_copy_moves_all_elements(host: Target) -> None:
    source = BufferRef(Region.INPUT, 0, t(I64, B, S), "ids")
    to = BufferRef(Region.OUTPUT, 0, t(I64, B, S), "out")
    call = GENERIC.copy(source, to, host)
    assert call.args == (source, to, B, S)
    assert call.items == B * S


def test_op_without_a_generic_form_is_named(host: Target) -> None:
    graph = Graph("g")
    x = graph.add_input("x", F32, (B, S, 64))
    scale = graph.add_constant(np.ones(64, np.float32))
    attrs = {"epsilon": 1e-5}
    y = graph.add("layer_norm", [x, scale, None, None], attrs, name="norm_1")
    with pytest.raises(UnsupportedOp, match=r"norm_1 \(layer_norm of .*no kernel"):
        lower(y.producer, host)


def test_elementwise_on_panels_is_one_axis(host: Target) -> None:
    graph = Graph("g")
    x = graph.add_input("x", F32, (B, S, 6))
    y = graph.add("maximum", [x, graph.add_constant(np.float32(2))])
    for value in (x, y):
        graph.set_type(value, value.type.with_layout(Panels()))
    (call,) = lower(y.producer, host)
    # floordiv(batch * seq + 63, 64) panels of 6 channels
    assert call.items == ceildiv(B * S, 64) * 64 * 6
    assert [t.shape for t in call.kernel.operands] == [(call.items,), ()]


def test_broadcast_in_panels_is_refused(host: Target) -> None:
    graph = Graph("g")
    x = graph.add_input("x", F32, (B, S, 64))
    y = graph.add("add", [x, graph.add_input("b", F32, (64,))], name="add_1")
    for value in (x, y):
        graph.set_type(value, value.type.with_layout(Panels()))
    with pytest.raises(UnsupportedOp, match=r"add_1 .*row-major"):
        lower(y.producer, host)
