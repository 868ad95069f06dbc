"""The products of `attention_bf16` on AMX; softmax and results are those of the vector kernel.

Per run of queries of one sequence, with 16 keys or 16 channels to a tile:

    scores   tdpbf16ps   k, a row of 16 pairs of channels per key   by   q as it lies in its panel
    context  tdpbf16ps   v, a row of 16 pairs of keys per channel   by   p, pairs of keys

A step is 32 channels of the scores, or 32 keys of the context. Tiles of keys are those of the
panels: keys of other sequences have probabilities and values of zero. Behind the values, scratch
memory holds in 32-bit words

    k [step][16][16] of a tile of keys | sums [2][16][queries], of scores and then of the context

Products of 16 keys run ahead of the vector code, which meanwhile scales and masks those before.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import amx
from sparsec.codegen.isa.amx import ROWS, SUMS, Product
from sparsec.codegen.isa.bf16 import LANES
from sparsec.codegen.isa.int8 import transpose_words
from sparsec.codegen.isa.vector import keep, ramp, shuffle_of, splat
from sparsec.codegen.kernels.attention import Attention, higher, in_steps
from sparsec.codegen.kernels.attention_bf16_block import PAIRS, PairBlock
from sparsec.codegen.kernels.panels import GROUP, WIDTH, const, div, loop, mod
from sparsec.ir.dims import Dim

DEPTH = 16  # pairs of a step
STEP = ROWS * DEPTH  # words of a tile
PART = 4  # words of 128 bits
TURNS = 2


class TilePairBlock(PairBlock):
    """Code for some tiles of queries."""

    unit = 2 * DEPTH
    head_unit = 2 * DEPTH

    def __init__(self, kernel: Attention, s: tir.KernelScope, *where: Any):
        PairBlock.__init__(self, kernel, s, *where)
        panels = div(self.stop - 1, WIDTH) - div(self.first, WIDTH) + 1
        self.depth = keep(div(s["head_size"], self.head_unit))  # steps of the scores
        self.keys = keep(self.values + panels * s["head_size"] * PAIRS)
        self.sums = keep(self.keys + self.depth * STEP)

    @classmethod
    def scratch_bytes(cls, seq: Dim, head_size: int) -> Dim:
        own = head_size // cls.head_unit * STEP + TURNS * ROWS * WIDTH
        return super().scratch_bytes(seq, head_size) + 4 * own

    def compute_scores(self) -> None:
        for at in self.at:
            T.buffer_store(self.highest, splat(float("-inf"), self.lanes), [at])
        first = keep(div(self.start, GROUP))
        last = keep(div(self.stop + (GROUP - 1), GROUP))
        with loop(first, last + 1) as group:
            with T.If(group < last), T.Then():
                self._prepare_keys(group)
                self._multiply_keys(group)
            with T.If(group > first), T.Then():
                self._make_scores(keep(group - 1))

    def _prepare_keys(self, group: Any) -> None:
        """16 keys as rows of pairs of channels: four pairs at a time become parts of rows."""
        place = keep(mod(group, WIDTH // GROUP) * GROUP)
        row = keep(self._row("k", div(group, WIDTH // GROUP)) + place)
        with loop(0, self.depth * (DEPTH // PART)) as quarter:
            pairs = [
                keep(self.s["k"][ramp(row + (quarter * PART + i) * WIDTH, LANES)])
                for i in range(PART)
            ]
            where = self.keys + div(quarter, DEPTH // PART) * STEP
            where = keep(where + mod(quarter, DEPTH // PART) * PART)
            for j, words in enumerate(transpose_words(pairs)):
                whole = keep(T.reinterpret(f"float32x{LANES}", tir.unsplit(words)))
                for part in range(LANES // PART):
                    values = shuffle_of([whole], [part * PART + i for i in range(PART)])
                    key = part * PART + j
                    T.buffer_store(self.s.scratch, values, [ramp(where + key * DEPTH, PART)])

    def _multiply_keys(self, group: Any) -> None:
        """Products of a tile of keys with all queries."""
        q0 = keep(self._row("q", div(self.token, WIDTH)) + mod(self.token, WIDTH))
        for i in range(self.count):
            amx.zero(i)
        with loop(0, self.depth) as step:
            amx.multiply_block(
                1,
                self.count,
                lambda tile, _: amx.load(tile, self.s.scratch, self.keys + step * STEP),
                lambda tile, i: amx.load(
                    tile, self.s["q"], q0 + (step * (DEPTH * WIDTH) + i * LANES), 4 * WIDTH
                ),
                Product.BF16,
            )
        for i in range(self.count):
            amx.store(i, self.s.scratch, self._turn(group) + i * LANES, 4 * self.width)

    def _turn(self, group: Any) -> Any:
        """Where the sums of a tile of keys are."""
        return keep(self.sums + T.bitwise_and(group, const(TURNS - 1)) * (ROWS * self.width))

    def _make_scores(self, group: Any) -> None:
        """Scores of those keys of a tile that are of the sequence."""
        n, scratch, sums = self.lanes, self.s.scratch, self._turn(group)
        first = keep(T.max(group * GROUP, self.start))
        last = keep(T.min((group + 1) * GROUP, self.stop))
        with loop(first, last) as key:
            for i, at in enumerate(self.at):
                place = sums + (key - group * GROUP) * self.width + i * n
                where = ramp((key - self.first) * self.width + i * n, n)
                total = keep(scratch[ramp(place, n)])
                scaled = total * splat(self.s["scale"], n)
                score = keep(self._masked(scaled, key - self.start, where))
                T.buffer_store(scratch, score, [where])
                T.buffer_store(self.highest, higher(self.highest[at], score), [at])

    def _sum_channels(self) -> None:
        tiles = div(self.s["head_size"], ROWS)
        in_steps(const(0), tiles, (SUMS // self.count, 1), self._context_tiles)

    def _context_tiles(self, tile: Any, rows: int) -> None:
        """The context of `rows` tiles of channels."""
        channel = keep(tile * ROWS)
        for register in range(rows * self.count):
            amx.zero(register)
        with loop(0, div(self.pairs, DEPTH)) as step:
            p = keep(step * (DEPTH * self.width))
            part = keep(div(self.first, 2 * DEPTH) + step)  # of all tokens
            panel = div(part, PAIRS // DEPTH) - div(self.first, WIDTH)
            v = self.values + (panel * self.s["head_size"] + channel) * PAIRS
            v = keep(v + mod(part, PAIRS // DEPTH) * DEPTH)
            amx.multiply_block(
                rows,
                self.count,
                lambda register, r: amx.load(
                    register, self.s.scratch, v + r * (ROWS * PAIRS), 4 * PAIRS
                ),
                lambda register, i: amx.load(
                    register, self.s.scratch, p + i * LANES, 4 * self.width
                ),
                Product.BF16,
            )
        for r in range(rows):
            for i in range(self.count):
                place = self.sums + (r * ROWS * self.width + i * LANES)
                amx.store(r * self.count + i, self.s.scratch, place, 4 * self.width)
        with loop(0, rows * (ROWS // 2)) as pair:
            totals = [[self._total(pair * 2 + r, i) for i in range(self.count)] for r in (0, 1)]
            self._store_channels(totals, keep(channel + pair * 2))

    def _total(self, row: Any, i: int) -> Any:
        place = self.sums + row * self.width + i * self.lanes
        return keep(self.s.scratch[ramp(place, self.lanes)])
