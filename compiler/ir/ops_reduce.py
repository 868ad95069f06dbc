"""Ops that reduce, scan or normalise along axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.op_helpers import (
    Env,
    array,
    axis_of,
    is_positive,
    operand,
    require_float,
    text,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, Evaluate, OpSpec, Types
from sparsec.ir.types import DType, TensorType


def _infer_reduce(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    if x.dtype is DType.BOOL:
        raise InvalidGraph(f"needs numbers, got {x}")
    axes = tuple(axis_of(a, x.rank) for a in attrs["axes"])
    if len(set(axes)) != len(axes):
        raise InvalidGraph(f"axes {axes} repeat")
    if attrs["keepdims"]:
        return [TensorType(x.dtype, tuple(1 if i in axes else d for i, d in enumerate(x.shape)))]
    return [TensorType(x.dtype, tuple(d for i, d in enumerate(x.shape) if i not in axes))]


def _infer_order(types: Types, attrs: Attrs) -> list[TensorType]:
    _require_elements(operand(types, 0), attrs["axes"])
    return _infer_reduce(types, attrs)


def _require_elements(x: TensorType, axes: tuple[int, ...]) -> None:
    empty = [a for a in axes if 0 <= a < x.rank and not is_positive(x.shape[a])]
    if empty:
        raise InvalidGraph(f"axis {empty[0]} of {text(x.shape)} may be empty: it has no extreme")


def _reduce(function: Callable[..., Any]) -> Evaluate:
    def evaluate(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
        x = array(arrays, 0)
        with np.errstate(all="ignore"):
            result = function(x, axis=attrs["axes"], keepdims=attrs["keepdims"])
        return [np.asarray(result).astype(x.dtype, copy=False)]

    return evaluate


def _mean(x: Array, axis: tuple[int, ...], keepdims: bool) -> Any:
    if np.issubdtype(x.dtype, np.floating):
        return np.mean(x, axis=axis, keepdims=keepdims)
    count = int(np.prod([x.shape[a] for a in axis], dtype=np.int64))
    total = np.asarray(np.sum(x, axis=axis, keepdims=keepdims, dtype=np.int64))
    return np.sign(total) * (np.abs(total) // max(count, 1))  # truncates, as C division does


def _l2(x: Array, axis: tuple[int, ...], keepdims: bool) -> Any:
    return np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims))


def _infer_arg(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    axis = attrs["axis"]
    _require_elements(x, (axis,))
    (kept,) = _infer_reduce(types, {"axes": (axis,), "keepdims": attrs["keepdims"]})
    return [TensorType(DType.I64, kept.shape)]


def _arg(function: Callable[..., Any]) -> Evaluate:
    def evaluate(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
        x = array(arrays, 0)
        result = function(x, axis=attrs["axis"], keepdims=attrs["keepdims"])
        return [np.asarray(result, np.int64)]

    return evaluate


def _infer_softmax(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    require_float(x)
    axis_of(attrs["axis"], x.rank)
    return [TensorType(x.dtype, x.shape)]


def softmax(x: Array, axis: int) -> Array:
    """exp(x) / sum(exp(x)) along `axis`, after subtracting the largest x.

    A row that is -inf throughout gives NaN, as ONNX says.
    """
    if x.size == 0:
        return x
    with np.errstate(invalid="ignore"):
        powers = np.exp(x - x.max(axis=axis, keepdims=True))
        return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def _log_softmax(x: Array, axis: int) -> Array:
    if x.size == 0:
        return x
    with np.errstate(all="ignore"):
        shifted = x - x.max(axis=axis, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))


def _along_axis(function: Callable[[Array, int], Array]) -> Evaluate:
    def evaluate(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
        return [function(array(arrays, 0), attrs["axis"])]

    return evaluate


def _infer_cumsum(types: Types, attrs: Attrs) -> list[TensorType]:
    x = operand(types, 0)
    if x.dtype is DType.BOOL:
        raise InvalidGraph(f"needs numbers, got {x}")
    axis_of(attrs["axis"], x.rank)
    return [TensorType(x.dtype, x.shape)]


def _evaluate_cumsum(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x, axis = array(arrays, 0), attrs["axis"]
    ordered = np.flip(x, axis) if attrs["reverse"] else x
    total = np.cumsum(ordered, axis=axis, dtype=x.dtype)
    if attrs["exclusive"]:
        total = np.roll(total, 1, axis=axis)
        total[(slice(None),) * axis + (slice(0, 1),)] = 0
    return [np.ascontiguousarray(np.flip(total, axis) if attrs["reverse"] else total)]


_REDUCE = ("axes", "keepdims")
_ARG = ("axis", "keepdims")

_ROWS = [
    OpSpec("reduce_sum", _infer_reduce, _reduce(np.sum), _REDUCE),
    OpSpec("reduce_mean", _infer_reduce, _reduce(_mean), _REDUCE),
    OpSpec("reduce_max", _infer_order, _reduce(np.max), _REDUCE),
    OpSpec("reduce_min", _infer_order, _reduce(np.min), _REDUCE),
    OpSpec("reduce_prod", _infer_reduce, _reduce(np.prod), _REDUCE),
    OpSpec("reduce_l2", _infer_reduce, _reduce(_l2), _REDUCE),
    OpSpec("arg_max", _infer_arg, _arg(np.argmax), _ARG),
    OpSpec("arg_min", _infer_arg, _arg(np.argmin), _ARG),
    OpSpec("softmax", _infer_softmax, _along_axis(softmax), ("axis",)),
    OpSpec("log_softmax", _infer_softmax, _along_axis(_log_softmax), ("axis",)),
    OpSpec("cumsum", _infer_cumsum, _evaluate_cumsum, ("axis", "exclusive", "reverse")),
]
REDUCE_OPS = {row.name: row for row in _ROWS}
