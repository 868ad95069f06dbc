"""Builds kernels, calls them through ctypes, and lays arrays out as kernels read them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sparsec.codegen import tir
from sparsec.codegen.isa import FEATURES
from sparsec.codegen.kernels import family_for
from sparsec.codegen.program import Arg, BufferRef, Kernel, KernelCall, Kind, Region
from sparsec.codegen.toolchain import link_kernels
from sparsec.ir.dims import evaluate
from sparsec.ir.graph import Node, Value
from sparsec.ir.schedule import Schedule
from sparsec.target import Isa

WIDTH = 64
GUARD = 64  # elements before and after each buffer, to see stray writes
SENTINEL = 123456.75
C_TYPES = {Kind.POINTER: ctypes.c_void_p, Kind.INT: ctypes.c_int64, Kind.FLOAT: ctypes.c_float}

Array = np.ndarray[Any, Any]


def sentinel(dtype: np.dtype[Any]) -> float:
    """What surrounds an output of the type."""
    return SENTINEL if dtype.kind == "f" else 77


def aligned(array: Array, *, guard: int = 0, fill: float | None = None) -> tuple[Array, Array]:
    """A copy at a multiple of 64 bytes, and the whole buffer with `guard` elements around it."""
    size = array.nbytes + 2 * guard * array.itemsize
    raw = np.zeros(size + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    whole = raw[skip : skip + size].view(array.dtype)
    whole[...] = sentinel(array.dtype) if fill is None else fill
    inner = whole[guard : guard + array.size].reshape(array.shape)
    inner[...] = array
    return inner, whole


@dataclass
class ArrayBinder:
    """Binds values to the arrays that stand for them: to one place where that is one array."""

    arrays: Mapping[str, Array]
    bound: list[Array] = field(default_factory=list)

    def ref(self, value: Value) -> BufferRef:
        data = self.arrays[value.name] if value.data is None else value.data
        return self._add(value.name, data, value.type)

    def weight(self, name: str, data: Array) -> BufferRef:
        assert data.size, f"{name} is empty"
        return self._add(name, data, None)

    def optional(self, value: Value | None) -> BufferRef | None:
        return None if value is None else self.ref(value)

    def argument(self, arg: Arg, env: Mapping[str, int]) -> Any:
        """The array or the number that is passed for `arg`."""
        if isinstance(arg, BufferRef):
            return self.bound[arg.index]
        return arg if arg is None or isinstance(arg, float) else evaluate(arg, env)

    def _add(self, name: str, data: Array, type: Any) -> BufferRef:
        places = [i for i, known in enumerate(self.bound) if known is data]
        if not places:
            self.bound.append(data)
        return BufferRef(Region.ARENA, places[0] if places else len(self.bound) - 1, type, name)


@dataclass
class Runner:
    """Calls kernels, building each once, and lays arrays out as they read them."""

    folder: Path
    enable_amx: Callable[[], Any]
    functions: dict[str, Any] = field(default_factory=dict)

    def function(self, kernel: Kernel) -> Any:
        if kernel.name not in self.functions:
            self.functions[kernel.name] = self._load(kernel)
        return self.functions[kernel.name]

    @staticmethod
    def to_panels(rows: Array, lanes_past_end: float | None = None) -> Array:
        """`[tokens, channels]` as `[panel][channel][64]`.

        Past the last token, lanes of its group of 16 hold finite numbers (`lanes_past_end`, or
        7) and the other lanes NaN: kernels must not let either reach a result.
        """
        tokens, channels = rows.shape
        panels = -(-tokens // WIDTH)
        no_number = np.nan if rows.dtype.kind == "f" else 99
        padded = np.full((panels * WIDTH, channels), no_number, rows.dtype)
        padded[: -(-tokens // 16) * 16] = 7.0 if lanes_past_end is None else lanes_past_end
        padded[:tokens] = rows
        return np.ascontiguousarray(padded.reshape(panels, WIDTH, channels).transpose(0, 2, 1))

    @staticmethod
    def from_panels(panels: Array, tokens: int) -> Array:
        count, channels, _ = panels.shape
        return panels.transpose(0, 2, 1).reshape(count * WIDTH, channels)[:tokens]

    @staticmethod
    def to_pairs(rows: Array) -> Array:
        """bf16`[tokens, channels]` as int32`[panel][channel / 2][64]`."""
        panels = Runner.to_panels(rows.astype(np.float32)).astype(rows.dtype)
        pairs = np.stack([panels[:, 0::2], panels[:, 1::2]], axis=-1)
        return np.ascontiguousarray(pairs).view(np.int32)[..., 0]

    @staticmethod
    def from_pairs(words: Array, tokens: int) -> Array:
        """`to_pairs` undone."""
        count, pairs, _ = words.shape
        halves = words.view(ml_dtypes.bfloat16).reshape(count, pairs, WIDTH, 2)
        panels = halves.transpose(0, 1, 3, 2).reshape(count, 2 * pairs, WIDTH)
        return Runner.from_panels(panels, tokens)

    def _load(self, kernel: Kernel) -> Any:
        if kernel.isa == Isa.AMX.value:
            self.enable_amx()
        library = self.folder / f"{kernel.name}.so"
        link_kernels([tir.build_object([kernel.build()], FEATURES[Isa(kernel.isa)])], library)
        function = getattr(ctypes.CDLL(str(library)), kernel.name)
        function.restype = ctypes.c_int32
        scratch = [ctypes.c_void_p] if kernel.has_scratch else []
        types = [C_TYPES[p.kind] for p in kernel.parameters]
        function.argtypes = [*types, *scratch, ctypes.c_int64, ctypes.c_int64]
        return function

    def node(
        self, node: Node, schedule: Schedule, arrays: Mapping[str, Array], env: Mapping[str, int]
    ) -> list[KernelCall]:
        """Fills the arrays of a node's outputs from those of its inputs; the calls that did it."""
        family, binder = family_for(node), ArrayBinder(arrays)
        assert family is not None
        calls = family.lower(node, schedule, binder)
        for call in calls:
            args = [binder.argument(a, env) for a in call.args]
            outputs = [arrays[v.name] for v in node.outputs]
            status = self(call.kernel, *args, output=outputs, items=evaluate(call.items, env),
                          scratch_bytes=evaluate(call.scratch_bytes, env))  # fmt: skip
            assert status == 0
            assert evaluate(call.grain, env) >= 1
        return calls

    def __call__(
        self,
        kernel: Kernel,
        *args: Any,
        output: Array | list[Array],
        items: int,
        scratch_bytes: int = 0,
        splits: int = 3,
    ) -> int:
        """Calls with `args`; those that are `output` are filled, and checked for stray writes.

        The items are cut into `splits` uneven ranges, and run last to first.
        """
        outputs = output if isinstance(output, list) else [output]
        guarded = {id(a): aligned(a, guard=GUARD) for a in outputs}
        kept = [guarded.get(id(a)) or aligned(a) if isinstance(a, np.ndarray) else a for a in args]
        pointers = [_argument(a) for a in kept]
        # What a kernel has not written may be NaN, and as integers not 0.
        scratch = aligned(np.full(scratch_bytes, 255, np.uint8), guard=GUARD, fill=77)
        extra = [scratch[0].ctypes.data] if kernel.has_scratch else []
        bounds = sorted(
            {0, items, *(items * (i * i + 1) // (splits * splits) for i in range(splits))}
        )
        status = 0
        for begin, end in reversed(list(pairwise(bounds))):
            status |= self.function(kernel)(*pointers, *extra, begin, end)
        for array in outputs:
            inner, whole = guarded[id(array)]
            assert (whole[:GUARD] == sentinel(array.dtype)).all(), "wrote before the output"
            assert (whole[-GUARD:] == sentinel(array.dtype)).all(), "wrote past the output"
            array[...] = inner
        assert (scratch[1][:GUARD] == 77).all(), "wrote before the scratch memory"
        assert (scratch[1][-GUARD:] == 77).all(), "wrote past the scratch memory"
        return status


def _argument(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0].ctypes.data
    return value.ctypes.data if isinstance(value, np.ndarray) else value


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`kernel` runs over VARIANTS of the test's module, `some_kernel` over SOME, by ISA."""
    for argument, table in (("kernel", "VARIANTS"), ("some_kernel", "SOME")):
        if argument in metafunc.fixturenames:
            kernels = getattr(metafunc.module, table)
            metafunc.parametrize(argument, [_marked(kernel) for kernel in kernels])


def _marked(kernel: Kernel) -> Any:
    """An emulated CPU with AMX has no bf16 vectors but its own: they round results to bf16."""
    needs = [kernel.isa, *(["avx512bf16"] if "bf16" in kernel.name else [])]
    return pytest.param(kernel, marks=[pytest.mark.isa(x) for x in needs], id=kernel.name)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runner:
    """Skipped tests never build: a kernel is built at its first call."""
    folder = tmp_path_factory.mktemp("kernels")
    return Runner(folder, partial(request.getfixturevalue, "amx"))
