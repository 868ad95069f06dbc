"""Weights as an ELF object: one read-only section that the linker copies into the library.

The object is written directly, array after array: no assembler reads the weights, no second copy
of them is in memory, and equal arrays are stored once.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparsec.codegen.program import Weight

SYMBOL = "sparsec_weights"
ALIGNMENT = 64  # of every weight: a cache line and a 512-bit register
PAGE = 4096  # alignment of the section: weights share no page with code or tables

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class WeightBlob:
    """Where each weight lies: byte offsets from `SYMBOL`, in the order of the weights."""

    offsets: tuple[int, ...]
    nbytes: int
    digest: str  # BLAKE2b-128 of the blob, hexadecimal


def stored(weights: Sequence[Weight], blob: WeightBlob) -> dict[int, int]:
    """By offset the bytes of what is stored of the weights: equal ones once, without padding."""
    return {o: w.data.nbytes for o, w in zip(blob.offsets, weights, strict=True)}


def write_weights(weights: Sequence[Weight], path: Path) -> WeightBlob:
    """An ELF64 object at `path` that defines `SYMBOL`; the same weights give the same bytes."""
    stored: dict[tuple[int, bytes, bytes], list[tuple[int, int]]] = {}
    offsets: list[int] = []
    digest = hashlib.blake2b(digest_size=16)
    nbytes = 0
    with path.open("wb") as file:
        file.write(_file_header().ljust(PAGE, b"\0"))
        for index, weight in enumerate(weights):
            raw = _bytes_of(weight)
            candidates = stored.setdefault(_likeness(raw), [])
            same = [o for i, o in candidates if np.array_equal(_bytes_of(weights[i]), raw)]
            if same:
                offsets.append(same[0])
                continue
            candidates.append((index, nbytes))
            offsets.append(nbytes)
            nbytes += _write_padded(file, raw, digest)
        file.write(_tables(nbytes))
        file.seek(0)
        file.write(_file_header(PAGE + nbytes + len(_tables(nbytes)) - len(_SECTIONS) * 64))
    return WeightBlob(tuple(offsets), nbytes, digest.hexdigest())


def _bytes_of(weight: Weight) -> Bytes:
    data = np.ascontiguousarray(weight.data, weight.data.dtype.newbyteorder("<"))
    return data.reshape(-1).view(np.uint8)


def _likeness(raw: Bytes) -> tuple[int, bytes, bytes]:
    """Equal for equal arrays, and nearly always different for others: cheaper than a hash."""
    return raw.size, raw[:PAGE].tobytes(), raw[-PAGE:].tobytes()


def _write_padded(file: BinaryIO, raw: Bytes, digest: hashlib.blake2b) -> int:
    padding = bytes(-raw.size % ALIGNMENT)
    for part in (raw.data, padding):
        file.write(part)
        digest.update(part)
    return int(raw.size) + len(padding)


# The records of an ELF-64 relocatable object (System V ABI, "Object Files"). `.lrodata` is
# read-only data that may be over 2 GB away from code: linkers put it where it separates nothing.
_SECTIONS = ("", f".lrodata.{SYMBOL}", ".symtab", ".strtab", ".note.GNU-stack")
_STRINGS = b"".join(name.encode() + b"\0" for name in (*_SECTIONS, SYMBOL))
_PROGBITS, _SYMTAB, _STRTAB = 1, 2, 3
_ALLOC, _LARGE = 2, 1 << 28  # SHF_ALLOC, SHF_X86_64_LARGE
_GLOBAL_OBJECT = 1 << 4 | 1
_HIDDEN = 2


def _name(text: str) -> int:
    return _STRINGS.index(b"\0" + text.encode() + b"\0") + 1 if text else 0


def _file_header(section_table: int = 0) -> bytes:
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian, version 1
    relocatable, x86_64, version = 1, 62, 1
    sizes = (64, 0, 0, 64, len(_SECTIONS), _SECTIONS.index(".strtab"))
    return ident + struct.pack(
        "<HHIQQQIHHHHHH", relocatable, x86_64, version, 0, 0, section_table, 0, *sizes
    )


def _tables(nbytes: int) -> bytes:
    """All that follows the blob: symbols, strings, section headers."""
    symbols = bytes(24) + struct.pack(
        "<IBBHQQ", _name(SYMBOL), _GLOBAL_OBJECT, _HIDDEN, 1, 0, nbytes
    )
    strings = _STRINGS.ljust(-(-len(_STRINGS) // 8) * 8, b"\0")
    at = PAGE + nbytes
    headers = (
        bytes(64),
        _section(1, _PROGBITS, _ALLOC | _LARGE, PAGE, nbytes, align=PAGE),
        # its string table is section 3; symbol 1 is the first that is not local
        _section(2, _SYMTAB, 0, at, len(symbols), link=3, info=1, align=8, entry=24),
        _section(3, _STRTAB, 0, at + len(symbols), len(_STRINGS)),
        _section(4, _PROGBITS, 0, at, 0),
    )
    return symbols + strings + b"".join(headers)


def _section(
    index: int,
    kind: int,
    flags: int,
    offset: int,
    size: int,
    *,
    link: int = 0,
    info: int = 0,
    align: int = 1,
    entry: int = 0,
) -> bytes:
    name = _name(_SECTIONS[index])
    return struct.pack("<IIQQQQIIQQ", name, kind, flags, 0, offset, size, link, info, align, entry)
