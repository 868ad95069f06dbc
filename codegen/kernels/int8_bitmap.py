"""`linear_int8` for few tokens by weights without their zeros: a bit for every weight.

Few tokens compute little for each weight, and reading the weights takes the time. So their zeros
are not stored: 64 weights, 16 rows (output channels) by a quad of input channels, are a mask of
64 bits and the bytes of those that are not zero, which `vpexpandb` puts into their places. At
80 % zeros that is a third of the bytes of a dense weight. Zeros are multiplied all the same.

Rows lie in the lanes, and the quad of a token is broadcast: with tokens in the lanes, as in
int8_dots, most lanes would be empty. A register block is `CASES[tokens]` groups of 16 rows by all
tokens. Each group has its own stream of masks and bytes, which is read once. The sums of a
register block are transposed through scratch memory for the epilogue, which goes by rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.int8 import AVX512_VBMI2, expand
from sparsec.codegen.isa.vector import keep, ramp, shuffle, splat
from sparsec.codegen.kernels.int8_epilogue import Epilogue
from sparsec.codegen.kernels.int8_gemm import Int8Gemm
from sparsec.codegen.kernels.int8_pack import QUAD
from sparsec.codegen.kernels.panels import WIDTH, const, loop
from sparsec.codegen.program import Kind, Parameter
from sparsec.ir.op_spec import Array

LANES = 16  # rows of a group
GROUPS = 4  # of a block of rows: what one item computes
ROWS = LANES * GROUPS
MOST_TOKENS = 16
CELL = LANES * QUAD  # weights of a mask
# Up to so many tokens: groups of rows in a register block. At least 4 sums hide the latency of a
# multiply-add, and 24 leave registers for the rest. More groups share the broadcasts.
CASES = {1: 4, 2: 4, 4: 4, 6: 4, 8: 2, 12: 2, 16: 1}
_SUMS = 32 * LANES  # int32 of a register block, its tokens up to a power of two
# Where scratch memory has the places of a register block's groups in their streams. On the stack,
# TVM would put each of them into a vector, whose element is slow to read and to change.
_PLACES = _SUMS + LANES


@dataclass(frozen=True, slots=True, eq=False)
class BitmapWeight:
    """`masks[group][quad]`; group g has `values[starts[g]:starts[g + 1]]`, quad after quad.

    Bit 4 r + c of a mask is row r of the group and channel c of the quad. 64 bytes past any value
    can be read.
    """

    values: Array
    masks: Array
    starts: Array

    @property
    def arrays(self) -> dict[str, Array]:
        """By name, as a kernel takes them."""
        return {"values": self.values, "masks": self.masks, "starts": self.starts}


def pack_bitmap(w: Array) -> BitmapWeight:
    """int8 `w[m, k]`, with zeros up to whole blocks of rows and whole quads."""
    m, k = w.shape
    whole = np.pad(w.astype(np.int8), ((0, -m % ROWS), (0, -k % QUAD)))
    cells = whole.reshape(len(whole) // LANES, LANES, -1, QUAD).transpose(0, 2, 1, 3)
    flat = np.ascontiguousarray(cells).reshape(len(cells), -1, CELL)
    kept = flat != 0
    masks = np.packbits(kept, axis=-1, bitorder="little").view("<i8")[..., 0]
    lengths = kept.sum(axis=(1, 2))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.concatenate([flat[kept], np.zeros(CELL, np.int8)]).view(np.uint8)
    return BitmapWeight(values, np.ascontiguousarray(masks.reshape(-1)), starts)


class BitmapGemm(Int8Gemm):
    """For one epilogue and at most `MOST_TOKENS` tokens; an item is `ROWS` rows."""

    __slots__ = ()

    @staticmethod
    def of(epilogue: Epilogue) -> BitmapGemm:
        return BitmapGemm(AVX512_VBMI2, "bitmap", ROWS, False, epilogue, MOST_TOKENS)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("x", dtype="uint8"),
            Parameter("values", dtype="uint8"),
            Parameter("masks", dtype="int64"),
            Parameter("starts", dtype="int32"),
            Parameter("offset", dtype="int32"),
            *self.epilogue.pointers,
            *(Parameter(n, Kind.INT) for n in ("tokens", "m", "k")),
            *self.epilogue.numbers,
        )

    @property
    def _area(self) -> int:
        """After the sums of a register block, of which a row is read with what follows it, and
        the places in the streams."""
        return _PLACES + LANES

    def scratch_bytes(self, k: int, group: int = 1, most_steps: int = 0) -> int:
        return 4 * (self._area + -(-k // QUAD) * MOST_TOKENS + LANES)

    def _body(self, s: tir.KernelScope) -> None:
        fewer = 0
        for tokens, groups in CASES.items():
            is_case = T.And(s["tokens"] > fewer, s["tokens"] <= tokens)
            with T.If(is_case), T.Then():
                self._copy(s, tokens)
                with loop(s.begin, s.end) as block, loop(0, GROUPS // groups) as part:
                    first = keep(block * GROUPS + part * groups)
                    with T.If(first * LANES < s["m"]), T.Then():
                        self._register_block(s, first, groups, tokens)
            fewer = tokens

    def _copy(self, s: tir.KernelScope, tokens: int) -> None:
        """The panel as `[quad][token]`; what a store writes past a quad, the next one replaces."""
        with loop(0, self._quads(s)) as quad:
            channels = [T.min(quad * QUAD + i, s["k"] - 1) for i in range(QUAD)]
            tiles = self.hooks.interleave(self._load(s, const(0), const(0), channels))
            self._store_tiles(s, tiles, keep(quad * tokens + self._area))

    def _register_block(self, s: tir.KernelScope, first: Any, groups: int, tokens: int) -> None:
        """`groups` groups of rows from `first` on, for all tokens."""
        row0, quads, lanes = keep(first * LANES), keep(self._quads(s)), ramp(0, LANES)
        sums = [[tir.registers("int32", LANES) for _ in range(tokens)] for _ in range(groups)]
        for g, group in enumerate(sums):
            T.buffer_store(s.scratch, s["starts"][first + g], [const(_PLACES + g)])
            offset = keep(s["offset"][ramp(row0 + g * LANES, LANES)])
            for total in group:
                T.buffer_store(total, offset, [lanes])
        with loop(0, quads) as quad:
            words = [
                self._words(s, const(_PLACES + g), keep(s["masks"][(first + g) * quads + quad]))
                for g in range(groups)
            ]
            x0 = keep(quad * tokens + self._area)
            for t in range(tokens):
                (x,) = self.hooks.operand(keep(splat(s.scratch[x0 + t], LANES)))
                for group, word in zip(sums, words, strict=True):
                    value = self.hooks.dot(group[t][lanes], (x,), (word,))
                    T.buffer_store(group[t], value, [lanes])
        for g, group in enumerate(sums):
            rows = _by_rows([total[lanes] for total in group])
            self._store_tiles(s, rows, const(g * LANES * len(rows)))
        self._finish(s, row0, groups * LANES, tokens)

    def _words(self, s: tir.KernelScope, place: Any, mask: Any) -> Any:
        """The next 64 weights of a group."""
        at = keep(s.scratch[place])
        T.buffer_store(s.scratch, at + T.cast(T.popcount(mask), "int32"), [place])
        return keep(expand(mask, keep(s["values"][ramp(T.cast(at, "int64"), CELL)])))

    def _finish(self, s: tir.KernelScope, row0: Any, count: int, tokens: int) -> None:
        """The epilogue of the sums that `_by_rows` has left at the start of scratch memory.

        Lanes past the tokens are of other rows.
        """
        stride = _power_of_two(tokens)
        convert = self.epilogue.sums(s, self.hooks, const(0))
        with loop(0, T.min(const(count), s["m"] - row0)) as r:
            row = keep(row0 + r)
            sums = [keep(s.scratch[ramp(r * stride, LANES)])]
            self.epilogue.emit(s, self.hooks, convert(sums), row, keep(row * WIDTH))


def _power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _by_rows(sums: list[Any]) -> list[Any]:
    """`[token][row]` to `[row][token]`, as vectors that follow one another.

    Tokens are filled up to a power of two. A perfect shuffle takes the upper bit of the token to
    the end of the index; as many as the token has bits do it.
    """
    count = _power_of_two(len(sums))
    found = [keep(v) for v in sums]
    found += found[: count - len(sums)]
    half = LANES // 2
    low = [i for pair in zip(range(half), range(LANES, LANES + half), strict=True) for i in pair]
    for _ in range(count.bit_length() - 1):
        pairs = list(zip(found[: count // 2], found[count // 2 :], strict=True))
        found = [
            keep(shuffle(a, b, [i + start for i in low])) for a, b in pairs for start in (0, half)
        ]
    return found
