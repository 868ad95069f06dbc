"""What the rows of the op tables share: operands, broadcasting of dims, layout of results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.dims import Dim, compare
from sparsec.ir.layouts import ROW_MAJOR, Layout, Panels
from sparsec.ir.op_spec import Array, Arrays, Attrs, Evaluate, Types
from sparsec.ir.types import DType, TensorType

Shape = tuple[Dim, ...]
Env = Mapping[str, int]


def operand(types: Types, index: int) -> TensorType:
    """The type of a required operand."""
    type = types[index] if index < len(types) else None
    if type is None:
        raise InvalidGraph(f"operand {index} is required and absent")
    return type


def optional(types: Types, index: int) -> TensorType | None:
    """The type of an operand that may be absent."""
    return types[index] if index < len(types) else None


def array(arrays: Arrays, index: int) -> Array:
    """A required operand of `evaluate`."""
    data = arrays[index]
    assert data is not None, f"operand {index} is absent"
    return data


def optional_array(arrays: Arrays, index: int) -> Array | None:
    """An operand of `evaluate` that may be absent."""
    return arrays[index] if index < len(arrays) else None


def text(shape: Sequence[Dim]) -> str:
    """A shape as a message shows it."""
    return f"[{', '.join(str(d) for d in shape)}]"


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The NumPy broadcast of shapes of dims; InvalidGraph names the shapes that do not fit."""
    result: Shape = ()
    for shape in shapes:
        rank = max(len(result), len(shape))
        left: Shape = (1,) * (rank - len(result)) + result
        right: Shape = (1,) * (rank - len(shape)) + shape
        pairs = zip(left, right, strict=True)
        result = tuple(_broadcast_dim(a, b, result, shape) for a, b in pairs)
    return result


def _broadcast_dim(a: Dim, b: Dim, left: Shape, right: Shape) -> Dim:
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    sure = isinstance(a, int) and isinstance(b, int)
    why = "differ" if sure else "are not known to be equal"
    raise InvalidGraph(
        f"shapes {text(left)} and {text(right)} do not broadcast: {a} and {b} {why}"
    )


def require_equal(what: str, a: Dim, b: Dim) -> None:
    """InvalidGraph unless the two dims are the same expression."""
    if a != b:
        raise InvalidGraph(f"{what}: {a} and {b} are not equal")


def broadcastable_to(shape: Shape, target: Shape) -> bool:
    """Whether `shape` broadcasts to `target` without enlarging it."""
    if len(shape) > len(target):
        return False
    tail = target[len(target) - len(shape) :]
    return all(a in (1, b) for a, b in zip(shape, tail, strict=True))


def axis_of(axis: int, rank: int) -> int:
    """A non-negative axis that exists."""
    if not 0 <= axis < rank:
        raise InvalidGraph(f"axis {axis} is outside 0..{rank - 1}")
    return axis


def is_positive(dim: Dim) -> bool:
    """Whether `dim` is at least 1 for all values of its symbols."""
    return compare(dim, 0) == 1


def same_dtype(types: Sequence[TensorType]) -> DType:
    """The dtype that all operands share."""
    dtype = types[0].dtype
    for type in types[1:]:
        if type.dtype is not dtype:
            raise InvalidGraph(f"operand dtypes {dtype} and {type.dtype} differ; cast one of them")
    return dtype


def require_float(type: TensorType) -> None:
    if not type.dtype.is_float:
        raise InvalidGraph(f"needs a float operand, got {type}")


def require_integer(type: TensorType) -> None:
    if type.dtype.is_float or type.dtype is DType.BOOL:
        raise InvalidGraph(f"needs an integer operand, got {type}")


def elementwise_layout(types: Sequence[TensorType], shape: Shape) -> Layout:
    """Panels when all operands of the full shape are in the same panels, else rows."""
    full = [t.layout for t in types if t.shape == shape and t.rank == len(shape)]
    if full and isinstance(full[0], Panels) and all(x == full[0] for x in full):
        return full[0]
    return ROW_MAJOR


def panel_layout(types: Sequence[TensorType | None], dtype: DType = DType.F32) -> Layout:
    """The layout of the result of an op whose kernels read and write panels."""
    for type in types:
        if type is not None and isinstance(type.layout, Panels):
            return panels_of(dtype, type.layout.width)
    return ROW_MAJOR


def by_sequence(evaluate: Evaluate) -> Evaluate:
    """An attention's `evaluate`, for one batch, as that of packed tokens too: one sequence at a
    time. Operands 0 to 2 are [1, tokens, channels], the mask is [1, 1, 1, tokens] or absent."""

    def packed(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
        starts = optional_array(arrays, 5)
        if starts is None:
            return evaluate(arrays[:4], attrs, env)
        parts = []
        for start, end in itertools.pairwise(starts):
            operands = [array(arrays, i)[:, start:end] for i in range(3)]
            mask = optional_array(arrays, 3)
            own = [*operands, None if mask is None else mask[..., start:end]]
            parts.append(evaluate(own, attrs, env)[0])
        return [np.concatenate(parts, axis=1)]

    return packed


def panels_of(dtype: DType, width: int) -> Panels:
    """The panels in which numbers of a type lie."""
    return Panels(width, "pairs" if dtype is DType.BF16 else "planar")


def stored_bf16(type: TensorType) -> TensorType:
    """An fp32 type as it is stored in bf16; InvalidGraph when it has no pairs of channels."""
    if type.dtype is not DType.F32:
        raise InvalidGraph(f"only f32 becomes bf16, got {type}")
    if type.rank == 0 or not isinstance(type.shape[-1], int) or type.shape[-1] % 2:
        raise InvalidGraph(f"bf16 lies in pairs of channels, got {type}")
    layout = panel_layout([type], DType.BF16)
    return TensorType(DType.BF16, type.shape, layout)


def pointwise(function: Callable[..., Any]) -> Evaluate:
    """`evaluate` of an op without attributes: the dtype of the first operand is kept."""

    def evaluate(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
        operands = [array(arrays, i) for i in range(len(arrays))]
        with np.errstate(all="ignore"):
            return [np.asarray(function(*operands)).astype(operands[0].dtype, copy=False)]

    return evaluate
