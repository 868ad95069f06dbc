"""The code of `attention_int8` for one run of queries of one sequence.

Computed transposed as `attention` is: keys down, queries in the lanes. q, k and v are u8 panels
with zero point 128. Per run of queries of one sequence:

    scores[key][query] = (factor * (sum_d q[query][d] k[key][d]) + mask) / ln(2)
    p = rint(255 * 2**(scores - max over keys))      u8, four keys to a 32-bit lane
    y[d][query] = v_scale * (sum_key v[d][key] p[key][query]) / sum of p

Keys are taken in quads that start at multiples of four in a panel: those of a quad that are not
of the sequence have p = 0. Scratch memory, in 32-bit words, `rows` being the keys rounded up:

    scores [rows][queries] | p [rows / 4][queries] | q [d / 4][64] | v [panel][d][16]
    | of every panel: k [d / 4][64], 64 corrections for the zero point of q

Keys and values stay there for the next run of queries of the same sequence and head.

A full mask is transposed to where the scores will be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.int8 import Int8Isa
from sparsec.codegen.isa.pack8 import Packer
from sparsec.codegen.isa.polynomials import horner
from sparsec.codegen.isa.vector import keep, ramp, splat
from sparsec.codegen.kernels.attention import LOWEST, higher, in_steps
from sparsec.codegen.kernels.full_mask import transpose_mask
from sparsec.codegen.kernels.panels import GROUP, WIDTH, const, div, loop, mod
from sparsec.codegen.kernels.query_blocks import (
    PACKED,
    Sequences,
    queries_before,
    store_context,
)
from sparsec.ir.dims import Dim, floordiv

QUAD = 4
WORDS = WIDTH // QUAD  # of a channel of a panel
ROWS = {4: 4, 2: 8, 1: 16}  # groups of queries at once: keys or channels at once
_LOG2_E = 1.4426950408889634
_NOT_SCALED = -1e38
_FLOOR = 9  # rounding mode of `vreduceps`: down, no exception
# 255 * 2**f for f in [0, 1), relative error 7.5e-5: 0.02 of a step
EXP2 = (254.98093372344314, 177.437534274418, 57.6471460252009, 19.89625174010406)


class Block:
    """Code for `groups` groups of queries from `token` on against the keys of one sequence.

    `unit` keys or channels share a word of 32 bits. Of the groups `most` are computed at once,
    with `rows[groups]` keys or channels at once. `prepared` are the head and the sequence whose
    keys and values are in scratch memory.
    """

    unit: ClassVar[int] = QUAD
    most: ClassVar[int] = 4
    rows: ClassVar[Mapping[int, int]] = ROWS

    def __init__(
        self, int8: Int8Isa, mask: str, result: str, s: tir.KernelScope, sequences: Sequences,
        prepared: Any, head: Any, token: Any, sequence: Any, groups: int,
    ):  # fmt: skip
        self.int8, self.v, self.mask, self.result, self.s = int8, int8.vector, mask, result, s
        self.head, self.token, self.sequence = head, token, sequence
        self.prepared = prepared
        together = min(groups, self.most)
        self.runs = groups // together
        self.start = keep(sequences.start(sequence))
        self.stop = keep(sequences.stop(sequence))
        self.first_panel = keep(div(self.start, WIDTH))
        self.panels = keep(div(self.stop - 1, WIDTH) - self.first_panel + 1)
        self.lanes = self.v.lanes
        self.width = together * GROUP
        self.count = self.width // self.lanes
        self.packer: Packer | None = None
        # Only a single group may have queries of other sequences among its lanes.
        self.before = queries_before(self.start, token) if groups == 1 else None
        self.steps = (self.rows[together], self.unit)
        self.at = [ramp(i * self.lanes, self.lanes) for i in range(self.count)]
        self.highest = tir.registers("float32", self.width)
        self.total = tir.registers("int32", self.width)
        self.inverse = tir.registers("float32", self.width)
        self._place_scratch()

    def _place_scratch(self) -> None:
        """Where the parts of scratch memory start; row 0 of the scores is key `row0`."""
        size, rows = self.s["head_size"], (div(self.stop - self.start, QUAD) + 2) * QUAD
        self.row0 = keep(div(self.start, QUAD) * QUAD)
        self.p0 = keep(rows * WIDTH)
        self.q0 = keep(self.p0 + rows * WORDS)
        self.v0 = keep(self.q0 + size * WORDS)
        self.k0 = keep(self.v0 + self.panels * size * WORDS)
        self.mask0 = const(0)

    @staticmethod
    def scratch_bytes(seq: Dim, head_size: int, mask: str) -> Dim:
        """The memory of one worker: see the top of this file."""
        rows = (floordiv(seq, QUAD) + 2) * QUAD
        panels = floordiv(seq + (2 * WIDTH - 2), WIDTH)
        words = rows * (WIDTH + WORDS) + head_size * WORDS
        return (words + panels * (2 * head_size * WORDS + WIDTH)) * 4

    def compute(self) -> None:
        """All of it."""
        self._prepare_sequence()
        if self.runs == 1:
            self._compute_run()
            return
        first = self.token
        with loop(0, self.runs) as run:
            self.token = keep(first + run * self.width)
            self._compute_run()

    def _compute_run(self) -> None:
        """All queries that are computed at once."""
        self._prepare_queries()
        if self.mask == "full":
            self._load_mask()
        for at in self.at:
            T.buffer_store(self.highest, splat(float("-inf"), self.lanes), [at])
        self._compute_scores()
        self._exponentiate()
        self._compute_context()

    def _load_mask(self) -> None:
        """The mask over ln(2), keys down; -inf for what is no key in units that hold some."""
        none = T.reinterpret(f"int32x{self.lanes}", splat(float("-inf"), self.lanes))
        for key in (self.start, self.stop - 1):
            row = keep(div(key, self.unit) * self.unit - self.row0)
            for j in range(self.unit):
                for i in range(self.count):
                    where = self.mask0 + (row + j) * self.width + i * self.lanes
                    self._store_words(where, none)

        def store(key: Any, query: Any, value: Any, lanes: int) -> None:
            at = self.mask0 + (self.start + key - self.row0) * self.width + query
            type, where = ("int32", at) if lanes == 1 else (f"int32x{lanes}", ramp(at, lanes))
            T.buffer_store(self.s.scratch, T.reinterpret(type, _scaled(value, lanes)), [where])

        first = self.sequence * self.s["batch_step"] + self.head * self.s["head_step"]
        query = self.token - self.start
        transpose_mask(self.s, keep(first), query, self.width, self.lanes, store)

    def _prepare_queries(self) -> None:
        """The panel's queries as quads of channels, in token order."""
        row = keep(self._row("q", div(self.token, WIDTH)))
        with loop(0, div(self.s["head_size"], QUAD)) as d:
            tiles = self.int8.interleave(self._query_bytes(row + d * (QUAD * WIDTH)))
            for i, tile in enumerate(self.int8.to_tokens(tiles)):
                self._store_words(self.q0 + d * WIDTH + i * self.lanes, tile)

    def _query_bytes(self, row: Any) -> list[Any]:
        """Four channels of the queries as the products take them."""
        return self._four_channels("q", row)

    def _prepare_sequence(self) -> None:
        """Keys and values of all panels of the sequence, unless they are there."""
        known = self.prepared
        is_other = T.Or(known[0] != self.head, known[1] != self.sequence)
        with T.If(is_other), T.Then():
            for place, value in enumerate((self.head, self.sequence)):
                T.buffer_store(known, value, [place])
            with loop(0, self.panels) as i:
                self._prepare_values(i)
                self._prepare_keys(i)

    def _prepare_values(self, i: Any) -> None:
        """v - 128, as s8, of a panel of the sequence."""
        row = keep(self._row("v", self.first_panel + i))
        with loop(0, self.s["head_size"]) as d:
            value = self._signed(self.s["v"][ramp(row + d * WIDTH, WIDTH)])
            where = self.v0 + (i * self.s["head_size"] + d) * WORDS
            self._store_words(where, T.reinterpret(f"int32x{WORDS}", value))

    def _keys_at(self, i: Any) -> Any:
        """Where the keys of a panel of the sequence are; their corrections are behind them."""
        return keep(self.k0 + i * (self.s["head_size"] * WORDS + WIDTH))

    def _prepare_keys(self, i: Any) -> None:
        """A panel's keys as s8 quads of channels, in tile order, and -128 * their sums."""
        row, keys = keep(self._row("k", self.first_panel + i)), self._keys_at(i)
        sums = [tir.registers("int32", self.lanes) for _ in range(4)]
        at = ramp(0, self.lanes)
        offset = keep(T.broadcast(tirx.const(128, "uint8"), WIDTH))
        for part in sums:
            T.buffer_store(part, self._zeros(), [at])
        with loop(0, div(self.s["head_size"], QUAD)) as d:
            bytes_ = self._four_channels("k", row + d * (QUAD * WIDTH))
            tiles = self.int8.interleave([keep(self._signed(b)) for b in bytes_])
            for t, (tile, part) in enumerate(zip(tiles, sums, strict=True)):
                self._store_words(keys + d * WIDTH + t * self.lanes, tile)
                T.buffer_store(part, self.int8.dot(part[at], (offset,), (tile,)), [at])
        corrections = keep(keys + self.s["head_size"] * WORDS)
        for t, part in enumerate(sums):
            self._store_words(corrections + t * self.lanes, self._zeros() - part[at])

    def _compute_scores(self) -> None:
        with loop(self.first_panel, div(self.stop - 1, WIDTH) + 1) as panel:
            first, last = self._lanes_of(panel)
            in_steps(first, last, self.steps, lambda lane, n: self._score_keys(panel, lane, n))

    def _lanes_of(self, panel: Any) -> tuple[Any, Any]:
        """The lanes of the panel that hold keys, rounded to units."""
        first = T.max(self.row0 - panel * WIDTH, const(0))
        last = T.min(self.stop - panel * WIDTH, const(WIDTH))
        return keep(first), keep(div(last + (self.unit - 1), self.unit) * self.unit)

    def _score_keys(self, panel: Any, lane: Any, rows: int) -> None:
        s, n = self.s, self.lanes
        places = [self._place(lane + r) for r in range(0, rows, QUAD)]
        keys = self._keys_at(panel - self.first_panel)
        word = [keep(keys + places[r // QUAD] + r % QUAD) for r in range(rows)]
        corrections = s["head_size"] * WORDS
        acc = self._sums_from([splat(s.scratch[w + corrections], n) for w in word])
        queries = keep(self.q0 + mod(self.token, WIDTH))
        with loop(0, div(s["head_size"], QUAD)) as d:
            self._accumulate(acc, queries + d * WIDTH, [w + d * WIDTH for w in word])
        self._keep_scores(keep(panel * WIDTH + lane), [[row[at] for at in self.at] for row in acc])

    def _keep_scores(self, key: Any, sums: list[list[Any]]) -> None:
        """Scores from the products of keys from `key` on, to scratch memory and the maxima."""
        n = self.lanes
        factor = keep(splat(self.s["factor"] * T.float32(_LOG2_E), n))
        for r, row in enumerate(sums):
            start = (key + r - self.row0) * self.width
            biases = self._biases(key + r, start)
            for i, (value, at, bias) in enumerate(zip(row, self.at, biases, strict=True)):
                score = keep(T.cast(value, f"float32x{n}") * factor + bias)
                where = start + i * n
                self._store_words(where, T.reinterpret(f"int32x{n}", score))
                T.buffer_store(self.highest, higher(self.highest[at], score), [at])

    def _sums_from(self, values: list[Any]) -> list[Any]:
        """A row of sums for each of these vectors, which is where all of the row start."""
        acc = [tir.registers("int32", self.width) for _ in values]
        for row, value in zip(acc, values, strict=True):
            for at in self.at:
                T.buffer_store(row, value, [at])
        return acc

    def _place(self, lane: Any) -> Any:
        """Where the quad of tokens from `lane` on is in tile order."""
        return mod(lane, GROUP) * QUAD + div(lane, GROUP) * QUAD

    def _biases(self, key: Any, row: Any) -> list[Any]:
        """What is added to the scores of a key, whose row starts at `row`, for all queries."""
        n = self.lanes
        if self.mask != "full":
            return [keep(splat(self._bias(key), n))] * self.count
        places = [ramp(self.mask0 + row + i * n, n) for i in range(self.count)]
        return [keep(T.reinterpret(f"float32x{n}", self.s.scratch[at])) for at in places]

    def _bias(self, key: Any) -> Any:
        """The mask of a key over ln(2); -inf for what is no key of the sequence."""
        inside = T.And(key >= self.start, key < self.stop)
        value: Any = T.float32(0)
        if self.mask != "none":
            nearest = T.min(T.max(key, self.start), self.stop - 1)
            value = _scaled(self.s["mask"][self._mask_row() + nearest], 1)
        return keep(T.Select(inside, value, T.float32(float("-inf"))))

    def _mask_row(self) -> Any:
        """Where the mask of token 0 would be: it is read at the tokens of this sequence alone."""
        if self.mask == PACKED:
            return const(0)
        step = self.sequence * self.s["batch_step"] + self.head * self.s["head_step"]
        return step - self.start

    def _accumulate(self, acc: list[Any], vectors: Any, words: list[Any]) -> None:
        """acc[r] += the products of each lane's unit with that of words[r]."""
        scratch, n = self.s.scratch, self.lanes
        operands = [keep(scratch[ramp(vectors + i * n, n)]) for i in range(self.count)]
        for row, word in zip(acc, words, strict=True):
            factor = keep(splat(scratch[word], n))
            for operand, at in zip(operands, self.at, strict=True):
                T.buffer_store(row, self._dot(row[at], operand, factor), [at])

    def _dot(self, total: Any, x: Any, factor: Any) -> Any:
        """`total` plus the products of the units of `x` with those of `factor`."""
        return self.int8.dot(total, self.int8.operand(x), (factor,))

    def _exponentiate(self) -> None:
        """p and its sums. Where all scores are -inf the difference is to LOWEST: never NaN."""
        n = self.lanes
        highest = [keep(higher(splat(LOWEST, n), self.highest[at])) for at in self.at]
        bits = 32 // self.unit
        ones = keep(T.broadcast(T.int32(sum(1 << bits * j for j in range(self.unit))), n))
        for at in self.at:
            T.buffer_store(self.total, self._zeros(), [at])
        with loop(*self._units()) as unit:
            for i, at in enumerate(self.at):
                word = self._zeros()
                for j in range(self.unit):
                    where = ramp((unit * self.unit + j) * self.width + i * n, n)
                    p = self._probability(self.s.scratch[where], highest[i])
                    shifted = T.shift_left(p, T.broadcast(T.int32(bits * j), n))
                    word = keep(T.bitwise_or(word, shifted))
                self._store_words(self.p0 + unit * self.width + i * n, word)
                T.buffer_store(self.total, self._dot(self.total[at], word, ones), [at])

    def _units(self) -> tuple[Any, Any]:
        """The units of rows of scores that hold keys."""
        first, last = self.start - self.row0, self.stop - self.row0 + (self.unit - 1)
        return keep(div(first, self.unit)), keep(div(last, self.unit))

    def _probability(self, bits: Any, highest: Any) -> Any:
        """rint(255 * 2**(score - highest)) as int32; 0 for -inf."""
        power = keep(T.reinterpret(f"float32x{self.lanes}", bits) - highest)
        return keep(self.int8.to_integer(self._exp2(power)))

    def _exp2(self, power: Any) -> Any:
        """255 * 2**power; 0 for -inf."""
        return keep(self.v.scale(horner(self.v, fraction(power), EXP2), power))

    def _compute_context(self) -> None:
        self._prepare_results()
        in_steps(const(0), self.s["head_size"], self.steps, self._context_channels)

    def _prepare_results(self) -> None:
        """The factor of each query: 0 where all its scores are -inf."""
        s, n = self.s, self.lanes
        for at in self.at:
            total = keep(T.cast(self.total[at], f"float32x{n}"))
            share = T.Select(total == splat(0.0, n), splat(0.0, n), splat(s["v_scale"], n) / total)
            T.buffer_store(self.inverse, share, [at])
        if self.result == "u8":
            self.packer = Packer.of(self.v, "uint8", s["inverse"], s["zero_point"])

    def _context_channels(self, channel: Any, rows: int) -> None:
        acc = self._sums_from([self._zeros()] * rows)
        words = WIDTH // self.unit
        with loop(self.first_panel, div(self.stop - 1, WIDTH) + 1) as panel:
            first, last = self._lanes_of(panel)
            values = (panel - self.first_panel) * self.s["head_size"] + channel
            values = keep(self.v0 + values * words)
            unit0 = keep(panel * words - div(self.row0, self.unit))
            with loop(div(first, self.unit), div(last, self.unit)) as unit:
                p = self.p0 + (unit0 + unit) * self.width
                self._accumulate(acc, p, [values + r * words + unit for r in range(rows)])
        self._store_results(channel, [[row[at] for at in self.at] for row in acc])

    def _store_results(self, channel: Any, sums: list[list[Any]]) -> None:
        """y of the channels from `channel` on, from their sums of products."""
        s, n = self.s, self.lanes
        y0 = (div(self.token, WIDTH) * s["heads"] + self.head) * s["head_size"] + channel
        for r, row in enumerate(sums):
            where = (y0 + r) * WIDTH + mod(self.token, WIDTH)
            results = [
                keep(T.cast(value, f"float32x{n}") * self.inverse[at])
                for value, at in zip(row, self.at, strict=True)
            ]
            store_context(s["y"], where, results, n, packer=self.packer, before=self.before)

    def _row(self, operand: str, panel: Any) -> Any:
        """Where this head's first channel of a panel of q, k or v starts."""
        channels, offset = self.s[f"{operand}_channels"], self.s[f"{operand}_offset"]
        return (panel * channels + offset + self.head * self.s["head_size"]) * WIDTH

    def _four_channels(self, operand: str, row: Any) -> list[Any]:
        at = [ramp(row + i * WIDTH, WIDTH) for i in range(QUAD)]
        return [keep(self.s[operand][a]) for a in at]

    def _signed(self, value: Any) -> Any:
        """u8 with zero point 128 as s8."""
        return T.bitwise_xor(value, T.broadcast(tirx.const(128, "uint8"), WIDTH))

    def _store_words(self, where: Any, words: Any) -> None:
        T.buffer_store(self.s.scratch, words, [ramp(where, self.lanes)])

    def _zeros(self) -> Any:
        return T.broadcast(T.int32(0), self.lanes)


def _scaled(mask: Any, lanes: int) -> Any:
    """Values of a mask over ln(2). The lowest float stays: it would be -inf, which is no key."""
    mask = keep(mask)
    if lanes == 1:
        lowest, factor = T.float32(_NOT_SCALED), T.float32(_LOG2_E)
    else:
        lowest, factor = splat(_NOT_SCALED, lanes), splat(_LOG2_E, lanes)
    return keep(T.Select(mask < lowest, mask, mask * factor))


def fraction(x: Any) -> Any:
    """x - floor(x) of 16 floats, 0 for an infinity."""
    every, rounding = tirx.const(-1, "int16"), tirx.const(4, "int32")
    name = "llvm.x86.avx512.mask.reduce.ps.512"
    mode = tirx.const(_FLOOR, "int32")
    return keep(
        T.call_llvm_pure_intrin("float32x16", name, x, mode, splat(0.0, 16), every, rounding)
    )
