"""The C interface itself, through ctypes: statuses, memory, threads."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsec.runtime.loader import ModelStruct, OptionsStruct

Array = np.ndarray[Any, Any]
OK, INVALID_ARGUMENT, INVALID_SHAPE, TOO_LARGE = 0, 2, 3, 4
BUSY, NOT_PREPARED, FORKED = 7, 8, 10

TASK = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_uint32)
PARALLEL_FOR = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_void_p, ctypes.c_uint32, TASK, ctypes.c_void_p
)


class Context:
    """One context of the hand-made library, called as a C program would."""

    def __init__(self, model: ModelStruct, **options: Any):
        self.model = model
        self.handle = ctypes.c_void_p()
        options.setdefault("struct_bytes", ctypes.sizeof(OptionsStruct))
        self.created = model.context_create(OptionsStruct(**options), ctypes.byref(self.handle))

    def prepare(self, ids: tuple[int, ...], x: tuple[int, ...]) -> int:
        rows = [(ctypes.c_int64 * len(shape))(*shape) for shape in (ids, x)]
        pointer = ctypes.POINTER(ctypes.c_int64)
        status: int = self.model.prepare(
            self.handle, (pointer * 2)(*(ctypes.cast(r, pointer) for r in rows))
        )
        return status

    def run(self, inputs: dict[str, Array], y: Array, z: Array) -> int:
        ins = (ctypes.c_void_p * 2)(inputs["ids"].ctypes.data, inputs["x"].ctypes.data)
        status: int = self.model.run(
            self.handle, ins, (ctypes.c_void_p * 2)(y.ctypes.data, z.ctypes.data)
        )
        return status

    @property
    def error(self) -> str:
        text: bytes = self.model.last_error(self.handle)
        return text.decode()

    @property
    def arena_bytes(self) -> int:
        count: int = self.model.arena_bytes(self.handle)
        return count

    def destroy(self) -> None:
        self.model.context_destroy(self.handle)


def _table(library: Path) -> ModelStruct:
    query = ctypes.CDLL(str(library)).sparsec_query
    query.restype = ctypes.POINTER(ModelStruct)
    table: ModelStruct = query(1).contents
    return table


@pytest.fixture
def model(library: Path) -> ModelStruct:
    return _table(library)


@pytest.fixture
def context(model: ModelStruct) -> Iterator[Context]:
    context = Context(model, threads=2)
    assert context.created == OK
    yield context
    context.destroy()


def test_unknown_abi_version(library: Path) -> None:
    query = ctypes.CDLL(str(library)).sparsec_query
    query.restype = ctypes.c_void_p
    assert query(0) is None
    assert query(2) is None


def test_every_status_has_a_text(model: ModelStruct) -> None:
    texts = [model.status_text(status) for status in range(11)]
    assert len(set(texts)) == 11
    assert model.status_text(11) == model.status_text(-5) == b"unknown status"


def test_calls_in_the_wrong_order(context: Context) -> None:
    y = np.zeros(4, np.float32)
    inputs = {"ids": np.zeros(1, np.int64), "x": y}
    assert context.run(inputs, y, y) == NOT_PREPARED
    assert context.error == "run comes after prepare"
    shape = (ctypes.c_int64 * 8)()
    assert context.model.output_shape(context.handle, 0, shape) == NOT_PREPARED
    assert context.prepare((1, 1), (1, 1, 4)) == OK
    assert context.model.output_shape(context.handle, 2, shape) == INVALID_ARGUMENT
    assert context.error == "there are 2 outputs, no output 2"
    assert context.prepare((1, 1), (1, 2, 4)) == INVALID_SHAPE
    assert context.run(inputs, y, y) == NOT_PREPARED  # a failed prepare leaves nothing to run


def test_null_pointers(context: Context) -> None:
    model = context.model
    assert context.prepare((1, 1), (1, 1, 4)) == OK
    assert model.run(context.handle, None, None) == INVALID_ARGUMENT
    assert context.error == 'input "ids" is a null pointer'
    assert model.prepare(context.handle, None) == INVALID_ARGUMENT
    assert model.prepare(context.handle, (ctypes.POINTER(ctypes.c_int64) * 2)()) == (
        INVALID_ARGUMENT
    )
    assert context.error == 'input "ids": its shape is a null pointer'
    assert context.prepare((1, 1), (1, 1, 4)) == OK
    assert model.output_shape(context.handle, 0, None) == INVALID_ARGUMENT
    assert context.error == "shape is a null pointer"
    assert model.prepare(None, None) == INVALID_ARGUMENT
    assert model.arena_bytes(None) == 0
    model.context_destroy(None)


def test_output_shapes(context: Context) -> None:
    assert context.prepare((3, 7), (3, 7, 4)) == OK
    shape = (ctypes.c_int64 * 3)()
    assert context.model.output_shape(context.handle, 0, shape) == OK
    assert shape[:] == [3, 7, 4]
    assert context.model.output_shape(context.handle, 1, shape) == OK
    assert shape[:2] == [3, 4]


@pytest.mark.parametrize(
    "options",
    [
        {"struct_bytes": 72},
        {"reserved": (0, 0, 0, 1)},
        {"pin": 3},
        {"no_spin": 2},
        {"pin": 2, "threads": 1},
        {"threads": 1025},
    ],
)
def test_options_that_are_refused(model: ModelStruct, options: dict[str, Any]) -> None:
    if "reserved" in options:
        options = {"reserved": (ctypes.c_uint64 * 4)(*options["reserved"])}
    context = Context(model, **options)
    assert context.created == INVALID_ARGUMENT
    assert context.handle.value is None


def test_default_options(model: ModelStruct) -> None:
    handle = ctypes.c_void_p()
    assert model.context_create(None, ctypes.byref(handle)) == OK
    assert 1 <= model.thread_count(handle) <= len(os.sched_getaffinity(0))
    model.context_destroy(handle)


def test_arena_grows_only(context: Context) -> None:
    assert context.arena_bytes == 0
    sizes = []
    for batch, seq in ((1, 1), (8, 512), (1, 1), (8, 512), (64, 4096)):
        assert context.prepare((batch, seq), (batch, seq, 4)) == OK
        sizes.append(context.arena_bytes)
        assert sizes[-1] >= batch * seq * 4 * 4
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3] < sizes[4]


def test_shapes_that_are_too_large(context: Context) -> None:
    for size, message in ((1 << 24, "2^46 bytes"), (1 << 40, "2^62"), ((1 << 63) - 1, "2^62")):
        assert context.prepare((size, size), (size, size, 4)) == TOO_LARGE
        assert message in context.error
    assert context.prepare((-1, 1), (-1, 1, 4)) == INVALID_SHAPE
    assert context.prepare((2, 2), (2, 2, 4)) == OK


def test_more_memory_than_there_is(context: Context) -> None:
    # 2^45 bytes: addressable, but more than a machine has, unless it overcommits without limit.
    status = context.prepare((1 << 21, 1 << 20), (1 << 21, 1 << 20, 4))
    assert status in (OK, 5)
    assert context.prepare((1, 1), (1, 1, 4)) == OK


def test_busy_context(model: ModelStruct, example: Callable[..., dict[str, Array]]) -> None:
    """A second thread is refused while the hook keeps the first one inside `run`."""
    seen: list[int] = []

    @PARALLEL_FOR
    def hook(user: int, tasks: int, task: Any, argument: int) -> int:
        if not seen:
            thread = threading.Thread(target=lambda: seen.append(context.run(inputs, y, z)))
            thread.start()
            thread.join()
        return max(task(argument, i) for i in range(tasks))

    context = Context(model, threads=2, parallel_for=ctypes.cast(hook, ctypes.c_void_p))
    inputs = example(2, 3)
    y, z = np.empty((2, 3, 4), np.float32), np.empty((2, 4), np.float32)
    assert context.prepare((2, 3), (2, 3, 4)) == OK
    assert context.run(inputs, y, z) == OK
    assert seen == [BUSY]
    context.destroy()


def test_contexts_run_at_the_same_time(
    model: ModelStruct, example: Callable[..., dict[str, Array]]
) -> None:
    """In every step each context waits inside `run` until the other one is there too."""
    both = threading.Barrier(2)
    statuses: list[int] = []

    @PARALLEL_FOR
    def hook(user: int, tasks: int, task: Any, argument: int) -> int:
        try:
            both.wait(timeout=30)
        except threading.BrokenBarrierError:
            return 5
        return max(task(argument, i) for i in range(tasks))

    def run(context: Context) -> None:
        y, z = np.empty((2, 3, 4), np.float32), np.empty((2, 4), np.float32)
        statuses.append(context.run(inputs, y, z))

    pointer = ctypes.cast(hook, ctypes.c_void_p)
    contexts = [Context(model, threads=2, parallel_for=pointer) for _ in range(2)]
    inputs = example(2, 3)
    assert [c.prepare((2, 3), (2, 3, 4)) for c in contexts] == [OK, OK]
    threads = [threading.Thread(target=run, args=(c,)) for c in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [OK, OK]
    for context in contexts:
        context.destroy()


def test_external_threads(
    model: ModelStruct,
    example: Callable[..., dict[str, Array]],
    expected: Callable[..., dict[str, Array]],
) -> None:
    calls: list[tuple[int, int]] = []

    @PARALLEL_FOR
    def hook(user: int, tasks: int, task: Any, argument: int) -> int:
        calls.append((user, tasks))
        threads = [threading.Thread(target=task, args=(argument, i)) for i in range(tasks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 0

    pointer = ctypes.cast(hook, ctypes.c_void_p)
    before = len(os.listdir("/proc/self/task"))
    context = Context(model, threads=3, parallel_for=pointer, parallel_user=77)
    assert len(os.listdir("/proc/self/task")) == before
    inputs = example(4, 5)
    y, z = np.empty((4, 5, 4), np.float32), np.empty((4, 4), np.float32)
    assert context.prepare((4, 5), (4, 5, 4)) == OK
    assert context.run(inputs, y, z) == OK
    assert calls == [(77, 3)] * 3
    wanted = expected(**inputs)
    np.testing.assert_allclose(y, wanted["y"], rtol=1e-5)
    np.testing.assert_allclose(z, wanted["z"], rtol=1e-5)

    inputs["ids"][3, 4] = 99  # the status of a task counts even when the hook drops it
    assert context.run(inputs, y, z) == 1
    context.destroy()


def _status(thread: str, key: str) -> str:
    """What the system says of a thread of this process."""
    lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
    return next(x for x in lines if x.startswith(key)).split()[1]


def _sleeps(thread: str) -> int:
    """How often a thread of this process has gone to sleep."""
    return int(_status(thread, "voluntary_ctxt"))


def test_workers_take_the_signals_that_they_raise_and_no_others(
    model: ModelStruct, example: Callable[..., dict[str, Array]]
) -> None:
    before = set(os.listdir("/proc/self/task"))
    context = Context(model, threads=2)
    (worker,) = set(os.listdir("/proc/self/task")) - before
    y, z = np.empty((2, 40, 4), np.float32), np.empty((2, 4), np.float32)
    assert context.prepare((2, 40), (2, 40, 4)) == OK
    assert context.run(example(2, 40), y, z) == OK  # a thread that starts takes none at first
    mask = int(_status(worker, "SigBlk"), 16)
    context.destroy()
    taken = {number for number in signal.valid_signals() if not mask >> (number - 1) & 1}
    raised = {signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}
    raised |= {signal.SIGSYS, signal.SIGTRAP}
    assert taken - {signal.SIGKILL, signal.SIGSTOP} == raised


def test_threads_wait_awake_for_the_next_step(
    model: ModelStruct, example: Callable[..., dict[str, Array]]
) -> None:
    """Between runs a worker sleeps after a microsecond here; within one it does not."""
    before = set(os.listdir("/proc/self/task"))
    context = Context(model, threads=2, spin_us=1)
    (worker,) = set(os.listdir("/proc/self/task")) - before
    inputs = example(64, 128)
    ids, x = inputs["ids"].shape, inputs["x"].shape
    assert context.prepare(ids, x) == OK
    y, z = np.empty(x, np.float32), np.empty(x[::2], np.float32)
    slept = []
    for _ in range(50):
        start = _sleeps(worker)
        assert context.run(inputs, y, z) == OK
        slept.append(_sleeps(worker) - start)
    context.destroy()
    # Not of most runs: on a busy machine a thread may lose its core for longer than it waits.
    assert np.quantile(slept, 0.1) <= 1


def _sleeps_at_rest(thread: str) -> int:
    """How often a thread has gone to sleep, once it stays asleep."""
    for _ in range(1000):
        before = _sleeps(thread)
        time.sleep(0.01)
        if _status(thread, "State") == "S" and _sleeps(thread) == before:
            return before
    raise AssertionError("the thread does not go to sleep")


def test_without_spinning_a_worker_sleeps_between_steps(
    build_hand: Callable[..., Path], example: Callable[..., dict[str, Array]]
) -> None:
    """The second of three steps is one for the caller alone, of milliseconds."""
    before = set(os.listdir("/proc/self/task"))
    library = build_hand("no_spin", order=(0, 2, 1))
    context = Context(_table(library), threads=2, no_spin=1, spin_us=1_000_000)
    (worker,) = set(os.listdir("/proc/self/task")) - before
    inputs = example(1, 1 << 21)
    ids, x = inputs["ids"].shape, inputs["x"].shape
    assert context.prepare(ids, x) == OK
    y, z = np.empty(x, np.float32), np.empty(x[::2], np.float32)
    slept = []
    for _ in range(10):
        start = _sleeps_at_rest(worker)
        assert context.run(inputs, y, z) == OK
        slept.append(_sleeps_at_rest(worker) - start)
    context.destroy()
    # Once after the run and once within, but not in each when others keep the worker off its core.
    assert max(slept) >= 2


def test_spinning_changes_no_number(
    model: ModelStruct, example: Callable[..., dict[str, Array]]
) -> None:
    inputs = example(2, 40)
    results = []
    for options in ({"threads": 1}, {"threads": 3, "no_spin": 1}, {"threads": 2, "spin_us": 5000}):
        context = Context(model, **options)
        assert context.prepare((2, 40), (2, 40, 4)) == OK
        y, z = np.empty((2, 40, 4), np.float32), np.empty((2, 4), np.float32)
        for _ in range(10):
            assert context.run(inputs, y, z) == OK
        results.append((y, z))
        context.destroy()
    for y, z in results[1:]:
        np.testing.assert_array_equal(y, results[0][0])
        np.testing.assert_array_equal(z, results[0][1])


def test_rounding_mode_of_the_caller_does_not_matter(
    model: ModelStruct, example: Callable[..., dict[str, Array]]
) -> None:
    fenv = ctypes.CDLL("libm.so.6")
    upward, nearest = 0x800, 0  # FE_UPWARD, FE_TONEAREST of x86
    inputs = example(2, 40)
    context = Context(model, threads=2)
    assert context.prepare((2, 40), (2, 40, 4)) == OK
    results = []
    for mode in (nearest, upward):
        y, z = np.empty((2, 40, 4), np.float32), np.empty((2, 4), np.float32)
        assert fenv.fesetround(mode) == 0
        try:
            assert context.run(inputs, y, z) == OK
            assert fenv.fegetround() == mode
        finally:
            fenv.fesetround(nearest)
        results.append(np.concatenate([y.ravel(), z.ravel()]))
    np.testing.assert_array_equal(*results)
    context.destroy()


def test_a_forked_context_is_refused(
    model: ModelStruct, example: Callable[..., dict[str, Array]]
) -> None:
    inputs = example(2, 3)
    y, z = np.empty((2, 3, 4), np.float32), np.empty((2, 4), np.float32)
    context = Context(model, threads=2)
    assert context.prepare((2, 3), (2, 3, 4)) == OK
    child = os.fork()
    if child == 0:
        status = context.run(inputs, y, z)
        context.destroy()
        os._exit(0 if status == FORKED else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert context.run(inputs, y, z) == OK
    context.destroy()
