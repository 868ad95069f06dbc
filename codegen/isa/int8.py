"""What differs between int8 instruction sets: the hooks that int8 kernels are written over.

A channel of `chunk` tokens is one vector of bytes. Unpacking four channels gives four *tiles* of
quads: each 32-bit lane holds four channels of one token. Lane c of tile t is then token
(c / 4) * 16 + 4 t + c % 4 of the chunk: *tile order*. Saturating packs undo it. The narrow form
of an instruction set has fewer tiles, and an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen.isa.amx import AMX_FEATURES
from sparsec.codegen.isa.avx2 import AVX2
from sparsec.codegen.isa.avx512 import AVX512
from sparsec.codegen.isa.vector import VectorIsa, fence, keep, shuffle, shuffle_of
from sparsec.codegen.tir import EXPAND
from sparsec.ir.op_spec import Array
from sparsec.target import Isa, Target

TILES = 4
_WORDS = 4  # 32-bit words of 128 bits
_LANE = 16  # bytes: unpacks and packs work within 128 bits
_CURRENT_ROUNDING = 4


@dataclass(frozen=True, slots=True)
class Int8Isa:
    """An instruction set that multiplies u8 by s8 into int32, over the floats of `vector`.

    `words(w)` turns int8 `[..., 4]` into the int32 words `[..., n]` that a kernel broadcasts;
    `operand` prepares a tile of quads, and `dot(sum, operand, words)` adds four products to each
    lane. A register block has `columns` of the `tiles` of a chunk. `to_integer` rounds half to
    even, and gives the least int32 for what no int32 can hold.

    `interleave` makes tiles of quads from four channels of a chunk. `to_tokens` turns tile order
    into token order, as vectors of neighbouring tokens, and `to_tiles` turns it back. `pack` is
    tiles of int32 plus a zero point, clamped to u8 in token order. `narrow` is the form for
    panels that hold no more tokens than its chunk.
    """

    isa: Isa
    vector: VectorIsa
    features: tuple[str, ...]
    columns: int
    words: Callable[[Array], Array]
    operand: Callable[[Any], tuple[Any, ...]]
    dot: Callable[[Any, tuple[Any, ...], tuple[Any, ...]], Any]
    to_integer: Callable[[Any], Any]
    interleave: Callable[[list[Any]], list[Any]]
    pack: Callable[[list[Any], Callable[[Any], Any]], Any]
    to_tokens: Callable[[list[Any]], list[Any]]
    to_tiles: Callable[[list[Any]], list[Any]]
    tiles: int = TILES
    narrow: Int8Isa | None = None

    @property
    def name(self) -> str:
        return self.isa.value

    @property
    def lanes(self) -> int:
        """Tokens of a tile."""
        return self.vector.lanes

    @property
    def chunk(self) -> int:
        """Tokens of all tiles."""
        return self.tiles * self.vector.lanes

    @property
    def limits(self) -> tuple[int, ...]:
        """The chunks of the narrow forms, widest first."""
        return () if self.narrow is None else (self.narrow.chunk, *self.narrow.limits)

    def form_for(self, tokens: int) -> Int8Isa:
        """The narrowest form that holds as many tokens in a chunk."""
        if self.narrow is None or self.narrow.chunk < tokens:
            return self
        return self.narrow.form_for(tokens)

    @property
    def words_per_quad(self) -> int:
        return int(self.words(np.zeros((1, 4), np.int8)).shape[-1])


def _call(dtype: str, name: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(dtype, name, *args)


def _lanes(vector: Any) -> int:
    return int(str(vector.ty.dtype).partition("x")[2])


def _unpack(a: Any, b: Any, unit: int, high: bool) -> Any:
    """Pieces of `unit` bytes of a and b in turns, from one half of each 128 bits."""
    return shuffle(a, b, _unpack_order(_lanes(a), _LANE, unit, high))


def _unpack_order(size: int, lane: int, unit: int, high: bool) -> list[int]:
    """Of vectors of `size` elements, `lane` of them in 128 bits."""
    order = []
    for start in range(lane // 2 * high, size, lane):
        for piece in range(start, start + lane // 2, unit):
            order += [*range(piece, piece + unit), *range(size + piece, size + piece + unit)]
    return order


def _interleave(channels: list[Any]) -> list[Any]:
    """Four tiles from four vectors: 8 unpacks."""
    a, b, c, d = channels
    tiles = []
    for high in (False, True):
        first, second = keep(_unpack(a, b, 1, high)), keep(_unpack(c, d, 1, high))
        for upper in (False, True):
            tile = _unpack(first, second, 2, upper)
            tiles.append(keep(T.reinterpret(f"int32x{_lanes(tile) // 4}", tile)))
    return tiles


def add_saturating(x: Any, y: Any) -> Any:
    """Sum of two vectors of int16 that does not wrap around."""
    return keep(_call(str(x.ty.dtype), f"llvm.sadd.sat.v{_lanes(x)}i16", x, y))


def _pack(names: tuple[str, str], tiles: list[Any], finish: Callable[[Any], Any]) -> Any:
    """Four tiles as one vector: 3 packs."""
    lanes = _lanes(tiles[0])
    words, bytes_ = names
    halves = [
        finish(keep(_call(f"int16x{2 * lanes}", words, tiles[i], tiles[i + 1]))) for i in (0, 2)
    ]
    return _call(f"uint8x{4 * lanes}", bytes_, *halves)


def _quarters(a: Any, b: Any, lanes: list[int]) -> Any:
    """128-bit lanes of the concatenation of two vectors of 32-bit lanes."""
    return keep(shuffle(a, b, [4 * lane + i for lane in lanes for i in range(4)]))


def _whole_word(w: Array) -> Array:
    """Four bytes as they are: one word."""
    return np.ascontiguousarray(w, np.int8).view("<i4")


def _as_it_is(x: Any) -> tuple[Any, ...]:
    return (T.reinterpret("uint8x64", x),)


def _vpdpbusd(total: Any, x: tuple[Any, ...], words: tuple[Any, ...]) -> Any:
    weights = T.reinterpret("int8x64", words[0])
    return _call("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, x[0], weights)


def _to_integer_512(x: Any) -> Any:
    zero, mask = T.broadcast(T.int32(0), 16), tirx.const(-1, "int16")
    rounding = tirx.const(_CURRENT_ROUNDING, "int32")
    return _call("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", x, zero, mask, rounding)


def _transpose_4x4(v: list[Any]) -> list[Any]:
    """128-bit lanes of four vectors transposed: its own inverse."""
    low = [_quarters(v[i], v[i + 1], [0, 1, 4, 5]) for i in (0, 2)]
    high = [_quarters(v[i], v[i + 1], [2, 3, 6, 7]) for i in (0, 2)]
    return [
        _quarters(left, right, lanes)
        for left, right in (low, high)
        for lanes in ([0, 2, 4, 6], [1, 3, 5, 7])
    ]


def transpose_words(v: list[Any]) -> list[Any]:
    """Words of four vectors transposed within 128 bits: 8 unpacks.

    Part p of vector j of the result is word j of part p of each of the four.
    """
    low, high = (
        [keep(_unpack_words(v[i], v[i + 1], 1, part)) for i in (0, 2)] for part in (False, True)
    )
    return [keep(_unpack_words(a, b, 2, part)) for a, b in (low, high) for part in (False, True)]


def _unpack_words(a: Any, b: Any, unit: int, high: bool) -> Any:
    """`_unpack` of vectors of words, in pieces of `unit` words."""
    return shuffle(a, b, _unpack_order(_lanes(a), _LANE // 4, unit, high))


def _interleave_32(channels: list[Any]) -> list[Any]:
    """Two tiles from four halves of vectors: 2 joins and 6 shuffles.

    Lane c of tile t is token (c / 8) * 8 + (c / 4 % 2) * 16 + 4 t + c % 4.
    """
    a, b, c, d = channels
    left, right = (_joined(*pair) for pair in ((a, c), (b, d)))
    low, high = (
        keep(T.reinterpret("int32x16", _unpack(left, right, 1, part))) for part in (False, True)
    )
    ab, cd = (
        keep(T.reinterpret("uint8x64", _quarters(low, high, lanes)))
        for lanes in ([0, 1, 4, 5], [2, 3, 6, 7])
    )
    return [keep(T.reinterpret("int32x16", _unpack(ab, cd, 2, part))) for part in (False, True)]


def _permute_32(channels: list[Any]) -> list[Any]:
    """Two tiles, their lanes in token order, from four halves of vectors, with VBMI.

    On Intel 2 joins of memory, which are not for the port of the shuffles, and 4 times that port,
    not 6: there it is what a step of tiles waits for. Vector instructions need other ports as
    well, and gain nothing.
    """
    a, b, c, d = channels
    pairs = _joined(a, b), _joined(c, d)
    orders = (
        [32 * channel + 16 * tile + token for token in range(16) for channel in range(4)]
        for tile in range(2)
    )
    # A fence, as LLVM splits bytes that are shuffled and stored into 16 unpacks.
    return [fence(T.reinterpret("int32x16", keep(shuffle(*pairs, order)))) for order in orders]


def _joined(a: Any, b: Any) -> Any:
    """Two vectors one after the other."""
    return keep(shuffle(a, b, list(range(2 * _lanes(a)))))


def _pack_32(order: list[int], tiles: list[Any], finish: Callable[[Any], Any]) -> Any:
    """Two tiles as half a vector: the words `order` of the packs' result.

    The upper half of each 128 bits of that is a copy.
    """
    words = keep(T.reinterpret("int32x16", _pack(_PACKS_512, tiles * 2, finish)))
    return T.reinterpret("uint8x32", keep(shuffle_of([words], order)))


def _swap_32(v: list[Any]) -> list[Any]:
    """Tile order of two tiles to token order, and back."""
    return [_quarters(v[0], v[1], lanes) for lanes in ([0, 4, 2, 6], [1, 5, 3, 7])]


def _interleave_16(channels: list[Any]) -> list[Any]:
    """One tile, its lanes in token order, from four quarters of vectors: 3 joins, 2 shuffles."""
    a, b, c, d = channels
    four = fence(T.reinterpret("int32x16", _joined(_joined(a, b), _joined(c, d))))
    order = [_WORDS * channel + word for word in range(_WORDS) for channel in range(4)]
    words = T.reinterpret("uint8x64", fence(shuffle_of([four], order)))
    lanes = range(0, 4 * _LANE, _LANE)
    bytes_ = [
        lane + _WORDS * channel + i for lane in lanes for i in range(4) for channel in range(4)
    ]
    return [keep(T.reinterpret("int32x16", keep(shuffle_of([keep(words)], bytes_))))]


def _pack_16(tiles: list[Any], finish: Callable[[Any], Any]) -> Any:
    """One tile as a quarter of a vector."""
    words = keep(T.reinterpret("int32x16", _pack(_PACKS_512, tiles * 4, finish)))
    return T.reinterpret("uint8x16", keep(shuffle_of([words], [0, 4, 8, 12])))


def _as_they_are(v: list[Any]) -> list[Any]:
    return v


_PACKS_512 = ("llvm.x86.avx512.packssdw.512", "llvm.x86.avx512.packuswb.512")
_PACKS_256 = ("llvm.x86.avx2.packssdw", "llvm.x86.avx2.packuswb")

_FOUR_TILES = Int8Isa(
    Isa.AVX512_VNNI,
    AVX512,
    (*AVX512.features, "+avx512vnni"),
    columns=TILES,
    words=_whole_word,
    operand=_as_it_is,
    dot=_vpdpbusd,
    to_integer=_to_integer_512,
    interleave=_interleave,
    pack=partial(_pack, _PACKS_512),
    to_tokens=_transpose_4x4,
    to_tiles=_transpose_4x4,
)
_TWO_TILES = replace(
    _FOUR_TILES,
    columns=2,
    tiles=2,
    interleave=_interleave_32,
    pack=partial(_pack_32, [0, 1, 8, 9, 4, 5, 12, 13]),
    to_tokens=_swap_32,
    to_tiles=_swap_32,
)
_ONE_TILE = replace(
    _FOUR_TILES,
    columns=1,
    tiles=1,
    interleave=_interleave_16,
    pack=_pack_16,
    to_tokens=_as_they_are,
    to_tiles=_as_they_are,
)
AVX512_VNNI = replace(_FOUR_TILES, narrow=replace(_TWO_TILES, narrow=_ONE_TILE))

# Few tokens, with `expand` for weights that are stored without their zeros.
AVX512_VBMI2 = replace(
    _ONE_TILE, isa=Isa.AVX512_VBMI2, features=(*AVX512_VNNI.features, "+avx512vbmi2")
)


def expand(mask: Any, values: Any) -> Any:
    """16 words whose bytes are the next of u8x64 `values` where the bits of an int64 are set."""
    return T.call_pure_extern("int32x16", EXPAND, mask, values)


def _even_and_odd_words(w: Array) -> Array:
    """Bytes 0 and 2, and bytes 1 and 3, as two int16 each: two words."""
    pairs = np.stack([w[..., 0::2], w[..., 1::2]], axis=-2).astype("<i2")
    return np.ascontiguousarray(pairs).view("<i4")[..., 0]


def _even_and_odd(x: Any) -> tuple[Any, ...]:
    pairs = keep(T.reinterpret("uint16x16", x))
    even = T.bitwise_and(pairs, T.broadcast(tirx.const(0xFF, "uint16"), 16))
    odd = T.shift_right(pairs, T.broadcast(tirx.const(8, "uint16"), 16))
    return keep(even), keep(odd)


def _two_pmaddwd(total: Any, x: tuple[Any, ...], words: tuple[Any, ...]) -> Any:
    """Exact: unlike `vpmaddubsw`, which saturates, this multiplies int16 into int32."""
    for half, word in zip(x, words, strict=True):
        operands = (T.reinterpret("int16x16", v) for v in (half, word))
        total = total + _call("int32x8", "llvm.x86.avx2.pmadd.wd", *operands)
    return total


def _to_integer_256(x: Any) -> Any:
    return _call("int32x8", "llvm.x86.avx.cvt.ps2dq.256", x)


def _to_tokens_256(v: list[Any]) -> list[Any]:
    return [_quarters(v[i], v[i + 1], [n, n + 2]) for n in (0, 1) for i in (0, 2)]


def _to_tiles_256(v: list[Any]) -> list[Any]:
    return [_quarters(v[i], v[i + 2], [n, n + 2]) for i in (0, 1) for n in (0, 1)]


AVX2_INT8 = Int8Isa(
    Isa.AVX2,
    AVX2,
    AVX2.features,
    columns=2,
    words=_even_and_odd_words,
    operand=_even_and_odd,
    dot=_two_pmaddwd,
    to_integer=_to_integer_256,
    interleave=_interleave,
    pack=partial(_pack, _PACKS_256),
    to_tokens=_to_tokens_256,
    to_tiles=_to_tiles_256,
)

# Tiles are multiplied by `isa.amx`; all else is as with vectors.
AMX_INT8 = replace(
    AVX512_VNNI,
    isa=Isa.AMX,
    features=(*AVX512_VNNI.features, *AMX_FEATURES),
    narrow=replace(
        _TWO_TILES,
        isa=Isa.AMX,
        interleave=_permute_32,
        pack=partial(_pack_32, [0, 4, 8, 12, 1, 5, 9, 13]),
        to_tokens=_as_they_are,
        to_tiles=_as_they_are,
    ),
)

INT8_ISAS: tuple[Int8Isa, ...] = (AVX2_INT8, AVX512_VNNI, AMX_INT8)  # weakest first


def int8_isas(target: Target) -> tuple[Int8Isa, ...]:
    """Those whose kernels may be the fastest, the strongest first.

    AMX does not replace the vectors: tiles of few rows cost as much as those of 8.
    """
    found = [i for i in reversed(INT8_ISAS) if target.has(i.isa)]
    return tuple(found[: 2 if found[:1] == [AMX_INT8] else 1])


def int8_isa(name: str) -> Int8Isa:
    """The entry of INT8_ISAS whose level has this name."""
    return next(v for v in INT8_ISAS if v.name == name)
