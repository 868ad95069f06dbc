"""Builds the kernels of a task's candidates, checks their results and times them.

It works in the present process: measure.py runs it in a child.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparsec.codegen import tir
from sparsec.codegen.isa import FEATURES
from sparsec.codegen.lower import lower_alone
from sparsec.codegen.program import BufferRef, Program, Region
from sparsec.codegen.toolchain import link_kernels
from sparsec.errors import CompilerError, UnsupportedCpu
from sparsec.interpreter import run_node
from sparsec.ir.dims import evaluate
from sparsec.ir.graph import Value
from sparsec.ir.layouts import Panels
from sparsec.ir.op_spec import Array
from sparsec.ir.schedule import Schedule
from sparsec.ir.types import DType, TensorType
from sparsec.target import Isa, Target, may_use_tiles
from sparsec.tuning.harness import BoundCalls, Harness, aligned, arena
from sparsec.tuning.task import Task

SEED = 1
SECONDS_PER_TRIAL = 0.04
FEWEST_REPEATS, MOST_REPEATS = 5, 60
# A result may be off by one step of u8 (another order of a softmax's sums), and by so much of the
# largest value in fp32: sums over thousands of channels in any order stay far below.
STEPS_OFF = 1
PART_OFF = 1e-3
UNWRITTEN = 0xAA  # bytes of results before a candidate runs: nobody else's are taken for its own


class WrongResult(CompilerError):
    """A kernel's result is not the oracle's."""


class Workbench:
    """One task on this machine. `baseline` is the heuristic's schedule.

    `folder` is for what is built, `harness` the library of `build_harness`.
    """

    def __init__(
        self, task: Task, target: Target, baseline: Schedule, folder: Path, harness: Path
    ):
        self._node, self._is_read = task.cut.node(), task.cut.is_read
        self._sizes, self._target, self._folder = dict(task.sizes), target, folder
        self._harness = Harness(harness, task.threads, target.l2_bytes)
        self._functions: dict[str, int] = {}
        self._inputs = self._random_inputs()
        self._expected = self._oracle()
        self._memory: dict[str, Array] = {}
        self._baseline = self._prepare(baseline)

    def time(self, schedule: Schedule) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Seconds of each call of the schedule and, in turns, of the baseline.

        Raises WrongResult when the schedule's result is not the oracle's, and what building it
        raises.
        """
        pair = [self._baseline, self._prepare(schedule)]
        warm = [self._memory[value.name] for value in self._inputs]
        first = self._harness.time(pair, 2, warm)[:, 1].sum()
        repeats = int(np.clip(SECONDS_PER_TRIAL / first, FEWEST_REPEATS, MOST_REPEATS))
        baseline, seconds = self._harness.time(pair, repeats, warm)
        return tuple(seconds.tolist()), tuple(baseline.tolist())

    def _prepare(self, schedule: Schedule) -> BoundCalls:
        """The schedule's calls, found to be right."""
        program = lower_alone(self._node, schedule, self._target)
        self._build(program)
        slots = self._slots(program)
        weights = [aligned(weight.data) for weight in program.weights]
        refs = {a for call in program.calls for a in call.args if isinstance(a, BufferRef)}
        memory = {r: slots[r.index] if r.region is Region.ARENA else weights[r.index]
                  for r in refs}  # fmt: skip
        bound = self._harness.bind(program.calls, self._functions, memory, self._sizes)
        self._check(bound, schedule)
        return bound

    def _slots(self, program: Program) -> list[Array]:
        """The memory of the operands. All candidates share it: none finds its caches colder."""
        if not self._memory:
            nodes = (*self._node.inputs, *self._node.outputs)
            names = dict.fromkeys(v.name for v in nodes if v and v.data is None)
            found = arena([evaluate(size, self._sizes) for size in program.slots])
            self._memory = dict(zip(names, found, strict=True))
            for value, array in self._inputs.items():
                laid_out = lay_out(array, value.type).reshape(-1).view(np.uint8)
                self._memory[value.name][...] = laid_out
        return list(self._memory.values())

    def _check(self, bound: BoundCalls, schedule: Schedule) -> None:
        for value in self._node.outputs:
            self._memory[value.name][...] = UNWRITTEN
        status = self._harness.run(bound)
        if status:
            raise WrongResult(f"{schedule}: the kernel ended with status {status}")
        made = zip(self._node.outputs, self._expected, self._is_read, strict=True)
        for value, expected in ((v, e) for v, e, is_read in made if is_read):
            memory = self._memory[value.name]
            result = read_back(memory.view(value.type.dtype.numpy), value.type, expected.shape)
            if not is_close(result, expected):
                worst = np.abs(result.astype(np.float64) - expected).max()
                raise WrongResult(f"{schedule}: {value.name} is off by up to {worst:g}")

    def _build(self, program: Program) -> None:
        """Compiles the kernels that were not built before, and makes sure that they may run."""
        new = {c.kernel.name: c.kernel for c in program.calls
               if c.kernel.name not in self._functions}  # fmt: skip
        for isa in sorted({kernel.isa for kernel in new.values()}):
            if isa == Isa.AMX.value and not may_use_tiles():
                raise UnsupportedCpu(
                    "this system does not permit the use of AMX, which Linux does from 5.16 on; "
                    f"tune with --isa {Isa.AVX512_BF16.value}"
                )
            kernels = [kernel for kernel in new.values() if kernel.isa == isa]
            data = tir.build_object([kernel.build() for kernel in kernels], FEATURES[Isa(isa)])
            path = self._folder / f"kernels_{len(self._functions)}_{isa}.so"
            link_kernels([data], path)
            library = ctypes.CDLL(str(path))
            for kernel in kernels:
                pointer = ctypes.cast(getattr(library, kernel.name), ctypes.c_void_p)
                assert pointer.value is not None
                self._functions[kernel.name] = pointer.value

    def _random_inputs(self) -> dict[Value, Array]:
        rng = np.random.default_rng(SEED)
        values = dict.fromkeys(v for v in self._node.inputs if v is not None and v.data is None)
        return {v: _random(v.type, self._sizes, rng) for v in values}

    def _oracle(self) -> list[Array]:
        operands = [None if v is None else v.data if v.data is not None else self._inputs[v]
                    for v in self._node.inputs]  # fmt: skip
        return run_node(self._node, operands, self._sizes)


def _random(type: TensorType, sizes: Mapping[str, int], rng: np.random.Generator) -> Array:
    """Normal numbers, and integers that are valid as bytes, as flags and as row numbers."""
    shape = tuple(evaluate(d, sizes) for d in type.shape)
    if type.dtype.is_float:
        return rng.standard_normal(shape).astype(type.dtype.numpy)
    most = 256 if type.dtype is DType.U8 else 2
    return rng.integers(0, most, shape).astype(type.dtype.numpy)


def lay_out(array: Array, type: TensorType) -> Array:
    """A logical array as kernels read it; lanes past the last token are zero."""
    if not isinstance(type.layout, Panels):
        return np.ascontiguousarray(array)
    width, channels = type.layout.width, array.shape[-1]
    rows = array.reshape(-1, channels)
    padded = np.zeros((-(-len(rows) // width) * width, channels), array.dtype)
    padded[: len(rows)] = rows
    return np.ascontiguousarray(padded.reshape(-1, width, channels).transpose(0, 2, 1))


def read_back(memory: Array, type: TensorType, shape: Sequence[int]) -> Array:
    """What kernels wrote as a logical array of `shape`."""
    if not isinstance(type.layout, Panels):
        return memory.reshape(tuple(shape))
    panels = memory.reshape(-1, shape[-1], type.layout.width)
    rows = panels.transpose(0, 2, 1).reshape(-1, shape[-1])
    return rows[: int(np.prod(shape[:-1]))].reshape(tuple(shape))


def is_close(result: Array, expected: Array) -> bool:
    """Whether a result is the oracle's up to the order of its sums."""
    if expected.dtype.kind != "f":
        return bool((np.abs(result.astype(np.int64) - expected) <= STEPS_OFF).all())
    finite = np.isfinite(expected)
    if not np.array_equal(result[~finite], expected[~finite], equal_nan=True):
        return False
    bound = PART_OFF * float(np.abs(expected[finite]).max(initial=1e-6))
    return bool((np.abs(result[finite] - expected[finite]) <= bound).all())
