"""Kernels by themselves: a library of them, arrays as they want them, calls timed in turns."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.codegen import tir
from sparsec.codegen.isa import FEATURES
from sparsec.codegen.probes import Probe
from sparsec.codegen.program import Kernel, Kind
from sparsec.codegen.toolchain import link_kernels
from sparsec.target import Isa, may_use_tiles

Array = np.ndarray[Any, Any]
C_TYPES = {Kind.POINTER: ctypes.c_void_p, Kind.INT: ctypes.c_int64, Kind.FLOAT: ctypes.c_float}
PEAK_ITEMS, PEAK_ROUNDS = 200_000, 10


@dataclass
class Candidate:
    """One call to time: `work` multiply-accumulates, of a sparse weight those of its blocks; of
    kernels without products, elements."""

    name: str
    call: Callable[[], Any]
    work: float
    seconds: list[float] = field(default_factory=list)


class Library:
    """Kernels in one shared library in `folder`, which holds no other: they are known by path."""

    def __init__(self, kernels: Sequence[Kernel], isa: Isa, folder: Path):
        if isa is Isa.AMX and not may_use_tiles():
            raise SystemExit("this system does not permit the use of AMX")
        path = folder / "kernels.so"
        link_kernels([tir.build_object([k.build() for k in kernels], FEATURES[isa])], path)
        self.library = ctypes.CDLL(str(path))

    def bind(
        self, kernel: Kernel, args: Sequence[Any], items: int, scratch_bytes: int = 0
    ) -> Callable[[], int]:
        """A call on arrays and numbers, for all items; it returns the kernel's status."""
        function = getattr(self.library, kernel.name)
        types = [C_TYPES[p.kind] for p in kernel.parameters]
        function.argtypes = types + [ctypes.c_void_p] * kernel.has_scratch + [ctypes.c_int64] * 2
        scratch = aligned(np.zeros(scratch_bytes, np.uint8))
        values = [
            a.ctypes.data if isinstance(a, np.ndarray) else a
            for a, _ in zip(args, kernel.parameters, strict=True)
        ]
        values += [scratch.ctypes.data] if kernel.has_scratch else []

        def call(kept: Any = (args, scratch)) -> int:
            """`kept` lets the arrays live as long as the call."""
            return int(function(*values, 0, items))

        return call


def aligned(array: Array) -> Array:
    """A copy at a multiple of 64 bytes."""
    raw = np.zeros(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def floats(*shape: int) -> Array:
    """Random numbers between -1 and 1, aligned."""
    return aligned(np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32))


def measure(candidates: Sequence[Candidate], rounds: int) -> None:
    """Fills in `seconds`, in turns."""
    for c in candidates:
        c.call()
    for _ in range(rounds):
        for c in candidates:
            start = time.perf_counter()
            c.call()
            c.seconds.append(time.perf_counter() - start)


def peak_rate(library: Library, probe: Probe, x: Array) -> float:
    """Multiply-accumulates per second of a probe that does nothing else; it reads `x`."""
    call = library.bind(probe, [x, floats(1024), 0], PEAK_ITEMS)
    peak = Candidate("peak", call, probe.work * PEAK_ITEMS)
    measure([peak], PEAK_ROUNDS)
    return peak.work / min(peak.seconds)
