"""Register blocks of `linear_int8` for vector instructions: weights broadcast, sums in registers.

A step is one quad. A narrow panel takes two strips of a tall block to a register block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.int8 import TILES
from sparsec.codegen.isa.vector import keep, prefetch, ramp, splat
from sparsec.codegen.kernels.int8_gemm import Int8Gemm, Place
from sparsec.codegen.kernels.int8_pack import QUAD
from sparsec.codegen.kernels.panels import WIDTH, const, div, loop

WORDS_AHEAD = 256  # fetched while others are multiplied: 1 KB, past the end too
CHAINS = 8  # sums in flight that hide the latency of a multiply-add
Read = Callable[[Any], list[Any]]
Sums = list[list[Any]]  # registers, by set and row


@dataclass(frozen=True, slots=True)
class DotGemm(Int8Gemm):
    """A strip has as many rows as their sums fit into vector registers."""

    @property
    def _holds_all(self) -> bool:
        """Whether the register block has the sums of all tiles: the epilogue can start there."""
        return self.hooks.columns == self.hooks.tiles

    @property
    def _gathers(self) -> bool:
        """Whether the register block holds all tiles, so that it can unpack channels itself."""
        return self.form == "channels" and self._holds_all

    @property
    def _together(self) -> int:
        """Strips of a tall block in one register block: fewer tiles leave room for two."""
        return 2 if self.tall and self.hooks.tiles < TILES else 1

    @property
    def _adds_once(self) -> bool:
        """Whether rows that a last turn does again must not be stored again."""
        return self._together > 1 and self.epilogue.in_place

    @property
    def _rows_together(self) -> int:
        return self._together * self.strip

    @property
    def _area(self) -> int:
        """Where the quads lie in scratch memory, in int32: after sums that have to go there."""
        return 0 if self._holds_all else self.strip * WIDTH

    def scratch_bytes(self, k: int, group: int, most_steps: int) -> int:
        """For `group` panels of k channels, or for the steps of a block of rows."""
        if self.form == "channels":
            return 4 * (self._area + most_steps * self.hooks.chunk)
        return 4 * (self._area + group * -(-k // QUAD) * WIDTH)

    def _block(self, s: tir.KernelScope, at: Place) -> None:
        """All strips of a block of rows for one chunk."""
        if self.is_sparse:
            first = keep(T.cast(s["starts"][at.block], "int64"))
            steps = keep(T.cast(s["starts"][at.block + 1], "int64") - first)
        else:
            steps = keep(self._quads(s))
            first = keep(at.block * steps)
        weights = keep(first * at.strips)
        if self.form == "channels" and not self._gathers:
            with loop(0, steps) as step:
                tiles = self.hooks.interleave(self._gathered(s, at, first + step))
                self._store_tiles(s, tiles, step * self.hooks.chunk + self._area)
        together = self._together
        with loop(0, div(at.strips + (together - 1), together)) as turn:
            # The last turn may do a strip again: the same values, and no case for odd numbers.
            strip = keep(T.min(turn * together, at.strips - together))
            row0 = keep(at.block * at.rows + strip * self.strip)
            again = (turn * together - strip) * self.strip
            done = keep(again) if self._adds_once else 0
            with T.If(row0 < s["m"]), T.Then():
                words = keep(weights + strip * steps)
                self._strip(s, at, _Strip(strip, row0, first, steps, words, done))

    def _strip(self, s: tir.KernelScope, at: Place, strip: _Strip) -> None:
        if self._holds_all:
            sums = self._started(s, strip)
            self._all_steps(s, at, strip, sums)
            self._rows_of(s, at, strip, sums)
            return
        with loop(0, self.hooks.tiles // self.hooks.columns) as part:
            tile = keep(part * self.hooks.columns)
            sums = self._started(s, strip)
            self._steps(s, strip, self._from_scratch(s, at, strip, tile), sums)
            self._to_scratch(s, sums, tile)
        self._rows(s, at, strip.row0, self._rows_together, strip.done)

    def _all_steps(self, s: tir.KernelScope, at: Place, strip: _Strip, sums: Sums) -> None:
        """The steps of a register block that holds all tiles."""
        if self._gathers and self.tall:
            with T.If(strip.index == 0):
                with T.Then():
                    self._steps(s, strip, self._unpacked(s, at, strip, store=True), sums)
                with T.Else():
                    self._steps(s, strip, self._from_scratch(s, at, strip, const(0)), sums)
        elif self._gathers:
            self._steps(s, strip, self._unpacked(s, at, strip, store=False), sums)
        else:
            self._steps(s, strip, self._from_scratch(s, at, strip, const(0)), sums)

    def _unpacked(self, s: tir.KernelScope, at: Place, strip: _Strip, *, store: bool) -> Read:
        """Tiles unpacked from channels of the panel, and kept for the next strips."""

        def read(step: Any) -> list[Any]:
            tiles = self.hooks.interleave(self._gathered(s, at, strip.first + step))
            if store:
                self._store_tiles(s, tiles, step * self.hooks.chunk + self._area)
            return tiles

        return read

    def _from_scratch(self, s: tir.KernelScope, at: Place, strip: _Strip, tile: Any) -> Read:
        """The tiles of one register block, from `tile` on."""
        n, size = self.hooks.lanes, self.hooks.chunk
        origin = tile * n + self._area
        if self.form != "channels":
            origin = origin + at.quads * self._quads(s) * size
        base = keep(origin)

        def read(step: Any) -> list[Any]:
            quad = step
            if self.form == "quads":
                quad = T.cast(s["indices"][strip.first + step], "int64")
            start = base + quad * size
            return [keep(s.scratch[ramp(start + i * n, n)]) for i in range(self.hooks.columns)]

        return read

    def _started(self, s: tir.KernelScope, strip: _Strip) -> Sums:
        """Sums before the first step. There are two sets where one alone waits for itself."""
        n, columns = self.hooks.lanes, self.hooks.columns
        rows = self._rows_together
        # With its own unpacks a step is not shorter than the latency of a multiply-add.
        sets = 1 if rows * columns >= CHAINS or self._gathers else 2
        sums = [[tir.registers("int32", columns * n) for _ in range(rows)] for _ in range(sets)]
        for index, group in enumerate(sums):
            for r, total in enumerate(group):
                start = s["offset"][strip.row0 + r] if index == 0 else T.int32(0)
                for lanes in self._column_lanes():
                    T.buffer_store(total, splat(start, n), [lanes])
        return sums

    def _steps(self, s: tir.KernelScope, strip: _Strip, read: Read, sums: Sums) -> None:
        sets = len(sums)
        with loop(0, div(strip.steps, sets)) as round:
            for index, group in enumerate(sums):
                self._step(s, strip, round * sets + index, read, group)
        if sets > 1:
            with T.If(strip.steps % sets != 0), T.Then():
                self._step(s, strip, strip.steps - 1, read, sums[0])

    def _column_lanes(self) -> list[Any]:
        """Where the columns of a row lie in its registers."""
        return [ramp(i * self.hooks.lanes, self.hooks.lanes) for i in range(self.hooks.columns)]

    def _row_sums(self, sums: Sums, r: int) -> list[Any]:
        """Of all sets together."""
        return [keep(reduce(add, (group[r][at] for group in sums))) for at in self._column_lanes()]

    def _rows_of(self, s: tir.KernelScope, at: Place, strip: _Strip, sums: Sums) -> None:
        """The epilogue of a register block without a loop: sums stay in their registers."""
        convert = self._converter(s, at)
        for r in range(self._rows_together):
            row = keep(strip.row0 + r)
            wanted = row < s["m"]
            with T.If(T.And(wanted, strip.done <= r) if self._adds_once else wanted), T.Then():
                self._row(s, at, row, convert(self._row_sums(sums, r)))

    def _to_scratch(self, s: tir.KernelScope, sums: Sums, tile: Any) -> None:
        """The sums of some of the tiles, from `tile` on."""
        n = self.hooks.lanes
        for r in range(self._rows_together):
            for i, total in enumerate(self._row_sums(sums, r)):
                place = (tile + i) * n + r * self.hooks.chunk
                T.buffer_store(s.scratch, total, [ramp(place, n)])

    def _step(
        self, s: tir.KernelScope, strip: _Strip, step: Any, read: Read, sums: list[Any]
    ) -> None:
        n, per_quad = self.hooks.lanes, self.hooks.words_per_quad
        operands = [self.hooks.operand(x) for x in read(step)]
        starts = [
            keep((strip.words + (i * strip.steps + step)) * (self.strip * per_quad))
            for i in range(self._together)
        ]
        for start in starts:
            prefetch(s["words"], start + WORDS_AHEAD)
        for r, total in enumerate(sums):
            start = starts[r // self.strip] + r % self.strip * per_quad
            words = tuple(keep(splat(s["words"][start + i], n)) for i in range(per_quad))
            for i, operand in enumerate(operands):
                lanes = ramp(i * n, n)
                T.buffer_store(total, self.hooks.dot(total[lanes], operand, words), [lanes])


@dataclass(frozen=True, slots=True)
class _Strip:
    """A strip of a block: its first row, its `steps` from `first` on, its first group of words.

    `words` counts the words of one step of one strip. The residual of its first `done` rows is
    added already, in place.
    """

    index: Any
    row0: Any
    first: Any
    steps: Any
    words: Any
    done: Any
