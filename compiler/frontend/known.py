"""Shape arithmetic at import: small integer arrays whose elements are dims.

What `Shape` gives, and all that is computed from it, is known as dims before the model runs. Such
an array is a `Known`; the ops below act on it as the op table's `evaluate` acts on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsec.ir import dims
from sparsec.ir.dims import Dim, Expr
from sparsec.ir.op_spec import Array
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType, TensorType

MAX_ELEMENTS = 4096  # above this an integer constant is data, not shape arithmetic


class Undecided(Exception):
    """The result depends on the values of the symbols in a way that no dim can express."""


@dataclass(frozen=True, slots=True)
class Known:
    """A small integer or bool tensor; `data` has dtype object and holds dims (or bools)."""

    data: Array
    dtype: DType

    @property
    def type(self) -> TensorType:
        return TensorType(self.dtype, self.data.shape)

    @property
    def is_number(self) -> bool:
        """Whether no element depends on a symbol."""
        return not any(isinstance(d, Expr) for d in self.data.reshape(-1))

    def numbers(self) -> Array:
        """The array as ordinary numbers; only when `is_number`."""
        return self.data.astype(self.dtype.numpy)


def known_of(items: Sequence[Dim]) -> Known:
    """A rank 1 Known of int64."""
    data = np.empty(len(items), object)
    data[:] = list(items)
    return Known(data, DType.I64)


def from_numbers(data: Array) -> Known:
    """A constant integer or bool array as Known."""
    return Known(_objects(data.tolist(), data.shape), DType.of(data.dtype))


def evaluate(op: str, operands: Sequence[Known], attrs: Mapping[str, Any]) -> Known:
    """Apply an op of the table to dims.

    Raises Undecided when the op is not one of shape arithmetic or its result is not a dim.
    """
    types = [k.type for k in operands]
    (result,) = OPS[op].infer(types, attrs)
    if result.dtype.is_float or not all(isinstance(d, int) for d in result.shape):
        raise Undecided
    if dims.compare(result.elements, MAX_ELEMENTS) == 1:
        raise Undecided
    data = _apply(op, [k.data for k in operands], attrs)
    shape = tuple(d for d in result.shape if isinstance(d, int))
    return Known(_objects(data, shape), result.dtype)


def _apply(op: str, arrays: list[Array], attrs: Mapping[str, Any]) -> Any:
    if op in _ELEMENT:
        function = _ELEMENT[op]
        return np.frompyfunc(function, len(arrays), 1)(*arrays)
    if op in _REDUCTION:
        return _reduce(_REDUCTION[op], arrays[0], attrs["axes"], attrs["keepdims"])
    if op == "cast":
        return np.frompyfunc(_CAST.get(attrs["to"], _integer), 1, 1)(*arrays)
    if op not in _STRUCTURAL or any(isinstance(v, Expr) for v in _flat(attrs)):
        raise Undecided
    return OPS[op].evaluate(arrays, attrs, {})[0]


def _flat(attrs: Mapping[str, Any]) -> list[Any]:
    return [i for v in attrs.values() for i in (v if isinstance(v, tuple) else (v,))]


def _objects(data: Any, shape: tuple[int, ...]) -> Array:
    result = np.empty(shape, object)
    result[...] = data
    return result


def _reduce(
    function: Callable[[Any, Any], Any], x: Array, axes: tuple[int, ...], keepdims: bool
) -> Any:
    ufunc = np.frompyfunc(function, 2, 1)
    for axis in sorted(axes, reverse=True):
        if x.shape[axis] == 0:
            raise Undecided
        x = np.asarray(ufunc.reduce(x, axis=axis, keepdims=keepdims), object)
    return x


def _sign(a: Dim, b: Dim) -> tuple[bool, bool, bool]:
    """Whether a < b, a == b and a > b; Undecided when that depends on the symbols."""
    if a == b:
        return False, True, False
    sign = dims.compare(a, b)
    if sign is None:
        raise Undecided
    return sign < 0, sign == 0, sign > 0


def _less_equal(a: Dim, b: Dim) -> bool:
    if dims.maximum(a, b) == b:
        return True
    return not _sign(a, b)[2]


def _quotient(a: Dim, b: Dim) -> Dim:
    """Division as ONNX has it: towards zero. Only for operands whose signs are known."""
    if isinstance(a, int) and isinstance(b, int):
        if b == 0:
            raise Undecided
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    _require_natural(a, b)
    return dims.floordiv(a, b)


def _remainder(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int) and b:
        return a % b
    _require_natural(a, b)
    return dims.mod(a, b)


def _require_natural(a: Dim, b: Dim) -> None:
    """a >= 0 and b > 0 for all symbols: floor and truncation are then the same."""
    low = dims.bounds(a)[0]
    if low is None or low < 0 or dims.compare(b, 0) != 1:
        raise Undecided


def _where(condition: Any, a: Any, b: Any) -> Any:
    return a if _truth(condition) else b


def _truth(item: Any) -> bool:
    if isinstance(item, Expr):
        return not _sign(item, 0)[1]
    return bool(item)


def _integer(item: Any) -> Any:
    return int(item) if isinstance(item, (bool, int, np.generic)) else item


def _magnitude(a: Dim) -> Dim:
    return dims.maximum(a, -a)


_ELEMENT: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "abs": _magnitude,
    "div": _quotient,
    "mod": _remainder,
    "maximum": dims.maximum,
    "minimum": dims.minimum,
    "equal": lambda a, b: _sign(a, b)[1],
    "less": lambda a, b: not _less_equal(b, a),
    "less_equal": _less_equal,
    "greater": lambda a, b: not _less_equal(a, b),
    "greater_equal": lambda a, b: _less_equal(b, a),
    "logical_and": lambda a, b: a and b,
    "logical_or": lambda a, b: a or b,
    "logical_not": lambda a: not a,
    "where": _where,
}

_REDUCTION: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_sum": lambda a, b: a + b,
    "reduce_prod": lambda a, b: a * b,
    "reduce_max": dims.maximum,
    "reduce_min": dims.minimum,
}

_CAST: dict[DType, Callable[[Any], Any]] = {DType.BOOL: _truth}

_STRUCTURAL = {"reshape", "transpose", "broadcast_to", "concat", "slice", "gather"}
