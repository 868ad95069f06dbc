"""The products of `attention_int8` on AMX; softmax and results are those of the vector kernel.

Per run of queries of one sequence, with 16 keys or 16 channels to a tile:

    scores   tdpbssd   k - 128, a row of channels per key   by   q - 128, quads of channels
    context  tdpbuud   v as it lies in its panel            by   p, quads of keys

Signed scores need no correction for a zero point; sums of the context start at -128 * sum of p.
A step is 64 channels of the scores, or a panel of keys of the context. Channels past the head
are multiplied by queries of 0, keys of other sequences by p = 0: whatever else lies there in
scratch memory does not count. It is, in 32-bit words, `rows` being the keys of whole panels:

    scores [rows][queries] | p [rows / 4][queries] | q [step][16][64] | k [step][64][16] of a panel
    | a full mask [rows][queries], as sums are stored where scores will be

The first 64 words of q then hold the start of the sums of the context, and k those sums.

Products of 16 keys run ahead of the vector code, which meanwhile makes floats of those before.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import amx
from sparsec.codegen.isa.amx import ROW_BYTES, ROWS, SUMS, Product
from sparsec.codegen.isa.int8 import transpose_words
from sparsec.codegen.isa.vector import keep, ramp, shuffle_of
from sparsec.codegen.kernels.attention import in_steps
from sparsec.codegen.kernels.attention_int8_block import QUAD, WORDS, Block
from sparsec.codegen.kernels.panels import GROUP, WIDTH, const, div, loop, mod
from sparsec.ir.dims import Dim, ceildiv, floordiv
from sparsec.ir.ops_attention_int8 import ZERO_POINT

LEAST_HEAD_SIZE = ROWS  # tiles of values are read in place: a head has the rows of one
STEP = WORDS * WIDTH  # words of a step of q or of k
PARTS = ROW_BYTES // 16  # 128-bit parts of a row of k


class TileBlock(Block):
    """Code for `groups` tiles of queries."""

    def _place_scratch(self) -> None:
        self.row0 = keep(self.first_panel * WIDTH)
        self.depth = keep(div(self.s["head_size"] + (ROW_BYTES - 1), ROW_BYTES))  # steps
        rows = self.panels * WIDTH
        self.p0 = keep(rows * WIDTH)
        self.q0 = keep(self.p0 + rows * WORDS)
        self.k0 = keep(self.q0 + self.depth * STEP)
        self.mask0 = keep(self.k0 + self.depth * STEP)

    @staticmethod
    def scratch_bytes(seq: Dim, head_size: int, mask: str) -> Dim:
        rows = floordiv(seq + (2 * WIDTH - 2), WIDTH) * WIDTH
        words = rows * (2 * WIDTH if mask == "full" else WIDTH) + rows * WORDS
        return (words + ceildiv(head_size, ROW_BYTES) * (2 * STEP)) * 4

    def _query_bytes(self, row: Any) -> list[Any]:
        return [keep(self._signed(b)) for b in self._four_channels("q", row)]

    def _prepare_queries(self) -> None:
        super()._prepare_queries()
        with loop(div(self.s["head_size"], QUAD), self.depth * WORDS) as quad:
            for i in range(0, WIDTH, self.lanes):
                self._store_words(self.q0 + quad * WIDTH + i, self._zeros())

    def _prepare_sequence(self) -> None:
        """Values are read in place, keys prepared as they are needed: they stay in L1 then."""

    def _prepare_keys(self, i: Any) -> None:
        """A panel's keys as s8, 64 channels of a key in a row; past the head, any number."""
        quads = keep(div(self.s["head_size"], QUAD))
        row = keep(self._row("k", self.first_panel + i))
        with loop(0, div(quads + (PARTS - 1), PARTS)) as part:
            tiles = []
            for i in range(PARTS):
                quad = keep(T.min(part * PARTS + i, quads - 1))
                bytes_ = self._four_channels("k", row + quad * (QUAD * WIDTH))
                tiles.append(self.int8.interleave([keep(self._signed(b)) for b in bytes_]))
            where = keep(self.k0 + div(part, PARTS) * STEP + mod(part, PARTS) * QUAD)
            for t, of_tile in enumerate(zip(*tiles, strict=True)):
                for j, keys in enumerate(transpose_words(list(of_tile))):
                    self._store_key_parts(where + (t * QUAD + j) * WORDS, keys)

    def _store_key_parts(self, where: Any, keys: Any) -> None:
        """A part of a row for each of four keys, which lie 16 tokens apart."""
        keys = keep(tir.unsplit(keys))
        for lane in range(self.lanes // QUAD):
            part = shuffle_of([keys], [lane * QUAD + i for i in range(QUAD)])
            T.buffer_store(self.s.scratch, part, [ramp(where + lane * (GROUP * WORDS), QUAD)])

    def _compute_scores(self) -> None:
        first = keep(div(self.start, GROUP))
        last = keep(div(self.stop + (GROUP - 1), GROUP))
        with loop(first, last + 1) as group:
            with T.If(group < last), T.Then():
                place = keep(mod(group, WIDTH // GROUP))
                with T.If(T.Or(place == 0, group == first)), T.Then():
                    self._prepare_keys(keep(div(group, WIDTH // GROUP) - self.first_panel))
                self._multiply_keys(group, place)
            with T.If(group > first), T.Then():
                self._make_floats(keep((group - 1) * GROUP))

    def _multiply_keys(self, group: Any, place: Any) -> None:
        """Products of a tile of keys with all queries, to where their scores will be."""
        queries = keep(self.q0 + mod(self.token, WIDTH))
        keys = keep(self.k0 + place * (GROUP * WORDS))
        for i in range(self.count):
            amx.zero(i)
        with loop(0, self.depth) as step:
            amx.multiply_block(
                1,
                self.count,
                lambda tile, _: amx.load(tile, self.s.scratch, keys + step * STEP),
                lambda tile, i: amx.load(
                    tile, self.s.scratch, queries + (step * STEP + i * GROUP), 4 * WIDTH
                ),
                Product.S8_S8,
            )
        self._store_tiles(1, (group * GROUP - self.row0) * self.width)

    def _make_floats(self, key: Any) -> None:
        """Scores of the quads of a tile of keys that are of the sequence, in place."""
        first = T.max(key, div(self.start, QUAD) * QUAD)
        last = T.min(key + GROUP, div(self.stop + (QUAD - 1), QUAD) * QUAD)
        with loop(keep(div(first, QUAD)), keep(div(last, QUAD))) as quad:
            row = keep((quad * QUAD - self.row0) * self.width)
            self._keep_scores(keep(quad * QUAD), self._sums(row, QUAD))

    def _exponentiate(self) -> None:
        super()._exponentiate()
        first, last = self._units()
        for begin, end in ((const(0), first), (last, self.panels * WORDS)):
            with loop(begin, end) as quad:
                for i in range(self.count):
                    where = self.p0 + quad * self.width + i * self.lanes
                    self._store_words(where, self._zeros())

    def _compute_context(self) -> None:
        self._prepare_results()
        scale = T.broadcast(T.int32(-ZERO_POINT), self.lanes)
        for i, at in enumerate(self.at):
            self._store_words(self.q0 + i * self.lanes, self.total[at] * scale)
        tiles = div(self.s["head_size"] + (ROWS - 1), ROWS)
        in_steps(const(0), tiles, (SUMS // self.count, 1), self._context_tiles)

    def _context_tiles(self, first: Any, rows: int) -> None:
        """The context of `rows` tiles of channels. A last one that is not full starts earlier and
        computes some channels again, to the same bits."""
        channels = [
            keep(T.min((first + r) * ROWS, self.s["head_size"] - ROWS)) for r in range(rows)
        ]
        for r in range(rows):
            for i in range(self.count):  # a stride of 0: all rows are the same
                amx.load(r * self.count + i, self.s.scratch, self.q0 + i * self.lanes, 0)
        with loop(0, self.panels) as panel:
            v0 = keep(self._row("v", self.first_panel + panel))
            p = keep(self.p0 + panel * (WORDS * self.width))
            amx.multiply_block(
                rows,
                self.count,
                lambda tile, r: amx.load(tile, self.s["v"], v0 + channels[r] * WIDTH),
                lambda tile, i: amx.load(tile, self.s.scratch, p + i * GROUP, 4 * self.width),
                Product.U8_U8,
            )
        self._store_tiles(rows, self.k0)
        for r, channel in enumerate(channels):
            with loop(0, ROWS // QUAD) as quad:
                row = keep(self.k0 + (quad * QUAD + r * ROWS) * self.width)
                self._store_results(keep(channel + quad * QUAD), self._sums(row, QUAD))

    def _store_tiles(self, rows: int, where: Any) -> None:
        """Sums as rows of all queries."""
        for r in range(rows):
            for i in range(self.count):
                place = where + r * ROWS * self.width + i * GROUP
                amx.store(r * self.count + i, self.s.scratch, place, 4 * self.width)

    def _sums(self, where: Any, rows: int) -> list[list[Any]]:
        """Rows of sums for all queries, which are loaded where they are used."""
        places = [keep(where + r * self.width) for r in range(rows)]
        return [
            [self.s.scratch[ramp(p + i * self.lanes, self.lanes)] for i in range(self.count)]
            for p in places
        ]
