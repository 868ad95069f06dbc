"""Planar token panels as kernels see them: `[panel][channel][64]`, fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen.isa.vector import keep
from sparsec.ir.dims import Dim, evaluate, floordiv, maximum, minimum
from sparsec.ir.layouts import PANEL_WIDTH, Panels
from sparsec.ir.types import DType, TensorType

WIDTH = PANEL_WIDTH
GROUP = 16  # kernels process panels in groups of this many lanes, whatever the vector length


# Multiply-accumulates worth a worker of its own: about 3 us on one core. To start a worker that
# spins, and to fetch what another has written, takes about 1 us.
LEAST_MACS = {"int8": 1 << 19, "fp32": 1 << 17}


def grain_of(macs: int, tokens: Dim, least: int) -> Dim:
    """How many items are worth a worker, each of `macs` for every token of its panel."""
    in_panel = maximum(1, minimum(tokens, WIDTH))
    return maximum(1, floordiv(least, in_panel * max(1, macs)))


def grain_at(macs: int, tokens: int, least: int) -> int:
    """`grain_of` for a number of tokens."""
    return int(evaluate(grain_of(macs, tokens, least), {}))


@contextmanager
def item_rectangles(s: Any, blocks: Any, group: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Loops over the items of `s`, which are blocks of rows of panels, the rows of a panel first.

    The body sees rectangles of items: the first and last block of rows, the first and last panel.
    Whole panels come in groups of at most `group`. A worker so has neighbouring tokens, whose
    values are in its caches when it made them, and all their rows but at the ends of its range.
    """
    first_panel, last_panel = keep(div(s.begin, blocks)), keep(div(s.end, blocks))
    skipped = keep(s.begin - first_panel * blocks)
    over = keep(s.end - last_panel * blocks)
    head = T.cast(skipped > 0, "int64")
    whole = keep(first_panel + head)
    groups = keep(div(T.max(last_panel - whole, const(0)) + group - 1, group))
    alone = T.And(skipped > 0, first_panel == last_panel)  # all in one panel: no tail
    tail = keep(T.Select(alone, const(0), T.cast(over > 0, "int64")))
    with loop(0, head + groups + tail) as part:
        in_head, in_tail = part < head, part >= head + groups
        origin = keep(whole + (part - head) * group)
        panel = keep(T.Select(in_head, first_panel, T.Select(in_tail, last_panel, origin)))
        many = T.min(origin + group, last_panel)
        stop = keep(T.Select(T.Or(in_head, in_tail), panel + 1, many))
        first = keep(T.Select(in_head, skipped, const(0)))
        ends_here = T.Or(in_tail, T.And(in_head, first_panel == last_panel))
        last = keep(T.Select(ends_here, over, blocks))
        yield first, last, panel, stop


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
