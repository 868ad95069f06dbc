"""The code of `attention_bf16` for one run of queries: as in fp32, two products to a multiply-add.

    scores   pairs of channels, as queries and keys lie in their panels
    context  pairs of keys: probabilities are rounded and joined as they are made, and the values
             of the sequence are rewritten from pairs of channels to pairs of keys

Pairs of keys are those of the panels, so a sequence may begin or end inside one: what is not its
own has a score of -inf and a value of zero. Scratch memory, in 32-bit words:

    scores [rows][queries], then pairs of probabilities | values [panel][channel][pair of keys]
"""

from __future__ import annotations

from typing import Any, ClassVar

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.bf16 import LANES, dot, pairs_of
from sparsec.codegen.isa.polynomials import exp_negative
from sparsec.codegen.isa.vector import keep, ramp, shuffle_of, splat
from sparsec.codegen.kernels.attention import LOWEST, Attention, QueryBlock, higher
from sparsec.codegen.kernels.panels import WIDTH, const, div, loop, mod
from sparsec.codegen.kernels.query_blocks import store_context
from sparsec.ir.dims import Dim, ceildiv, floordiv

PAIRS = WIDTH // 2  # of keys in a panel


class PairBlock(QueryBlock):
    """Scores have a row for every key of every pair; pairs of probabilities take their place.

    The context takes `unit` keys in a step: rows start and end with whole ones.
    """

    unit: ClassVar[int] = 2
    head_unit: ClassVar[int] = 2  # what a head size is a multiple of

    def __init__(self, kernel: Attention, s: tir.KernelScope, *where: Any):
        QueryBlock.__init__(self, kernel, s, *where)
        self.shift = keep(mod(self.start, self.unit))
        self.first = keep(self.start - self.shift)
        units = div(self.stop - self.first + (self.unit - 1), self.unit)
        self.pairs = keep(units * (self.unit // 2))
        # The copy of the values is behind the scores: [panel][channel][pair].
        rows = div(self.stop - self.start + (2 * self.unit - 2), self.unit) * self.unit
        self.values = keep(rows * WIDTH)

    @classmethod
    def scratch_bytes(cls, seq: Dim, head_size: int) -> Dim:
        """Scores, and the values of all panels that a sequence of any first token touches."""
        scores = floordiv(seq + (2 * cls.unit - 2), cls.unit) * (cls.unit * WIDTH * 4)
        return scores + (ceildiv(seq, WIDTH) + 1) * (head_size * PAIRS * 4)

    def exclude_others(self) -> None:
        """-inf for keys of the first and the last unit that are of other sequences."""
        with loop(0, self.shift) as row:
            self._fill(row)
        with loop(self.stop - self.first, 2 * self.pairs) as row:
            self._fill(row)

    def _fill(self, row: Any) -> None:
        for i in range(self.count):
            where = ramp(row * self.width + i * self.lanes, self.lanes)
            T.buffer_store(self.s.scratch, splat(float("-inf"), self.lanes), [where])

    def copy_values(self) -> None:
        """The values as pairs of keys; zero where a key is of another sequence."""
        s, half = self.s, 2 * LANES  # keys of two vectors
        with loop(div(self.start, half), div(self.stop - 1, half) + 1) as part:
            key0 = keep(part * half)
            panel, lane = keep(div(key0, WIDTH)), keep(mod(key0, WIDTH))
            low = T.cast(T.max(self.start - key0, const(0)), "int32")
            high = T.cast(T.min(self.stop - key0, const(half)), "int32")
            index = T.ramp(T.int32(0), 1, half)
            # Integers and no booleans, which TVM can not keep.
            own = keep(
                T.Select(
                    T.And(index >= T.broadcast(low, half), index < T.broadcast(high, half)),
                    T.broadcast(T.int16(-1), half),
                    T.broadcast(T.int16(0), half),
                )
            )
            source = keep(self._row("v", panel) + lane)
            local = panel - div(self.first, WIDTH)
            target = keep(self.values + local * s["head_size"] * PAIRS + div(lane, 2))
            with loop(0, div(s["head_size"], 2)) as pair:
                words = [
                    keep(T.reinterpret("int16x32", s["v"][ramp(source + pair * WIDTH + i, LANES)]))
                    for i in (0, LANES)
                ]
                for channel in (0, 1):
                    row = keep(shuffle_of(words, list(range(channel, 2 * half, 2))))
                    bits = T.reinterpret("float32x16", T.bitwise_and(row, own))
                    at = target + (pair * 2 + channel) * PAIRS
                    T.buffer_store(s.scratch, bits, [ramp(at, LANES)])

    def _row(self, operand: str, panel: Any) -> Any:
        """Where this head's first pair of channels of a panel of q, k or v starts."""
        channels, offset = self.s[f"{operand}_channels"], self.s[f"{operand}_offset"]
        head = self.head * div(self.s["head_size"], 2)
        return (panel * channels + offset + head) * WIDTH

    def _score_keys(self, panel: Any, lane: Any, rows: int) -> None:
        s, n = self.s, self.lanes
        acc = self._zeros(rows)
        q0 = keep(self._row("q", div(self.token, WIDTH)) + mod(self.token, WIDTH))
        k0 = keep(self._row("k", panel) + lane)
        with loop(0, div(s["head_size"], 2)) as d:
            qs = [keep(s["q"][ramp(q0 + d * WIDTH + i * n, n)]) for i in range(self.count)]
            for r in range(rows):
                key = keep(T.broadcast(s["k"][k0 + d * WIDTH + r], n))
                for q, at in zip(qs, self.at, strict=True):
                    T.buffer_store(acc[r], dot(acc[r][at], q, key), [at])
        key0 = keep(panel * WIDTH + lane - self.start)
        for r in range(rows):
            for i, at in enumerate(self.at):
                where = ramp((key0 + r + self.shift) * self.width + i * n, n)
                score = keep(self._masked(acc[r][at] * splat(s["scale"], n), key0 + r, where))
                T.buffer_store(s.scratch, score, [where])
                T.buffer_store(self.highest, higher(self.highest[at], score), [at])

    def exponentiate(self) -> None:
        """Pairs of exp(score - highest) in the rows of the scores; the sums of all in fp32."""
        n, scratch = self.lanes, self.s.scratch
        highest = [keep(higher(splat(LOWEST, n), self.highest[at])) for at in self.at]
        for at in self.at:
            T.buffer_store(self.total, splat(0.0, n), [at])
        with loop(0, self.pairs) as pair:
            for i, at in enumerate(self.at):
                both = []
                for part in (0, 1):
                    where = ramp((pair * 2 + part) * self.width + i * n, n)
                    both.append(exp_negative(self.v, keep(scratch[where] - highest[i])))
                    T.buffer_store(self.total, self.total[at] + both[part], [at])
                bits = T.reinterpret(f"float32x{n}", pairs_of(*both))
                T.buffer_store(scratch, bits, [ramp(pair * self.width + i * n, n)])

    def _context_channels(self, channel: Any, rows: int) -> None:
        acc = self._zeros(rows)
        last = self.first + 2 * self.pairs
        with loop(div(self.first, WIDTH), div(last - 1, WIDTH) + 1) as panel:
            begin = keep(div(T.max(self.first - panel * WIDTH, const(0)), 2))
            end = keep(div(T.min(last - panel * WIDTH, const(WIDTH)), 2))
            local = panel - div(self.first, WIDTH)
            values = keep(self.values + (local * self.s["head_size"] + channel) * PAIRS)
            row0 = keep(panel * PAIRS - div(self.first, 2))
            with loop(begin, end) as pair:
                self._add_pair(acc, keep((row0 + pair) * self.width), keep(values + pair))
        self._store_channels([[row[at] for at in self.at] for row in acc], channel)

    def _add_pair(self, acc: list[Any], p0: Any, v0: Any) -> None:
        n, scratch = self.lanes, self.s.scratch
        ps = [
            keep(T.reinterpret(f"int32x{n}", scratch[ramp(p0 + i * n, n)]))
            for i in range(self.count)
        ]
        for r, row in enumerate(acc):
            word = keep(T.broadcast(scratch[v0 + r * PAIRS], n))
            value = keep(T.reinterpret(f"int32x{n}", word))
            for p, at in zip(ps, self.at, strict=True):
                T.buffer_store(row, dot(row[at], p, value), [at])

    def _store_channels(self, sums: list[list[Any]], channel: Any) -> None:
        """Sums of channels from `channel` on, divided by those of the probabilities."""
        head = div(self.token, WIDTH) * self.s["heads"] + self.head
        y0, per_row = keep(head * self.s["head_size"] + channel), 1
        results = [
            [keep(x * self.total[at]) for x, at in zip(row, self.at, strict=True)] for row in sums
        ]
        if self.kernel.result == "bf16":
            y0, per_row = keep(div(y0, 2)), 2
            results = [
                [pairs_of(*both) for both in zip(results[r], results[r + 1], strict=True)]
                for r in range(0, len(results), per_row)
            ]
        for r, vectors in enumerate(results):
            row = (y0 + r) * WIDTH + mod(self.token, WIDTH)
            store_context(
                self.s["y"], row, vectors, self.lanes, packer=self.packer, before=self.before
            )

    @property
    def _channel_steps(self) -> tuple[int, ...]:
        """Channels come in pairs."""
        return tuple(2 if n == 1 else n for n in self.steps)
