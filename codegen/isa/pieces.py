"""Activations of results that are stored as u8, by straight pieces over int16: 32 at a time.

    f(x) = max(x, 0) - g(|x|),  g(a) = a - f(a)

g is a low bump where f(x) - f(-x) = x. x is counted in *units*, 2**-bits of a step of the result,
so that what int16 clips is no u8 either. |x| chooses one of 32 straight pieces, whose slope and
offset are looked up in registers. MAX_ERROR is added to the half step of the result's rounding:
seldom enough to make another u8 of it, and never more than the next one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen.isa.vector import keep, ramp
from sparsec.ir.op_spec import Array
from sparsec.ir.ops_elementwise import ACTIVATIONS

LANES = 32
PIECES = LANES  # the last one is 0
ROWS = ("slope", "offset", "index", "round")  # of a table; the last two are the same in all lanes
PIECEWISE = ("gelu", "gelu_tanh", "silu")
MAX_ERROR = 1 / 8  # of a step, before it is rounded to a whole one
_BITS = (7, 6, 5)  # the more, the nearer; but |x| has to reach the end of the bump in int16
_ONE = 1 << 15  # of a slope, and of |x|: int16
_LEAST_BUMP = 1 / 64  # of a step: taken for 0
_TYPE = f"int16x{LANES}"


def may_take_pieces(activation: str, lanes: int) -> bool:
    """Whether it may be in pieces over `lanes` floats; its table may still not be near enough."""
    return activation in PIECEWISE and 2 * lanes == LANES


@lru_cache(maxsize=64)  # asked for by the kernel's name, its table and its scale
def piece_table(activation: str, scale: float) -> Array | None:
    """int16 `[ROWS, LANES]` for results of this scale; None where it would err by more."""
    for bits in _BITS if activation in PIECEWISE else ():
        bump = _bump(activation, scale / 2**bits)
        reach = int(np.flatnonzero(bump > _LEAST_BUMP * 2**bits).max(initial=0)) + 1
        if reach < _ONE:
            table = _fitted(bump, reach, bits)
            size = np.arange(_ONE)
            worst = np.abs(_units(-size, table) + bump).max()
            table.flags.writeable = False  # callers share it
            return table if worst <= MAX_ERROR * 2**bits else None
    return None


def units_per_step(table: Array) -> int:
    """2**bits of the table."""
    return _ONE // int(table[ROWS.index("round"), 0])


def units(table: Array, scale: float) -> np.float32:
    """How many units 1 is, where a step is `scale`."""
    return np.float32(1) / np.float32(scale) * np.float32(units_per_step(table))


def _bump(activation: str, unit: float) -> Array:
    """g of 0 to _ONE units, in units."""
    size = np.arange(_ONE) * unit
    with np.errstate(over="ignore"):  # e**x of silu: its reciprocal is 0
        return np.asarray(-ACTIVATIONS[activation](-size) / unit)


def _fitted(bump: Array, reach: int, bits: int) -> Array:
    table = np.zeros((len(ROWS), LANES), np.int16)
    # As unsigned: the kernel multiplies so.
    factor = min((PIECES - 1) * 2 * _ONE // reach, 2 * _ONE - 1)
    table[2] = np.uint16(factor).astype(np.int16)
    table[3] = _ONE >> bits
    pieces = _piece_of(np.arange(_ONE), factor)
    for piece in range(PIECES - 1):
        (inside,) = np.nonzero(pieces == piece)
        if inside.size > 1:
            low, high = inside[[0, -1]]
            table[0, piece] = np.rint((bump[low] - bump[high]) / (high - low) * _ONE)
        if inside.size:
            rest = -bump[inside] - _times(inside, table[0, piece])
            table[1, piece] = np.rint(rest.mean())  # not the least error, but one without a bias
    return table


def _piece_of(size: Array, factor: int) -> Array:
    return np.asarray(np.minimum((size.astype(np.int64) * factor) >> 16, PIECES - 1))


def _times(size: Array, slope: Array) -> Array:
    """`vpmulhrsw`: the product by 2**-15, halves rounded up."""
    return np.asarray((size.astype(np.int64) * slope.astype(np.int64) + _ONE // 2) >> 15)


def evaluate(units: Array, table: Array) -> Array:
    """What `emit` computes: steps of int16 `units`, int64."""
    return _times(_units(units.astype(np.int64), table), table[3][:1])


def _units(units: Array, table: Array) -> Array:
    size = np.abs(units)
    piece = _piece_of(size, int(table[2, 0].astype(np.uint16)))
    # -_ONE has no opposite in int16: as a factor it stays negative, but its piece has slope 0.
    bump = _times(size, table[0][piece]) + table[1][piece]
    return np.asarray(np.maximum(units, 0) + bump)


def emit(buffer: Any, units: Any) -> Any:
    """Steps of an int16x32 vector of units; `buffer` is the table, row by row."""
    slopes, offsets, index, rounding = (
        keep(buffer[ramp(row * LANES, LANES)]) for row in range(len(ROWS))
    )
    zero = T.broadcast(tirx.const(0, "int16"), LANES)
    last = T.broadcast(tirx.const(PIECES - 1, "int16"), LANES)
    size = keep(_call("llvm.abs.v32i16", units, tirx.const(0, "bool")))
    place = keep(_call("llvm.x86.avx512.pmulhu.w.512", size, index))
    piece = keep(_call("llvm.umin.v32i16", place, last))
    slope = keep(_call("llvm.x86.avx512.permvar.hi.512", slopes, piece))
    offset = keep(_call("llvm.x86.avx512.permvar.hi.512", offsets, piece))
    bump = keep(_call("llvm.x86.avx512.pmul.hr.sw.512", size, slope))
    y = keep(keep(_call("llvm.smax.v32i16", units, zero)) + bump + offset)
    return keep(_call("llvm.x86.avx512.pmul.hr.sw.512", y, rounding))


def _call(name: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(_TYPE, name, *args)
