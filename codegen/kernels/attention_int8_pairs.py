"""The products of `attention_int8` on AVX2; softmax and results are those of the vector kernel.

All operands are int16, less their zero point, in pairs: `vpmaddwd` multiplies two pairs and adds
the products into int32, exactly (`vpmaddubsw`, which takes bytes, saturates at int16). Signed
queries need no correction for a zero point. Per run of queries of one sequence, 16 at a time:

    scores   pairs of channels of 16 queries   by   the pair of a key, broadcast
    context  pairs of keys of p                by   the pair of a value, broadcast

Keys and values become pairs once per run. Scratch memory, in 32-bit words, `rows` being the keys
rounded up:

    scores [rows][16] | p [rows / 2][16] | q [d / 2][16] | k [panel][d / 2][64] | v [panel][d][32]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen.isa.polynomials import at_least, horner
from sparsec.codegen.isa.vector import keep, ramp, shuffle
from sparsec.codegen.kernels.attention_int8_block import EXP2, Block
from sparsec.codegen.kernels.panels import GROUP, WIDTH, const, div, loop, mod
from sparsec.ir.dims import Dim, floordiv
from sparsec.ir.ops_attention_int8 import ZERO_POINT

PAIR = 2
PAIRS = WIDTH // PAIR  # words of a channel of values of a panel
_LEAST_POWER = -126.0  # 255 * 2**power is a normal float, and rounds to 0


class PairBlock(Block):
    """Code for `groups` groups of queries, one after the other: keys and values are shared."""

    unit: ClassVar[int] = PAIR
    most: ClassVar[int] = 1
    rows: ClassVar[Mapping[int, int]] = {1: 6}

    def _place_scratch(self) -> None:
        size, rows = self.s["head_size"], (div(self.stop - self.start, PAIR) + 2) * PAIR
        self.row0 = keep(div(self.start, PAIR) * PAIR)
        self.p0 = keep(rows * GROUP)
        self.q0 = keep(self.p0 + div(rows, PAIR) * GROUP)
        self.k0 = keep(self.q0 + div(size, PAIR) * GROUP)
        self.v0 = keep(self.k0 + self.panels * size * PAIRS)
        self.mask0 = const(0)

    @staticmethod
    def scratch_bytes(seq: Dim, head_size: int, mask: str) -> Dim:
        rows = (floordiv(seq, PAIR) + 2) * PAIR
        panels = floordiv(seq + (2 * WIDTH - 2), WIDTH)
        words = rows * GROUP + floordiv(rows, PAIR) * GROUP + head_size // PAIR * GROUP
        return (words + panels * (2 * head_size * PAIRS)) * 4

    def _prepare_queries(self) -> None:
        row = keep(self._row("q", div(self.token, WIDTH)) + mod(self.token, WIDTH))
        with loop(0, div(self.s["head_size"], PAIR)) as d:
            self._store_channels("q", row + d * (PAIR * WIDTH), self.q0 + d * GROUP)

    def _prepare_values(self, i: Any) -> None:
        size = self.s["head_size"]
        v = keep(self._row("v", self.first_panel + i))
        with loop(0, size) as d:
            words = keep(self.v0 + (i * size + d) * PAIRS)
            for lane in range(0, WIDTH, GROUP):
                value = self._numbers("v", v + d * WIDTH + lane)
                self._store_words(words + lane // PAIR, T.reinterpret("int32x8", value))

    def _prepare_keys(self, i: Any) -> None:
        pairs = keep(div(self.s["head_size"], PAIR))
        k = keep(self._row("k", self.first_panel + i))
        with loop(0, pairs) as d:
            words = keep(self.k0 + (i * pairs + d) * WIDTH)
            for lane in range(0, WIDTH, GROUP):
                self._store_channels("k", k + d * (PAIR * WIDTH) + lane, words + lane)

    def _store_channels(self, operand: str, row: Any, where: Any) -> None:
        """A group of tokens of two channels, in pairs."""
        a, b = (self._numbers(operand, row + i * WIDTH) for i in range(PAIR))
        for half in range(2):
            order = [GROUP * i + half * self.lanes + t for t in range(self.lanes) for i in (0, 1)]
            pairs = T.reinterpret("int32x8", keep(shuffle(a, b, order)))
            self._store_words(where + half * self.lanes, pairs)

    def _numbers(self, operand: str, where: Any) -> Any:
        """16 bytes less their zero point, as int16."""
        wide = T.cast(self.s[operand][ramp(where, GROUP)], "int16x16")
        return keep(wide - T.broadcast(tirx.const(ZERO_POINT, "int16"), GROUP))

    def _score_keys(self, panel: Any, lane: Any, rows: int) -> None:
        acc = self._sums_from([self._zeros()] * rows)
        half = div(self.s["head_size"], PAIR)
        keys = keep(self.k0 + (panel - self.first_panel) * half * WIDTH + lane)
        with loop(0, half) as d:
            words = [keys + d * WIDTH + r for r in range(rows)]
            self._accumulate(acc, self.q0 + d * GROUP, words)
        self._keep_scores(keep(panel * WIDTH + lane), [[row[at] for at in self.at] for row in acc])

    def _dot(self, total: Any, x: Any, factor: Any) -> Any:
        pairs = (T.reinterpret("int16x16", v) for v in (x, factor))
        return total + T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", *pairs)

    def _exp2(self, power: Any) -> Any:
        power = at_least(self.v, power, _LEAST_POWER)
        whole = keep(T.floor(power))
        return keep(self.v.scale_normal(horner(self.v, keep(power - whole), EXP2), whole))
