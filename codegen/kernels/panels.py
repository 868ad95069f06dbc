"""Planar token panels as kernels see them: `[panel][channel][64]`, fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen.isa.vector import keep
from sparsec.ir.layouts import PANEL_WIDTH, Panels
from sparsec.ir.types import DType, TensorType

WIDTH = PANEL_WIDTH
GROUP = 16  # kernels process panels in groups of this many lanes, whatever the vector length


def is_planar(type: TensorType) -> bool:
    """Whether a value lies in the panels that these kernels read."""
    return type.layout == Panels() and type.dtype is DType.F32


def groups_in_panel(tokens: Any, panel: Any) -> Any:
    """How many groups of a panel hold tokens."""
    left = keep(tokens - panel * WIDTH)
    return keep(div(T.min(left, T.int64(WIDTH)) + (GROUP - 1), GROUP))


@contextmanager
def loop(begin: Any, end: Any) -> Iterator[Any]:
    """A run-time loop; nothing when `end <= begin`.

    The TIR loop counts from 0: TVM mishandles a loop whose first index is not 0 when it is inside
    another such loop and its bounds depend on that one's index.
    """
    first = const(begin) if isinstance(begin, int) else begin
    last = const(end) if isinstance(end, int) else end
    if isinstance(begin, int) and begin == 0:
        with T.serial(const(0), last) as index:
            yield index
        return
    with T.serial(const(0), last - first) as index:
        yield keep(first + index)


def div(a: Any, b: Any) -> Any:
    """The quotient of two sizes, neither of them negative: one division, no case for signs."""
    return T.truncdiv(a, const(b) if isinstance(b, int) else b)


def mod(a: Any, b: Any) -> Any:
    """The remainder of two sizes, neither of them negative."""
    return T.truncmod(a, const(b) if isinstance(b, int) else b)


def const(value: int) -> Any:
    """An int64 constant: all index arithmetic is 64-bit."""
    return T.int64(value)
