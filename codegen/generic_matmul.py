"""Matrix product in row-major memory: blocks of rows x columns whose sums stay in registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.generic_base import (
    Application,
    Plan,
    convert,
    flat,
    int64,
    storage,
    tvm_bits,
    unflat,
    wide,
)
from sparsec.codegen.generic_elementwise import broadcast_runs
from sparsec.codegen.generic_loops import loop_plan
from sparsec.ir.dims import Dim, ceildiv, product

ROWS = 4  # that share one read of b
VECTORS = 2  # side by side: with ROWS, 8 sums, enough to hide the latency of the multiply-add


@dataclass(frozen=True, slots=True)
class _Product:
    """y[batch, rows, cols] = a[batch of a, rows, depth] * b[batch of b, depth, cols]."""

    batch: tuple[tuple[Dim, tuple[bool, ...]], ...]  # size, and whether a and b have the axis
    rows: Dim
    depth: Dim
    cols: Dim


def _sizes(app: Application) -> _Product:
    a, b = (t.shape for t in app.operands)
    a = a if len(a) > 1 else (1, *a)
    b = b if len(b) > 1 else (*b, 1)
    rank = max(len(a), len(b)) - 2
    batches = [(1,) * (rank + 2 - len(s)) + s[:-2] for s in (a, b)]
    shape = tuple(y if x == 1 else x for x, y in zip(*batches, strict=True))
    runs = broadcast_runs(shape, batches)
    batch = tuple((product(shape[i] for i in axes), full) for axes, full in runs)
    rows, depth, cols = a[-2], a[-1], b[-1]
    if len(batch) == 1 and batch[0][1] == (True, False):
        return _Product((), batch[0][0] * rows, depth, cols)
    return _Product(batch, rows, depth, cols)


def _matmul(app: Application) -> Plan:
    """An item is a block of rows; past the last row it repeats that row."""
    sizes = _sizes(app)
    blocks = ceildiv(sizes.rows, ROWS)

    def body(app: Application, k: tir.KernelScope) -> None:
        rows, depth, cols = (app.size(d) for d in (sizes.rows, sizes.depth, sizes.cols))
        count = app.size(blocks)
        with T.serial(k.begin, k.end) as item:
            batch, block = tirx.floordiv(item, count), tirx.floormod(item, count)
            at_a, at_b = (_batch_offset(app, sizes, batch, n) for n in (0, 1))
            row = [tirx.min(block * ROWS + int64(r), rows - int64(1)) for r in range(ROWS)]
            tile = _Tile(
                k,
                wide(app.result.dtype),
                storage(app.result.dtype),
                a=_in_memory([(at_a * rows + r) * depth for r in row]),
                b=_in_memory([at_b * depth * cols])[0],
                y=_in_memory([(batch * rows + r) * cols for r in row]),
                depth=depth,
                cols=cols,
            )
            _columns(tile, 8 * app.vector_bytes // tvm_bits(tile.dtype))

    batches = product(d for d, _ in sizes.batch)
    return loop_plan(app, batches * blocks, (ROWS, sizes.depth, sizes.cols), body)


def _in_memory(values: list[Any]) -> list[Any]:
    """`values`, computed once: TVM copies the expression of an integer into all of its uses."""
    held = tir.registers("int64", len(values))
    for place, value in enumerate(values):
        T.buffer_store(held, value, [place])
    return [held[place] for place in range(len(values))]


def _columns(tile: _Tile, lanes: int) -> None:
    """Blocks of two vectors, then of one, then single columns."""
    (done,) = _in_memory([int64(0)])
    for vectors, width in ((VECTORS, lanes), (1, lanes), (1, 1)):
        step = vectors * width
        (blocks,) = _in_memory([tirx.floordiv(tile.cols - done, int64(step))])
        with T.serial(int64(0), blocks) as j:
            (col,) = _in_memory([done + j * step])
            tile.emit(col, vectors, width)
        (done,) = _in_memory([done + blocks * step])


def _batch_offset(app: Application, sizes: _Product, batch: Any, operand: int) -> Any:
    """Which matrix of `operand` belongs to matrix `batch` of the result."""
    dims = [app.size(d) for d, _ in sizes.batch]
    index = unflat(batch, dims)
    own = [n for n, (_, full) in enumerate(sizes.batch) if full[operand]]
    return flat([index[n] for n in own], [dims[n] for n in own])


@dataclass(frozen=True, slots=True)
class _Tile:
    """ROWS x some columns of the result; `a`, `b` and `y` are offsets of its rows."""

    k: tir.KernelScope
    dtype: str
    memory: str
    a: Sequence[Any]
    b: Any
    y: Sequence[Any]
    depth: Any
    cols: Any

    def emit(self, col: Any, vectors: int, width: int) -> None:
        sums = tir.registers(self.dtype, ROWS * vectors * width)
        places = [
            (r, v, _span((r * vectors + v) * width, width))
            for r in range(ROWS)
            for v in range(vectors)
        ]
        for _, _, at in places:
            T.buffer_store(sums, self._spread(tirx.const(0, self.dtype), width), [at])
        with T.serial(int64(0), self.depth) as d:
            right = [
                self._load("x1", self.b + d * self.cols + col + v * width, width)
                for v in range(vectors)
            ]
            for r, v, at in places:
                left = self._spread(self._load("x0", self.a[r] + d, 1), width)
                T.buffer_store(sums, sums[at] + left * right[v], [at])
        for r, v, at in places:
            to = _span(self.y[r] + col + v * width, width)
            T.buffer_store(self.k["y"], convert(sums[at], _lanes(self.memory, width)), [to])

    def _load(self, name: str, offset: Any, width: int) -> Any:
        return convert(self.k[name][_span(offset, width)], _lanes(self.dtype, width))

    def _spread(self, value: Any, width: int) -> Any:
        return value if width == 1 else T.broadcast(value, width)


def _lanes(dtype: str, width: int) -> str:
    return dtype if width == 1 else f"{dtype}x{width}"


def _span(offset: Any, width: int) -> Any:
    return offset if width == 1 else T.ramp(offset, 1, width)


MATMUL: dict[str, Callable[[Application], Plan]] = {"matmul": _matmul}
