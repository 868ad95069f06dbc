"""Register blocks of `linear_bf16` for AMX: tiles of 16 rows of weights by 16 pairs of channels.

Panels of pairs are what the second factor of a product of tiles is: a row of 16 tokens' pairs for
each pair of channels. A dense weight multiplies them where they lie. Those of a sparse weight are
put together first, an even channel and an odd one of any two rows, in rows of tiles in L1. A step
is 16 pairs, the depth of a tile. It is fetched before the one in front of it is multiplied, and
the rows of the two take turns in memory, for the reasons that int8_tiles gives.

    strip of 16 rows   one tile of weights by the four tiles of a panel: 4 sums
    strip of 32 rows   two tiles of weights by two tiles of a panel: 4 sums

A last step that is not full has weights of zero. Unlike bytes, what they are multiplied by must be
numbers: rows of zeros where a dense weight ends, row 0 of the panel for a sparse one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import amx
from sparsec.codegen.isa.amx import ROW_BYTES, ROWS, SUMS
from sparsec.codegen.isa.vector import keep, prefetch, ramp, splat
from sparsec.codegen.kernels.float_gemm import FloatGemm
from sparsec.codegen.kernels.float_pack import DEPTH
from sparsec.codegen.kernels.panels import WIDTH, const, div, loop, mod

LANES = 16
TILE = ROWS * LANES  # words
FETCH = 4  # pairs fetched at a time: 16 would be four times the code
TURNS = 2  # steps in L1, whose rows lie side by side
STEPS_AHEAD = 2  # of weights, fetched while others are multiplied; past the end too


@dataclass(frozen=True, slots=True)
class TileFloatGemm(FloatGemm):
    """A strip has 16 or 32 rows; `nv` tiles of 16 tokens to a register block."""

    @property
    def has_tiles(self) -> bool:
        return True

    @property
    def scratch_bytes(self) -> int:
        return 4 * (self._fetched_at + TURNS * self.nv * TILE)

    @property
    def _biases_at(self) -> int:
        """Where rows of biases lie in scratch memory, in words: after the sums."""
        return self.rows * WIDTH

    @property
    def _fetched_at(self) -> int:
        return self._biases_at + self.strip * LANES

    @property
    def _tile_rows(self) -> int:
        """Tiles of weights in a register block."""
        return self.strip // ROWS

    def _body(self, s: tir.KernelScope) -> None:
        assert self._tile_rows * self.nv <= SUMS, self
        amx.configure(s["tiles"])
        FloatGemm._body(self, s)
        amx.release()

    def _columns(self, s: tir.KernelScope, block: Any, panel: Any, column: Any, nv: int) -> None:
        """One block of rows for `nv` tiles of tokens, from lane `column` of the panel on."""
        x0 = keep(panel * s["steps"] * WIDTH + column)
        with loop(0, self.strips) as part:
            strip = keep(block * self.strips + part)
            self._start_sums(s, strip, nv)
            if self.is_sparse:
                self._sparse(s, strip, x0, nv)
            else:
                self._dense(s, strip, x0, nv)
            place = keep(part * (self.strip * WIDTH) + column)
            for row in range(self._tile_rows):
                for i in range(nv):
                    start = place + (row * ROWS * WIDTH + i * LANES)
                    amx.store(row * nv + i, s.scratch, start, 4 * WIDTH)

    def _start_sums(self, s: tir.KernelScope, strip: Any, nv: int) -> None:
        """The biases of the rows, the same for all tokens."""
        for r in range(self.strip):
            bias = splat(s["bias"][strip * self.strip + r], LANES)
            T.buffer_store(s.scratch, bias, [ramp(const(self._biases_at + r * LANES), LANES)])
        for row in range(self._tile_rows):
            for i in range(nv):
                amx.load(row * nv + i, s.scratch, const(self._biases_at + row * TILE))

    def _dense(self, s: tir.KernelScope, strip: Any, x0: Any, nv: int) -> None:
        """Whole steps where they lie in the panel, then the pairs that are left."""
        whole, left = keep(div(s["steps"], DEPTH)), keep(mod(s["steps"], DEPTH))
        first = keep(strip * (whole + T.min(left, const(1))))
        with loop(0, whole) as step:
            start = keep(x0 + step * (DEPTH * WIDTH))
            self._multiply(
                s, keep(first + step), nv,
                lambda tile, i: amx.load(tile, s["x"], start + i * LANES, 4 * WIDTH),
            )  # fmt: skip
        with T.If(left > 0), T.Then():
            here = const(self._fetched_at)
            with loop(0, left) as pair:
                row = keep(x0 + (whole * DEPTH + pair) * WIDTH)
                lanes = [s["x"][ramp(row + i * LANES, LANES)] for i in range(nv)]
                self._keep_pair(s, here, pair, [keep(x) for x in lanes])
            with loop(left, const(DEPTH)) as pair:
                self._keep_pair(s, here, pair, [splat(T.int32(0), LANES)] * nv)
            self._multiply_fetched(s, keep(first + whole), here, nv)

    def _sparse(self, s: tir.KernelScope, strip: Any, x0: Any, nv: int) -> None:
        first, end = (keep(T.cast(s["starts"][strip + i], "int64")) for i in (0, 1))

        def place(step: Any) -> Any:
            turn = T.bitwise_and(step, const(TURNS - 1))
            return keep(turn * LANES + self._fetched_at)

        with loop(first, end + 1) as step:
            with T.If(step < end), T.Then():
                here = place(step)
                with loop(0, DEPTH // FETCH) as part:
                    for i in range(FETCH):
                        self._fetch(s, here, keep(part * FETCH + i), x0, step, nv)
            with T.If(step > first), T.Then():
                before = keep(step - 1)
                self._multiply_fetched(s, before, place(before), nv)

    def _fetch(
        self, s: tir.KernelScope, here: Any, pair: Any, x0: Any, step: Any, nv: int
    ) -> None:
        """The pair of an even channel and an odd one, of all tokens of the register block."""
        place = keep((step * DEPTH + pair) * 2)
        rows = [keep(T.cast(s["indices"][place + i], "int64") * WIDTH + x0) for i in (0, 1)]
        words = []
        for lane in range(nv):
            sides = [keep(s["x"][ramp(row + lane * LANES, LANES)]) for row in rows]
            words.append(self.numbers.join(sides))
        self._keep_pair(s, here, pair, words)

    def _keep_pair(self, s: tir.KernelScope, here: Any, pair: Any, words: list[Any]) -> None:
        """A row of each of the tiles from `here` on."""
        for i, word in enumerate(words):
            bits = T.reinterpret(f"float32x{LANES}", word)
            place = here + (i * TILE + pair * LANES) * TURNS
            T.buffer_store(s.scratch, bits, [ramp(place, LANES)])

    def _multiply_fetched(self, s: tir.KernelScope, step: Any, here: Any, nv: int) -> None:
        stride = TURNS * ROW_BYTES
        self._multiply(
            s, step, nv,
            lambda tile, i: amx.load(tile, s.scratch, here + i * (TURNS * TILE), stride),
        )  # fmt: skip

    def _multiply(self, s: tir.KernelScope, step: Any, nv: int, load_pairs: Any) -> None:
        """The products of one step; `load_pairs(register, i)` loads the pairs of tile i."""
        words = keep(step * (self._tile_rows * TILE))
        ahead = words + STEPS_AHEAD * self._tile_rows * TILE
        for line in range(self.strip):
            prefetch(s["words"], ahead + line * (ROW_BYTES // 4))
        amx.multiply_block(
            self._tile_rows,
            nv,
            lambda tile, row: amx.load(tile, s["words"], words + row * TILE),
            load_pairs,
            amx.Product.BF16,
        )
