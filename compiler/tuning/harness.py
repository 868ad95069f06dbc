"""Runs and times kernel calls without a model around them: the Python side of harness.c."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.codegen.program import BufferRef, KernelCall, Kind
from sparsec.codegen.toolchain import RUNTIME, find_toolchain
from sparsec.errors import CompilerError, NoSchedule
from sparsec.ir.dims import evaluate
from sparsec.ir.op_spec import Array

SOURCES = ("parallel.c", "parallel.h", "topology.c", "topology.h")
ENTRY = "run_candidates"
MOST_INTEGERS = 37  # with scratch, begin and end: INTEGERS of harness.c
MOST_FLOATS = 8
LINE = 64
HUGE_PAGE = 2 << 20


class _Call(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p),
        ("integers", ctypes.c_int64 * (MOST_INTEGERS + 3)),
        ("count", ctypes.c_int64),
        ("floats", ctypes.c_float * MOST_FLOATS),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
        ("items", ctypes.c_int64),
        ("grain", ctypes.c_int64),
    )


class _Candidate(ctypes.Structure):
    _fields_ = (("calls", ctypes.POINTER(_Call)), ("count", ctypes.c_int64))


class _Memory(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_void_p), ("count", ctypes.c_int64))


@dataclass(frozen=True, slots=True)
class BoundCalls:
    """The kernel calls of one candidate with their arguments; `kept` is what those point to."""

    candidate: _Candidate
    kept: tuple[Any, ...]


def aligned(array: Array) -> Array:
    """A copy at a multiple of 64 bytes, followed by a line that kernels may fetch."""
    raw = np.zeros(array.nbytes + 2 * LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def arena(sizes: Sequence[int]) -> list[Array]:
    """Buffers of so many bytes, zeros, one behind the other: in memory like that of a model.

    Large pages, where the system has some: where small ones happen to lie sets the time else.
    """
    places = [0, *accumulate(-(-size // LINE) * LINE + LINE for size in sizes)]
    memory = mmap.mmap(-1, places[-1] + 2 * HUGE_PAGE)
    with contextlib.suppress(OSError):  # a kernel that is built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    return [raw[start + p : start + p + n] for p, n in zip(places, sizes, strict=False)]


class Harness:
    """The library that `build_harness` made, for `threads` workers.

    Each reads `cold_bytes` between timed runs: as much as its caches hold that weights do not
    stay in from one layer to the next.
    """

    def __init__(self, library: Path, threads: int, cold_bytes: int):
        self.threads = threads
        self._cold = np.zeros(cold_bytes, np.uint8)
        self._run = _entry(library)

    def bind(
        self,
        calls: Sequence[KernelCall],
        functions: Mapping[str, int],
        memory: Mapping[BufferRef, Array],
        env: Mapping[str, int],
    ) -> BoundCalls:
        """Calls with arguments: `functions` are addresses by kernel name, `memory` is aligned.

        Raises NoSchedule when a kernel has more parameters than the harness can pass.
        """
        made = (_Call * len(calls))()
        scratch = [self._fill(made[i], call, functions, memory, env)
                   for i, call in enumerate(calls)]  # fmt: skip
        return BoundCalls(_Candidate(made, len(calls)), (made, scratch, dict(memory)))

    def run(self, candidate: BoundCalls) -> int:
        """One run; the status of the kernels."""
        return self._call([candidate], 1, [], None)

    def time(self, candidates: Sequence[BoundCalls], repeats: int, warm: Sequence[Array]) -> Array:
        """Seconds `[candidates, repeats]`, taken in turns, with `warm` in the cache.

        Raises CompilerError when a kernel fails.
        """
        seconds = np.zeros((repeats, len(candidates)))
        status = self._call(candidates, repeats, warm, seconds)
        if status:
            raise CompilerError(f"a kernel ended with status {status}")
        return seconds.T

    def _call(
        self,
        candidates: Sequence[BoundCalls],
        repeats: int,
        warm: Sequence[Array],
        seconds: Array | None,
    ) -> int:
        found = (_Candidate * len(candidates))(*(c.candidate for c in candidates))
        hot = (_Memory * len(warm))(*(_Memory(a.ctypes.data, a.nbytes) for a in warm))
        cold = _Memory(self._cold.ctypes.data, self._cold.nbytes)
        into = None if seconds is None else seconds.ctypes.data
        arguments = (found, len(candidates), repeats, ctypes.byref(cold), hot, len(warm), into)
        return int(self._run(self.threads, *arguments))

    def _fill(
        self,
        made: _Call,
        call: KernelCall,
        functions: Mapping[str, int],
        memory: Mapping[BufferRef, Array],
        env: Mapping[str, int],
    ) -> Array:
        """Returns the scratch memory."""
        kernel = call.kernel
        pairs = list(zip(kernel.parameters, call.args, strict=True))
        floats = [float(a) for p, a in pairs if p.kind is Kind.FLOAT]  # type: ignore[arg-type]
        integers = [_integer(a, memory, env) for p, a in pairs if p.kind is not Kind.FLOAT]
        if len(integers) > MOST_INTEGERS or len(floats) > MOST_FLOATS:
            raise NoSchedule(f"{kernel.name}: too many parameters for the tuner's harness")
        per_worker = -(-evaluate(call.scratch_bytes, env) // LINE) * LINE
        scratch = aligned(np.zeros(per_worker * self.threads, np.uint8))
        made.function = functions[kernel.name]
        made.integers[: len(integers)] = integers
        made.count = len(integers)
        made.floats[: len(floats)] = floats
        made.scratch = scratch.ctypes.data if kernel.has_scratch else None
        made.scratch_bytes = per_worker
        made.items, made.grain = evaluate(call.items, env), evaluate(call.grain, env)
        return scratch


def _integer(arg: Any, memory: Mapping[BufferRef, Array], env: Mapping[str, int]) -> int:
    if arg is None:
        return 0
    return memory[arg].ctypes.data if isinstance(arg, BufferRef) else evaluate(arg, env)


def build_harness(folder: Path) -> Path:
    """Compiles the C side in `folder`; returns the library."""
    for name in SOURCES:
        shutil.copyfile(RUNTIME / "src" / name, folder / name)
    shutil.copyfile(RUNTIME / "include" / "sparsec.h", folder / "sparsec.h")
    shutil.copyfile(Path(__file__).with_suffix(".c"), folder / "harness.c")
    tools = find_toolchain(None)
    objects = tools.compile_c(["harness.c", "parallel.c", "topology.c"], folder)
    tools.link_shared(objects, "harness.so", folder, exported=ENTRY)
    return folder / "harness.so"


def _entry(library: Path) -> Any:
    function = getattr(ctypes.CDLL(str(library)), ENTRY)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = (
        ctypes.c_uint32, pointer, number, number, pointer, pointer, number, pointer
    )  # fmt: skip
    function.restype = ctypes.c_int32
    return function
