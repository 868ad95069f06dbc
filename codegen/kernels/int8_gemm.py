"""`linear_int8`: y = activation(scale * (W x) + bias) + residual, u8 panels by int8 weights.

Tokens lie in the lanes, in tile order. There is one loop nest with three ways to come by the
quads (four input channels) that are multiplied:

    dense      all quads of channels in turn, from a copy of the panel in quads
    quads      the same copy, the quads that an index list names: blocks of R x 4
    channels   four channels of the planar panel that an index list names: blocks of R x 1

Loops, outermost first:

    group of panels     their quads, made once per worker, stay in L2 for all rows
    block of rows       its weights stay in L1 for all panels of the group
    panel, chunk of the panel
    strip: the rows of one register block; the strips of a block share its steps
    step

The last two are those of int8_dots, for vector instructions, or of int8_tiles, for AMX. A last
panel with few tokens takes the narrow form of the same loops (`Int8Isa.narrow`): fewer tiles. A
kernel for few tokens in all is that form alone, without groups and panels. All read the same
weights.

Weights are read from memory in order, once per group. Sums that are all in registers go from there
through the epilogue, row by row; others go through L1 to an epilogue that is a loop over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.int8 import Int8Isa
from sparsec.codegen.isa.vector import alone, keep, ramp
from sparsec.codegen.kernels.base import TirKernel
from sparsec.codegen.kernels.int8_epilogue import Epilogue
from sparsec.codegen.kernels.int8_pack import QUAD
from sparsec.codegen.kernels.panels import WIDTH, const, div, item_rectangles, loop
from sparsec.codegen.program import Kind, Parameter


@dataclass(frozen=True, slots=True)
class Int8Gemm(TirKernel):
    """What all have in common. A register block has `strip` rows, a `tall` block of rows several
    strips.

    `most_tokens` is the chunk of a narrow form of `hooks`, or None: any number of tokens.
    """

    scratch: ClassVar[str | None] = "int32"
    hooks: Int8Isa
    form: str
    strip: int
    tall: bool
    epilogue: Epilogue
    most_tokens: int | None = None

    @property
    def name(self) -> str:
        rows = f"{self.strip}n" if self.tall else f"{self.strip}"
        return (
            f"linear_int8_{self.form}{rows}_{self.epilogue.result}{self.epilogue.suffix}"
            f"{'' if self.most_tokens is None else f'_to{self.most_tokens}'}_{self.isa}"
        )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        starts, indices = Parameter("starts", dtype="int32"), Parameter("indices", dtype="uint16")
        sizes = ["tokens", "m", "k", "group", *(["strips"] if self.tall else [])]
        return (
            Parameter("x", dtype="uint8"),
            Parameter("words", dtype="int32"),
            *([Parameter("tiles", dtype="uint8")] if self.has_tiles else []),
            *([starts, indices] if self.is_sparse else []),
            Parameter("offset", dtype="int32"),
            *self.epilogue.pointers,
            *(Parameter(n, Kind.INT) for n in sizes),
            *self.epilogue.numbers,
        )

    @property
    def isa(self) -> str:
        return self.hooks.name

    @property
    def is_sparse(self) -> bool:
        return self.form != "dense"

    @property
    def has_tiles(self) -> bool:
        """Whether it takes the shapes of tile registers, `tiles`."""
        return False

    @property
    def _area(self) -> int:
        """Where the quads lie in scratch memory, in int32: after what a register block needs."""
        raise NotImplementedError

    def scratch_bytes(self, k: int, group: int, most_steps: int) -> int:
        """For `group` panels of k channels, and for the steps of a block of rows."""
        raise NotImplementedError

    def _body(self, s: tir.KernelScope) -> None:
        if self.most_tokens is not None:
            replace(self, hooks=self.hooks.form_for(self.most_tokens))._one_panel(s)
            return
        group = s["group"]
        strips = s["strips"] if self.tall else const(1)
        rows = keep(strips * self.strip)
        blocks = keep(div(s["m"] + rows - 1, rows))
        with item_rectangles(s, blocks, group) as (first, last, origin, end):
            if self.form != "channels":
                with loop(origin, end) as panel:
                    for kernel, chunks in self._widths(s, panel):
                        kernel._make_quads(s, panel, panel - origin, chunks)
            with loop(first, last) as block, loop(origin, end) as panel:
                at = Place(block, rows, strips, panel, keep(panel - origin))
                for kernel, chunks in self._widths(s, panel):
                    kernel._chunks(s, at, chunks)

    def _one_panel(self, s: tir.KernelScope) -> None:
        """Blocks of rows for the only panel and its only chunk."""
        strips, zero = s["strips"] if self.tall else const(1), const(0)
        rows = keep(strips * self.strip)
        if self.form != "channels":
            self._make_quads(s, zero, zero, const(1))
        with loop(s.begin, s.end) as block:
            self._block(s, Place(block, rows, strips, zero, zero, zero))

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

    def _chunks(self, s: tir.KernelScope, at: Place, chunks: Any) -> None:
        """A block of rows for one panel."""
        with loop(0, chunks) as chunk:
            quads = keep(at.quads * (WIDTH // self.hooks.chunk) + chunk)
            self._block(s, replace(at, chunk=chunk, quads=quads))

    def _block(self, s: tir.KernelScope, at: Place) -> None:
        """All strips of a block of rows for one chunk."""
        raise NotImplementedError

    def _rows(self, s: tir.KernelScope, at: Place, row0: Any, count: int, first: Any = 0) -> None:
        """The epilogue of the sums of `count` rows, at the start of scratch memory, from row
        `first` of them on."""
        n, size = self.hooks.lanes, self.hooks.chunk
        convert = self._converter(s, at)
        with loop(first, T.min(const(count), s["m"] - row0)) as r:
            sums = [keep(s.scratch[ramp(r * size + i * n, n)]) for i in range(self.hooks.tiles)]
            self._row(s, at, keep(row0 + r), convert(sums))

    def _converter(self, s: tir.KernelScope, at: Place) -> Callable[[list[Any]], list[Any]]:
        """int32 sums of a row of the chunk to fp32."""
        return self.epilogue.sums(
            s, self.hooks, keep(at.panel * WIDTH + at.chunk * self.hooks.chunk)
        )

    def _row(self, s: tir.KernelScope, at: Place, row: Any, sums: list[Any]) -> None:
        """The epilogue of a row of the chunk, `sums` in fp32."""
        start = keep((at.panel * s["m"] + row) * WIDTH + at.chunk * self.hooks.chunk)
        self.epilogue.emit(s, self.hooks, sums, row, start)

    def _gathered(self, s: tir.KernelScope, at: Place, step: Any) -> list[Any]:
        indices = [s["indices"][step * QUAD + i] for i in range(QUAD)]
        places = [alone(T.cast(i, "int64") * WIDTH) for i in indices]
        start = keep(at.panel * s["k"] * WIDTH + at.chunk * self.hooks.chunk)
        return [keep(s["x"][ramp(start + p, self.hooks.chunk)]) for p in places]

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
class Place:
    """A block of rows and a panel or a chunk of it, whose quads come as number `quads`."""

    block: Any
    rows: Any
    strips: Any
    panel: Any
    quads: Any
    chunk: Any = 0
