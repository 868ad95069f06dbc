"""Register blocks of `linear_int8` for AMX: tiles of 16 rows of weights by 16 quads of 16 tokens.

A step is 16 quads, the depth of a tile. A register block has four tiles of sums:

    strip of 8 or 16 rows   one tile of weights by the four tiles of a chunk
    strip of 32 rows        two by two: a pass for tiles 0 and 1 of a chunk, one for 2 and 3

Products read their quads as tiles, rows of 64 bytes at a constant distance. A dense weight takes
them from the copy of the panel. Those of a sparse weight are fetched: unpacked from channels or
copied from the copy of the panel into the rows of tiles in L1. A pass fetches only what it
multiplies: two tiles need half of the unpacks, so that in a strip of 32 rows the 64 unpacks of a
step's pass run beside products of 64 cycles. A tall block fetches in its first strip and keeps all
steps.

Stores do not forward to the loads of tiles, which wait until those are in L1. So a step is fetched
before the one in front of it is multiplied, whose rows are in L1 by then. The rows of the two take
turns in memory, 64 bytes each: a load also waits for an earlier store whose address has the same
lower 12 bits.

A last step of fewer quads multiplies old bytes as well, by weights of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import amx
from sparsec.codegen.isa.amx import ROW_BYTES, ROWS, SUMS
from sparsec.codegen.isa.int8 import TILES
from sparsec.codegen.isa.vector import keep, prefetch, ramp, splat
from sparsec.codegen.kernels.int8_gemm import Int8Gemm, Place
from sparsec.codegen.kernels.int8_pack import FETCH, QUAD, TILE_QUADS
from sparsec.codegen.kernels.panels import WIDTH, const, div, loop

LANES = 16
TILE = TILE_QUADS * LANES  # elements
STEP = TILES * TILE
FETCHES = TILE_QUADS // FETCH  # of a whole step
TURNS = 2  # steps whose rows lie side by side


@dataclass(frozen=True, slots=True)
class TileGemm(Int8Gemm):
    """A strip has 8, 16 or 32 rows; blocks of more rows have strips of 32."""

    @property
    def has_tiles(self) -> bool:
        return True

    @property
    def _tile_rows(self) -> int:
        """Tiles of weights in a register block."""
        return max(1, self.strip // ROWS)

    @property
    def _columns(self) -> int:
        """Tiles of a chunk in a register block."""
        return min(self.hooks.tiles, SUMS // self._tile_rows)

    @property
    def _start(self) -> int:
        """Where a register block's tiles of offsets lie in scratch memory: after its sums."""
        return self.strip * WIDTH

    @property
    def _area(self) -> int:
        return self.strip * (WIDTH + LANES)

    def scratch_bytes(self, k: int, group: int, most_steps: int) -> int:
        copy = 0 if self.form == "channels" else group * -(-k // QUAD) * WIDTH
        steps = -(-max(1, most_steps) // TURNS) * TURNS if self.tall else TURNS
        # A dense weight's last step may reach past the copy.
        return 4 * (self._area + copy + (steps if self.is_sparse else 1) * STEP)

    def _body(self, s: tir.KernelScope) -> None:
        amx.configure(s["tiles"])
        Int8Gemm._body(self, s)
        amx.release()

    def _block(self, s: tir.KernelScope, at: Place) -> None:
        block = self._steps(s, at)
        with loop(0, at.strips) as strip:
            row0 = keep(at.block * at.rows + strip * self.strip)
            with T.If(row0 < s["m"]), T.Then():
                words = keep((block.first * at.strips + strip * block.steps) * self._step_words)
                for r in range(self.strip):
                    offset = splat(s["offset"][row0 + r], LANES)
                    T.buffer_store(
                        s.scratch, offset, [ramp(const(self._start + r * LANES), LANES)]
                    )
                for tile in range(0, self.hooks.tiles, self._columns):
                    self._pass(s, at, block, _Pass(tile, strip, words))
                self._rows(s, at, row0, self.strip)

    def _steps(self, s: tir.KernelScope, at: Place) -> _Block:
        quads = keep(self._quads(s))
        copy = keep(at.quads * quads * self.hooks.chunk + self._area)
        if not self.is_sparse:
            steps = keep(div(quads + (TILE_QUADS - 1), TILE_QUADS))
            return _Block(keep(at.block * steps), steps, const(0), copy, copy)
        first, fetches = (keep(T.cast(s["starts"][2 * at.block + i], "int64")) for i in (0, 1))
        steps = keep(div(fetches + (FETCHES - 1), FETCHES))
        tiles = const(self._area)
        if self.form == "quads":
            tiles = keep(s["group"] * quads * WIDTH + self._area)
        return _Block(first, steps, fetches, copy, tiles)

    def _pass(self, s: tir.KernelScope, at: Place, block: _Block, part: _Pass) -> None:
        """All products of a strip and of `_columns` tiles, summed into scratch memory."""
        for register in range(self._tile_rows * self._columns):
            amx.load(register, s.scratch, const(self._offsets(register)))
        if self.is_sparse and self.tall:
            with T.If(part.strip == 0):
                with T.Then():
                    self._fetched(s, at, block, part)
                with T.Else(), loop(0, block.steps) as step:
                    self._multiply(s, at, block, part, step)
        elif self.is_sparse:
            self._fetched(s, at, block, part)
        else:
            with loop(0, block.steps) as step:
                self._multiply(s, at, block, part, step)
        for register in range(self._tile_rows * self._columns):
            row, column = divmod(register, self._columns)
            place = row * ROWS * self.hooks.chunk + (part.tile + column) * LANES
            amx.store(register, s.scratch, const(place), 4 * self.hooks.chunk)

    def _fetched(self, s: tir.KernelScope, at: Place, block: _Block, part: _Pass) -> None:
        """Steps whose quads are fetched before they are multiplied, each a step ahead."""
        with loop(0, block.steps + 1) as step:
            with T.If(step < block.steps), T.Then():
                fetches = keep(T.min(const(FETCHES), block.fetches - step * FETCHES))
                with loop(0, fetches) as fetch:
                    for quad in range(FETCH):
                        self._fetch(s, at, block, part, step, keep(fetch * FETCH + quad))
            with T.If(step > 0), T.Then():
                self._multiply(s, at, block, part, keep(step - 1))

    def _fetch(
        self, s: tir.KernelScope, at: Place, block: _Block, part: _Pass, step: Any, quad: Any
    ) -> None:
        """One row of each tile of the pass."""
        index = (block.first + step) * TILE_QUADS + quad
        columns = range(part.tile, part.tile + self._columns)
        if self.form == "channels":
            # LLVM drops the unpacks of the tiles that are not used.
            tiles = self.hooks.interleave(self._gathered(s, at, index))
            rows = [tiles[c] for c in columns]
        else:
            start = keep(T.cast(s["indices"][index], "int64") * self.hooks.chunk + block.copy)
            rows = [keep(s.scratch[ramp(start + c * LANES, LANES)]) for c in columns]
        place = self._step_place(block, step) + quad * (TURNS * LANES)
        for column, row in zip(columns, rows, strict=True):
            T.buffer_store(s.scratch, row, [ramp(place + column * (TURNS * TILE), LANES)])

    def _multiply(
        self, s: tir.KernelScope, at: Place, block: _Block, part: _Pass, step: Any
    ) -> None:
        words = keep(part.words + step * self._step_words)
        self._prefetch(s, at, block, part, words)
        amx.multiply_block(
            self._tile_rows,
            self._columns,
            lambda register, row: amx.load(register, s["words"], words + row * TILE),
            lambda register, column: self._load_quads(
                s, block, register, step, part.tile + column
            ),
        )

    def _load_quads(
        self, s: tir.KernelScope, block: _Block, register: int, step: Any, tile: int
    ) -> None:
        if self.is_sparse:
            place = self._step_place(block, step) + tile * (TURNS * TILE)
            amx.load(register, s.scratch, place, TURNS * ROW_BYTES)
            return
        chunk = self.hooks.chunk
        place = block.tiles + step * (TILE_QUADS * chunk) + tile * LANES
        amx.load(register, s.scratch, place, 4 * chunk)

    def _prefetch(
        self, s: tir.KernelScope, at: Place, block: _Block, part: _Pass, words: Any
    ) -> None:
        """The same step of the next block of rows, in the last pass of a step: far ahead."""
        if part.tile + self._columns == self.hooks.tiles:
            ahead = keep(words + at.strips * block.steps * self._step_words)
            for row in range(self.strip):
                prefetch(s["words"], ahead + row * LANES, level=2)

    def _step_place(self, block: _Block, step: Any) -> Any:
        """Where in scratch memory the tiles of a step are."""
        turn = keep(T.bitwise_and(step, const(TURNS - 1)))
        pair = (step - turn) * STEP if self.tall else 0
        return keep(block.tiles + pair + turn * LANES)

    def _offsets(self, register: int) -> int:
        return self._start + register // self._columns * ROWS * LANES

    @property
    def _step_words(self) -> int:
        return self.strip * TILE_QUADS


@dataclass(frozen=True, slots=True)
class _Block:
    """Steps of a block of rows from `first` on, and how many times FETCH quads that is.

    In scratch memory, `copy` is where the chunk's copy in quads starts, and `tiles` what the
    products read.
    """

    first: Any
    steps: Any
    fetches: Any
    copy: Any
    tiles: Any


@dataclass(frozen=True, slots=True)
class _Pass:
    """The tiles of a chunk from number `tile` on, for a strip whose weights start at `words`."""

    tile: int
    strip: Any
    words: Any
