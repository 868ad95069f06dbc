"""Ops that move, select or make elements without computing with them."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir import dims
from sparsec.ir.dims import Dim, ceildiv, product
from sparsec.ir.op_helpers import (
    Env,
    Shape,
    array,
    axis_of,
    broadcast,
    operand,
    require_equal,
    require_integer,
    same_dtype,
    text,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, OpSpec, Types
from sparsec.ir.types import DType, TensorType


def _concrete(shape: Shape, env: Env) -> tuple[int, ...]:
    return tuple(dims.evaluate(d, env) for d in shape)


def _infer_reshape(types: Types, attrs: Attrs) -> list[TensorType]:
    x, shape = operand(types, 0), tuple(attrs["shape"])
    if x.elements != product(shape):
        raise InvalidGraph(f"{text(x.shape)} does not have the elements of {text(shape)}")
    return [TensorType(x.dtype, shape)]


def _evaluate_reshape(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    return [array(arrays, 0).reshape(_concrete(attrs["shape"], env))]


def _infer_transpose(types: Types, attrs: Attrs) -> list[TensorType]:
    x, perm = operand(types, 0), attrs["perm"]
    if sorted(perm) != list(range(x.rank)):
        raise InvalidGraph(f"perm {perm} is not a permutation of the {x.rank} axes")
    return [TensorType(x.dtype, tuple(x.shape[a] for a in perm))]


def _evaluate_transpose(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    return [array(arrays, 0).transpose(attrs["perm"])]


def _infer_broadcast(types: Types, attrs: Attrs) -> list[TensorType]:
    x, shape = operand(types, 0), tuple(attrs["shape"])
    if broadcast([x.shape, shape]) != shape:
        raise InvalidGraph(f"{text(x.shape)} does not broadcast to {text(shape)}")
    return [TensorType(x.dtype, shape)]


def _evaluate_broadcast(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    return [np.broadcast_to(array(arrays, 0), _concrete(attrs["shape"], env))]


def _infer_concat(types: Types, attrs: Attrs) -> list[TensorType]:
    parts = [operand(types, i) for i in range(len(types))]
    if not parts:
        raise InvalidGraph("needs at least one operand")
    first = parts[0]
    axis = axis_of(attrs["axis"], first.rank)
    total: Dim = 0
    for part in parts:
        if part.rank != first.rank:
            raise InvalidGraph(f"operands {first} and {part} differ in rank")
        for i, (a, b) in enumerate(zip(first.shape, part.shape, strict=True)):
            if i != axis:
                require_equal(f"axis {i} of {first} and {part}", a, b)
        total = total + part.shape[axis]
    shape = (*first.shape[:axis], total, *first.shape[axis + 1 :])
    return [TensorType(same_dtype(parts), shape)]


def _evaluate_concat(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    parts = [array(arrays, i) for i in range(len(arrays))]
    return [np.concatenate(parts, axis=attrs["axis"])]


def slice_length(start: Dim, end: Dim, step: int) -> Dim:
    """How many elements a slice takes; bounds are clamped, at least 0 when that is not certain.

    For a negative step `end` may be -1: the slice then includes element 0.
    """
    span = end - start if step > 0 else start - end
    return dims.maximum(ceildiv(span, abs(step)), 0)


def _infer_slice(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    shape = list(x.shape)
    fields = (attrs["axes"], attrs["starts"], attrs["ends"], attrs["steps"])
    for axis, start, end, step in zip(*fields, strict=True):
        if step == 0:
            raise InvalidGraph(f"the step of axis {axis} is 0")
        shape[axis_of(axis, x.rank)] = slice_length(start, end, step)
    return [TensorType(x.dtype, tuple(shape))]


def _evaluate_slice(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x = array(arrays, 0)
    index: list[slice] = [slice(None)] * x.ndim
    fields = (attrs["axes"], attrs["starts"], attrs["ends"], attrs["steps"])
    for axis, start, end, step in zip(*fields, strict=True):
        first, last = dims.evaluate(start, env), dims.evaluate(end, env)
        index[axis] = slice(first, None if last < 0 else last, step)
    return [x[tuple(index)]]


def _infer_gather(types: Types, attrs: Attrs) -> list[TensorType]:
    x, indices = operand(types, 0), operand(types, 1)
    require_integer(indices)
    axis = axis_of(attrs["axis"], x.rank)
    return [TensorType(x.dtype, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))]


def _evaluate_gather(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x, indices, axis = array(arrays, 0), array(arrays, 1), attrs["axis"]
    check_indices(indices, x.shape[axis])
    return [np.take(x, indices.astype(np.int64), axis=axis)]


def check_indices(indices: Array, size: int) -> None:
    """IndexError, naming the first bad index, unless all lie in [-size, size)."""
    bad = (indices < -size) | (indices >= size)
    if bad.any():
        worst = indices.reshape(-1)[int(np.argmax(bad))]
        raise IndexError(f"index {worst} is outside [{-size}, {size})")


def _infer_gather_elements(types: Types, attrs: Attrs) -> list[TensorType]:
    x, indices = operand(types, 0), operand(types, 1)
    require_integer(indices)
    axis_of(attrs["axis"], x.rank)
    if x.rank != indices.rank:
        raise InvalidGraph(f"operands {x} and {indices} differ in rank")
    return [TensorType(x.dtype, indices.shape)]


def _evaluate_gather_elements(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x, indices, axis = array(arrays, 0), array(arrays, 1), attrs["axis"]
    check_indices(indices, x.shape[axis])
    # The other axes of x may be longer than those of the indices: only the head is read.
    head = tuple(slice(None) if i == axis else slice(n) for i, n in enumerate(indices.shape))
    return [np.take_along_axis(x[head], indices.astype(np.int64), axis=axis)]


def _infer_gather_nd(types: Types, attrs: Attrs) -> list[TensorType]:
    x, indices, batch = operand(types, 0), operand(types, 1), attrs["batch_dims"]
    require_integer(indices)
    depth = indices.shape[-1] if indices.rank else 0
    if not isinstance(depth, int) or not 1 <= depth <= x.rank - batch:
        raise InvalidGraph(f"{indices} does not index {x} with batch_dims {batch}")
    for i in range(batch):
        require_equal(f"batch axis {i}", x.shape[i], indices.shape[i])
    return [TensorType(x.dtype, (*indices.shape[:-1], *x.shape[batch + depth :]))]


def _evaluate_gather_nd(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x, indices, batch = array(arrays, 0), array(arrays, 1), attrs["batch_dims"]
    columns: list[Array] = []
    for i in range(batch):
        shape = [1] * (indices.ndim - 1)
        shape[i] = x.shape[i]
        columns.append(np.arange(x.shape[i]).reshape(shape))
    for i in range(indices.shape[-1]):
        check_indices(indices[..., i], x.shape[batch + i])
        columns.append(indices[..., i])
    return [x[tuple(columns)]]


def _infer_pad(types: Types, attrs: Attrs) -> list[TensorType]:
    x, before, after = operand(types, 0), attrs["pads_before"], attrs["pads_after"]
    if len(before) != x.rank or len(after) != x.rank:
        raise InvalidGraph(f"pads {text(before)} {text(after)} do not fit {x}")
    shape = tuple(b + d + a for b, d, a in zip(before, x.shape, after, strict=True))
    return [TensorType(x.dtype, shape)]


def _evaluate_pad(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x = array(arrays, 0)
    before, after = _concrete(attrs["pads_before"], env), _concrete(attrs["pads_after"], env)
    inner = tuple(
        slice(max(-b, 0), n - max(-a, 0)) for b, n, a in zip(before, x.shape, after, strict=True)
    )
    widths = [(max(b, 0), max(a, 0)) for b, a in zip(before, after, strict=True)]
    return [np.pad(x[inner], widths, constant_values=attrs["value"])]


def _infer_trilu(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    if x.rank < 2:
        raise InvalidGraph(f"needs at least two axes, got {x}")
    return [TensorType(x.dtype, x.shape)]


def _evaluate_trilu(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    keep = np.triu if attrs["upper"] else np.tril
    return [keep(array(arrays, 0), attrs["k"])]


def _infer_one_hot(types: Types, attrs: Attrs) -> list[TensorType]:
    indices, values = operand(types, 0), operand(types, 1)
    require_integer(indices)
    if values.shape != (2,):
        raise InvalidGraph(f"the values must be [off, on], got {values}")
    axis = axis_of(attrs["axis"], indices.rank + 1)
    shape = (*indices.shape[:axis], attrs["depth"], *indices.shape[axis:])
    return [TensorType(values.dtype, shape)]


def _evaluate_one_hot(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    indices, (off, on) = array(arrays, 0), array(arrays, 1)
    depth = dims.evaluate(attrs["depth"], env)
    wrapped = np.where(indices < 0, indices + depth, indices)  # out of range: all off
    hot = np.expand_dims(wrapped, -1) == np.arange(depth)
    return [np.ascontiguousarray(np.moveaxis(np.where(hot, on, off), -1, attrs["axis"]))]


def _infer_iota(types: Types, attrs: Attrs) -> list[TensorType]:
    if attrs["step"] == 0:
        raise InvalidGraph("the step is 0")
    return [TensorType(attrs["dtype"], (attrs["length"],))]


def _evaluate_iota(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    start, length = dims.evaluate(attrs["start"], env), dims.evaluate(attrs["length"], env)
    dtype: DType = attrs["dtype"]
    return [(start + attrs["step"] * np.arange(length)).astype(dtype.numpy)]


def _infer_dims(types: Types, attrs: Attrs) -> list[TensorType]:
    values, shape = attrs["values"], attrs["shape"]
    if product(shape) != len(values):
        raise InvalidGraph(f"{len(values)} values do not fill {text(shape)}")
    return [TensorType(attrs["dtype"], tuple(shape))]


def _evaluate_dims(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    dtype: DType = attrs["dtype"]
    values: list[Any] = [dims.evaluate(v, env) for v in attrs["values"]]
    return [np.array(values, np.int64).astype(dtype.numpy).reshape(attrs["shape"])]


_SLICE = ("axes", "starts", "ends", "steps")
_PAD = ("pads_before", "pads_after", "value")
_IOTA = ("start", "step", "length", "dtype")

_ROWS = [
    OpSpec("reshape", _infer_reshape, _evaluate_reshape, ("shape",)),
    OpSpec("transpose", _infer_transpose, _evaluate_transpose, ("perm",)),
    OpSpec("broadcast_to", _infer_broadcast, _evaluate_broadcast, ("shape",)),
    OpSpec("concat", _infer_concat, _evaluate_concat, ("axis",)),
    OpSpec("slice", _infer_slice, _evaluate_slice, _SLICE),
    OpSpec("gather", _infer_gather, _evaluate_gather, ("axis",)),
    OpSpec("gather_elements", _infer_gather_elements, _evaluate_gather_elements, ("axis",)),
    OpSpec("gather_nd", _infer_gather_nd, _evaluate_gather_nd, ("batch_dims",)),
    OpSpec("pad", _infer_pad, _evaluate_pad, _PAD),
    OpSpec("trilu", _infer_trilu, _evaluate_trilu, ("upper", "k")),
    OpSpec("one_hot", _infer_one_hot, _evaluate_one_hot, ("depth", "axis")),
    OpSpec("iota", _infer_iota, _evaluate_iota, _IOTA),
    OpSpec("dims", _infer_dims, _evaluate_dims, ("values", "dtype", "shape")),
]
SHAPE_OPS = {row.name: row for row in _ROWS}
