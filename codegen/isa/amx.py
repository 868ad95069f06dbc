"""AMX: eight registers that are tiles of up to 16 rows of 64 bytes, and products of tiles.

    sum[r][c] += sum over q, i of a[r][4 q + i] * b[q][4 c + i]        i = 0..3, all bytes

`sum` is int32 `[rows][columns]`; `a` has rows of up to 16 quads; `b` has a row of `columns` quads
for each of them: a row of b is a vector of quads as the other int8 kernels have them.

A kernel loads the shapes of its tiles (`configure`) at its entry, from 64 bytes of constants in
memory: bytes written right before would have to be ordered against the load. Loading them clears
all tiles. By the System V ABI tiles and shapes are the called function's to change. It ends with
`release`: tiles in use make every switch of threads save 8 KB.

Numbers of tiles are constants, 0 to 7. Compilers do not allocate tiles and do not move their
instructions past other memory accesses.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.ir.op_spec import Array

TILE_REGISTERS = 8
ROWS = 16
ROW_BYTES = 64
CONFIG_BYTES = 64
FULL = (ROWS, ROW_BYTES)
SUMS = 4  # tiles of sums of a register block: the first registers
# Every CPU with tiles has VBMI, which kernels with tiles may therefore use.
AMX_FEATURES = ("+avx512vbmi", "+amx-tile", "+amx-int8", "+amx-bf16")

_PALETTE = 1
_ROW_BYTES_AT, _ROWS_AT = 16, 48  # in the configuration: uint16 per tile, uint8 per tile


class Product(enum.Enum):
    """Element types of `a` and `b`; the value names the instruction.

    Bytes are summed in int32, which wraps around. Pairs of bf16 take the place of quads: even and
    odd products are summed apart in fp32, denormals as zeros, then added to `sum`.
    """

    S8_S8 = "tdpbssd"
    S8_U8 = "tdpbsud"
    U8_S8 = "tdpbusd"
    U8_U8 = "tdpbuud"
    BF16 = "tdpbf16ps"


def configuration(shapes: Sequence[tuple[int, int]]) -> Array:
    """The 64 bytes that `configure` loads: rows and bytes per row of tiles 0, 1, and so on.

    In `sum += a b` the rows of sum and a agree, and the bytes per row of sum and b; b has a row
    for every four bytes of a row of a.
    """
    assert len(shapes) <= TILE_REGISTERS, shapes
    config = np.zeros(CONFIG_BYTES, np.uint8)
    config[0] = _PALETTE
    for tile, (rows, row_bytes) in enumerate(shapes):
        assert 1 <= rows <= ROWS, shapes
        assert 4 <= row_bytes <= ROW_BYTES, shapes
        assert row_bytes % 4 == 0, shapes
        config[_ROW_BYTES_AT + 2 * tile] = row_bytes
        config[_ROWS_AT + tile] = rows
    return config


ALL_FULL = configuration([FULL] * TILE_REGISTERS)  # what `configure` loads for most kernels


def configure(config: Any) -> None:
    """Give the tiles the shapes at the start of a buffer of `CONFIG_BYTES`, and clear them."""
    _emit("ldtilecfg", T.address_of(config[T.int64(0)]))


def release() -> None:
    """Tiles and shapes are no longer in use."""
    _emit("tilerelease")


def zero(tile: int) -> None:
    _emit("tilezero", _tile(tile))


def load(tile: int, buffer: Any, index: Any, stride_bytes: int | Any = ROW_BYTES) -> None:
    """Rows of the tile from element `index` of a buffer on, each `stride_bytes` after the last."""
    _emit("tileloadd64", _tile(tile), T.address_of(buffer[index]), _stride(stride_bytes))


def store(tile: int, buffer: Any, index: Any, stride_bytes: int | Any = ROW_BYTES) -> None:
    """The opposite of `load`."""
    _emit("tilestored64", _tile(tile), T.address_of(buffer[index]), _stride(stride_bytes))


def multiply(total: int, a: int, b: int, product: Product = Product.S8_U8) -> None:
    """Tile `total` += tile `a` times tile `b`. A step takes as many cycles as `a` has rows, but
    not under 8 (measured on a Sapphire Rapids guest)."""
    assert len({total, a, b}) == 3, "tiles of a product are three"
    _emit(product.value, _tile(total), _tile(a), _tile(b))


def multiply_block(
    rows: int,
    columns: int,
    load_a: Callable[[int, int], None],
    load_b: Callable[[int, int], None],
    product: Product = Product.S8_U8,
) -> None:
    """Tiles `row * columns + column` += tile `row` of a times tile `column` of b.

    `rows * columns` is at most SUMS. `load_a(register, row)` and `load_b(register, column)` load
    each tile once, into the registers behind the sums, which take turns.
    """
    assert rows * columns <= SUMS, (rows, columns)
    free = TILE_REGISTERS - SUMS - min(columns, 2 if rows > 1 else 3)
    of_a = range(SUMS, SUMS + min(rows, free))
    of_b = range(of_a.stop, TILE_REGISTERS)
    for row in range(rows):
        a = of_a[row % len(of_a)]
        load_a(a, row)
        for column in range(columns):
            b = of_b[column % len(of_b)]
            if row == 0:
                load_b(b, column)
            multiply(row * columns + column, a, b, product)


def _emit(name: str, *args: Any) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))


def _tile(number: int) -> Any:
    assert 0 <= number < TILE_REGISTERS, number
    return tirx.const(number, "int8")


def _stride(value: int | Any) -> Any:
    return T.int64(value) if isinstance(value, int) else value
