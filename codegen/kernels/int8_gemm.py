"""`linear_int8`: y = activation(scale * (W x) + bias) + residual, u8 panels by int8 weights.

Weights are broadcast, four channels to a lane; tokens lie in the lanes, in tile order. There is
one loop nest with three ways to come by the tiles of a step of four channels:

    dense      all quads of channels in turn, from a copy of the panel in quads
    quads      the same copy, the quads that an index list names: blocks of R x 4
    channels   four channels of the planar panel that an index list names: blocks of R x 1

Loops, outermost first:

    group of panels     their quads, made once per worker, stay in L2 for all rows
    block of rows       its weights stay in L1 for all panels of the group
    panel, chunk of the panel
    strip: the rows of one register block; the strips of a block share its steps
    step

A last panel with few tokens takes the narrow form of the same loops (`Int8Isa.narrow`): fewer
tiles, and two strips of a tall block to a register block. It reads the same weights.

Weights are read from memory in order, once per group. Sums go through L1 to the epilogue, which
is a loop over rows: an instruction set whose sums are not in vector registers fits in there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.int8 import TILES, Int8Isa
from sparsec.codegen.isa.vector import keep, prefetch, ramp, splat
from sparsec.codegen.kernels.int8_epilogue import Epilogue
from sparsec.codegen.kernels.int8_pack import QUAD
from sparsec.codegen.kernels.panels import WIDTH, const, div, loop
from sparsec.codegen.program import Kind, Parameter

WORDS_AHEAD = 256  # fetched while others are multiplied: 1 KB, past the end too
CHAINS = 8  # sums in flight that hide the latency of a multiply-add
Read = Callable[[Any], list[Any]]


@dataclass(frozen=True, slots=True)
class Int8Gemm:
    """A register block of `strip` rows. A `tall` block of rows has several strips."""

    hooks: Int8Isa
    form: str
    strip: int
    tall: bool
    epilogue: Epilogue

    @property
    def name(self) -> str:
        rows = f"{self.strip}n" if self.tall else f"{self.strip}"
        return (
            f"linear_int8_{self.form}{rows}_{self.epilogue.result}{self.epilogue.suffix}"
            f"_{self.isa}"
        )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        starts, indices = Parameter("starts", dtype="int32"), Parameter("indices", dtype="uint16")
        sizes = ["tokens", "m", "k", "group", *(["strips"] if self.tall else [])]
        return (
            Parameter("x", dtype="uint8"),
            Parameter("words", dtype="int32"),
            *([starts, indices] if self.is_sparse else []),
            Parameter("offset", dtype="int32"),
            *self.epilogue.pointers,
            *(Parameter(n, Kind.INT) for n in sizes),
            *self.epilogue.numbers,
        )

    @property
    def has_scratch(self) -> bool:
        return True

    @property
    def isa(self) -> str:
        return self.hooks.name

    @property
    def is_sparse(self) -> bool:
        return self.form != "dense"

    @property
    def _gathers(self) -> bool:
        """Whether the register block holds all tiles, so that it can unpack channels itself."""
        return self.form == "channels" and self.hooks.columns == self.hooks.tiles

    @property
    def _together(self) -> int:
        """Strips of a tall block in one register block: half the tiles leave room for two."""
        return TILES // self.hooks.tiles if self.tall else 1

    @property
    def _rows_together(self) -> int:
        return self._together * self.strip

    @property
    def _area(self) -> int:
        """Where the quads lie in scratch memory, in int32: after the sums of a register block."""
        return self.strip * WIDTH

    def scratch_bytes(self, k: int, group: int, most_steps: int) -> int:
        """For `group` panels of k channels, or for the steps of a block of rows."""
        if self.form == "channels":
            return 4 * (self._area + most_steps * self.hooks.chunk)
        return 4 * (self._area + group * -(-k // QUAD) * WIDTH)

    def build(self) -> Any:
        return tir.kernel_function(self.name, self.parameters, self._body, scratch="int32")

    def _body(self, s: tir.KernelScope) -> None:
        group = s["group"]
        strips = s["strips"] if self.tall else const(1)
        rows = keep(strips * self.strip)
        panels = keep(div(s["tokens"] + (WIDTH - 1), WIDTH))
        blocks = keep(div(s["m"] + rows - 1, rows))
        with loop(div(s.begin, blocks), div(s.end + blocks - 1, blocks)) as g:
            first = keep(T.max(s.begin - g * blocks, const(0)))
            last = keep(T.min(s.end - g * blocks, blocks))
            origin = keep(g * group)
            end = keep(T.min(origin + group, panels))
            if self.form != "channels":
                with loop(origin, end) as panel:
                    for kernel, chunks in self._widths(s, panel):
                        kernel._make_quads(s, panel, panel - origin, chunks)
            with loop(first, last) as block, loop(origin, end) as panel:
                at = _Place(block, rows, strips, panel, keep(panel - origin))
                for kernel, chunks in self._widths(s, panel):
                    kernel._chunks(s, at, chunks)

    def _widths(self, s: tir.KernelScope, panel: Any) -> Iterator[tuple[Int8Gemm, Any]]:
        """Run-time cases: which kernel takes the tokens of a panel, in how many chunks."""
        tokens, size = keep(s["tokens"] - panel * WIDTH), self.hooks.chunk
        narrow = self.hooks.narrow
        if narrow is None:
            yield self, keep(div(T.min(tokens, const(WIDTH)) + (size - 1), size))
            return
        with T.If(tokens > narrow.chunk):
            with T.Then():
                yield self, const(WIDTH // size)
            with T.Else():
                yield replace(self, hooks=narrow), const(1)

    def _make_quads(self, s: tir.KernelScope, panel: Any, place: Any, chunks: Any) -> None:
        """The panel as `[chunk][quad][tile][lane]`; quads past k repeat its last channel."""
        size, quads = self.hooks.chunk, self._quads(s)
        first = keep(place * (WIDTH // size))
        with loop(0, chunks) as chunk, loop(0, quads) as quad:
            channels = [T.min(quad * QUAD + i, s["k"] - 1) for i in range(QUAD)]
            tiles = self.hooks.interleave(self._load(s, panel, chunk, channels))
            at = keep(((first + chunk) * quads + quad) * size + self._area)
            self._store_tiles(s, tiles, at)

    def _chunks(self, s: tir.KernelScope, at: _Place, chunks: Any) -> None:
        """A block of rows for one panel."""
        with loop(0, chunks) as chunk:
            quads = keep(at.quads * (WIDTH // self.hooks.chunk) + chunk)
            self._block(s, replace(at, chunk=chunk, quads=quads))

    def _block(self, s: tir.KernelScope, at: _Place) -> None:
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
            with T.If(row0 < s["m"]), T.Then():
                words = keep(weights + strip * steps)
                self._strip(s, at, _Strip(strip, row0, first, steps, words))

    def _strip(self, s: tir.KernelScope, at: _Place, strip: _Strip) -> None:
        if self._gathers and self.tall:
            with T.If(strip.index == 0):
                with T.Then():
                    self._register_block(s, strip, self._unpacked(s, at, strip, store=True))
                with T.Else():
                    self._register_block(s, strip, self._from_scratch(s, at, strip, const(0)))
        elif self._gathers:
            self._register_block(s, strip, self._unpacked(s, at, strip, store=False))
        else:
            with loop(0, self.hooks.tiles // self.hooks.columns) as part:
                tile = keep(part * self.hooks.columns)
                self._register_block(s, strip, self._from_scratch(s, at, strip, tile), tile)
        self._rows(s, at, strip)

    def _unpacked(self, s: tir.KernelScope, at: _Place, strip: _Strip, *, store: bool) -> Read:
        """Tiles unpacked from channels of the panel, and kept for the next strips."""

        def read(step: Any) -> list[Any]:
            tiles = self.hooks.interleave(self._gathered(s, at, strip.first + step))
            if store:
                self._store_tiles(s, tiles, step * self.hooks.chunk + self._area)
            return tiles

        return read

    def _from_scratch(self, s: tir.KernelScope, at: _Place, strip: _Strip, tile: Any) -> Read:
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

    def _register_block(
        self, s: tir.KernelScope, strip: _Strip, read: Read, tile: Any = None
    ) -> None:
        """Sums of the rows of a strip, left in scratch memory."""
        n, columns = self.hooks.lanes, self.hooks.columns
        rows = self._rows_together
        sets = 1 if rows * columns >= CHAINS else 2
        sums = [[tir.registers("int32", columns * n) for _ in range(rows)] for _ in range(sets)]
        tiles = [ramp(i * n, n) for i in range(columns)]
        for index, group in enumerate(sums):
            for r, total in enumerate(group):
                start = s["offset"][strip.row0 + r] if index == 0 else T.int32(0)
                for lanes in tiles:
                    T.buffer_store(total, splat(start, n), [lanes])
        with loop(0, div(strip.steps, sets)) as round:
            for index, group in enumerate(sums):
                self._step(s, strip, round * sets + index, read, group)
        if sets > 1:
            with T.If(strip.steps % sets != 0), T.Then():
                self._step(s, strip, strip.steps - 1, read, sums[0])
        first = const(0) if tile is None else tile * n
        for r in range(rows):
            for i, lanes in enumerate(tiles):
                total = sums[0][r][lanes]
                for group in sums[1:]:
                    total = total + group[r][lanes]
                place = first + (r * self.hooks.chunk + i * n)
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

    def _rows(self, s: tir.KernelScope, at: _Place, strip: _Strip) -> None:
        """The epilogue of a strip's rows."""
        n, size = self.hooks.lanes, self.hooks.chunk
        convert = self.epilogue.sums(s, self.hooks, keep(at.panel * WIDTH + at.chunk * size))
        with loop(0, T.min(const(self._rows_together), s["m"] - strip.row0)) as r:
            row = keep(strip.row0 + r)
            sums = [keep(s.scratch[ramp(r * size + i * n, n)]) for i in range(self.hooks.tiles)]
            start = keep((at.panel * s["m"] + row) * WIDTH + at.chunk * size)
            self.epilogue.emit(s, self.hooks, convert(sums), row, start)

    def _gathered(self, s: tir.KernelScope, at: _Place, step: Any) -> list[Any]:
        indices = [s["indices"][step * QUAD + i] for i in range(QUAD)]
        return self._load(s, at.panel, at.chunk, [T.cast(i, "int64") for i in indices])

    def _load(self, s: tir.KernelScope, panel: Any, chunk: Any, channels: list[Any]) -> list[Any]:
        start = keep(panel * s["k"] * WIDTH + chunk * self.hooks.chunk)
        return [keep(s["x"][ramp(start + c * WIDTH, self.hooks.chunk)]) for c in channels]

    def _store_tiles(self, s: tir.KernelScope, tiles: list[Any], start: Any) -> None:
        n = self.hooks.lanes
        for i, tile in enumerate(tiles):
            T.buffer_store(s.scratch, tile, [ramp(start + i * n, n)])

    def _quads(self, s: tir.KernelScope) -> Any:
        return div(s["k"] + (QUAD - 1), QUAD)


@dataclass(frozen=True, slots=True)
class _Place:
    """A block of rows and a panel or a chunk of it, whose quads come as number `quads`."""

    block: Any
    rows: Any
    strips: Any
    panel: Any
    quads: Any
    chunk: Any = 0


@dataclass(frozen=True, slots=True)
class _Strip:
    """A strip of a block: its first row, its `steps` from `first` on, its first group of words.

    `words` counts the words of one step of one strip.
    """

    index: Any
    row0: Any
    first: Any
    steps: Any
    words: Any
