"""The Python loader: right numbers, clear errors, any threads."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsec import errors
from sparsec.runtime import load, loader

Array = np.ndarray[Any, Any]
Example = Callable[[int, int], dict[str, Array]]
Expected = Callable[..., dict[str, Array]]

# Sums of at most 300 float32 values below 32: 300 * 32 * 2**-24 is below this.
TOLERANCE = 1e-3


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 300)])
def test_numbers(
    library: Path, example: Example, expected: Expected, threads: int, shape: tuple[int, int]
) -> None:
    inputs = example(*shape)
    with load(library, threads=threads) as model:
        outputs = model(inputs)
    for name, wanted in expected(**inputs).items():
        assert outputs[name].dtype == np.float32
        assert outputs[name].shape == wanted.shape
        np.testing.assert_allclose(outputs[name], wanted, rtol=0, atol=TOLERANCE)


def test_any_number_of_threads_gives_the_same_bits(library: Path, example: Example) -> None:
    inputs = example(5, 67)
    wanted = load(library, threads=1)(inputs)
    for threads in (2, 3, 4):
        with load(library, threads=threads) as model:
            for _ in range(20):
                for name, array in model(inputs).items():
                    np.testing.assert_array_equal(array, wanted[name])


def test_python_threads_share_a_model(library: Path, example: Example) -> None:
    cases = [example(1 + i % 4, 3 + 5 * i) for i in range(8)]
    with load(library, threads=2) as model:
        wanted = [model(c) for c in cases]

        def work(index: int) -> bool:
            return all(
                np.array_equal(array, wanted[index][name])
                for _ in range(25)
                for name, array in model(cases[index]).items()
            )

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))


def test_describes_itself(library: Path) -> None:
    model = load(library)
    assert model.name == "hand"
    assert [str(p) for p in model.inputs] == [
        "ids: int64[batch, seq]",
        "x: float32[batch, seq, 4]",
    ]
    assert [str(p) for p in model.outputs] == ["y: float32[batch, seq, 4]", "z: float32[batch, 4]"]
    description = model.description
    assert [s["kernel"] for s in description["steps"]] == ["scale_add", "look_up", "sum_tokens"]
    assert description["arena"]["slot_bytes"] == ["16*batch*seq"]
    assert description["passes"] == []
    assert model.verify_weights()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("x"), r"wanted ids, x; got ids"),
        (lambda i: i.update(extra=i["x"]), r"wanted ids, x; got extra, ids, x"),
        (lambda i: i.update(x=i["x"].astype(np.int32)), r"'x': wanted float32, got int32"),
        (lambda i: i.update(ids=i["ids"] * 1.0), r"'ids': wanted int64, got float64"),
        (lambda i: i.update(x=i["x"] + 0j), r"'x': wanted float32, got complex"),
        (lambda i: i.update(x=i["x"][0]), r"'x': wanted rank 3 \[batch, seq, 4\].*\(5, 4\)"),
        (lambda i: i.update(x=i["x"][:, :, :3]), r'"x", axis 2: wanted 4 \(fixed\), got 3'),
        (lambda i: i.update(x=i["x"][:, :2]), r'"x", axis 1: wanted 5 \(seq\), got 2'),
        (lambda i: i.update(x=i["x"][:, :0]), r'"x", axis 1: wanted a size of at least 1, got 0'),
        (lambda i: i["ids"].__setitem__((1, 2), 10), r"step 1 \(embedding\): .*out of range"),
        (lambda i: i["ids"].__setitem__((1, 2), -1), r"step 1 \(embedding\): .*out of range"),
        (lambda i: i.update(x=i["x"].astype(np.float64) * 1e300), r"'x': .*do not fit"),
        (lambda i: i.update(ids=np.full((2, 5), 2**63, np.uint64)), r"'ids': .*do not fit"),
        (lambda i: i.update(x="text"), r"'x': wanted rank 3"),
        (lambda i: i.update(ids=[[1, 2], [1]]), r"'ids': .*inhomogeneous"),
    ],
)
def test_bad_inputs(
    library: Path, example: Example, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    inputs: dict[str, Any] = example(2, 5)
    with load(library, threads=2) as model:
        good = model(dict(inputs))
        changed = {name: array.copy() for name, array in inputs.items()}
        change(changed)
        with pytest.raises(errors.InvalidInput, match=message):
            model(changed)
        np.testing.assert_array_equal(model(inputs)["y"], good["y"])  # it still works


def test_inputs_are_no_dict(library: Path) -> None:
    with load(library) as model, pytest.raises(errors.InvalidInput, match="wanted a dict"):
        model([1, 2])  # type: ignore[arg-type]


def test_arrays_of_other_layouts_are_accepted(library: Path, example: Example) -> None:
    inputs = example(4, 6)
    with load(library) as model:
        wanted = model(inputs)["y"]
        fortran = np.asfortranarray(inputs["x"])
        strided = np.repeat(inputs["x"], 2, axis=1)[:, ::2]
        shifted = np.empty(inputs["x"].nbytes + 1, np.uint8)[1:].view(np.float32)
        shifted = shifted.reshape(inputs["x"].shape)
        shifted[...] = inputs["x"]
        swapped = inputs["x"].astype(">f4")
        for x in (fortran, strided, shifted, swapped, inputs["x"].astype(np.float64)):
            np.testing.assert_array_equal(model({**inputs, "x": x})["y"], wanted)
        for ids in (inputs["ids"].astype(np.int32), inputs["ids"].tolist()):
            np.testing.assert_array_equal(model({**inputs, "ids": ids})["y"], wanted)
        np.testing.assert_array_equal(model.run(**inputs)["y"], wanted)


def test_bad_options(library: Path) -> None:
    for threads in (-1, 1025):
        with pytest.raises(errors.InvalidInput, match=f"threads: wanted 0 .* 1024, got {threads}"):
            load(library, threads=threads)
    with pytest.raises(errors.InvalidInput, match="pin: wanted a CPU for each of 3 threads"):
        load(library, threads=3, pin=[0])


def test_pinned_to_a_cpu_that_is_not_there(library: Path, example: Example) -> None:
    with (
        load(library, pin=[0, 1023]) as model,
        pytest.raises(errors.CompilerError, match=r"started or pinned.*\[0, 1023\]"),
    ):
        model(example(1, 1))


def test_pinning(library: Path, example: Example) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    inputs = example(2, 40)
    wanted = load(library, threads=1)(inputs)["y"]
    for pin in (True, [cpus[0], cpus[-1]]):
        with load(library, pin=pin) as model:
            np.testing.assert_array_equal(model(inputs)["y"], wanted)
    assert sorted(os.sched_getaffinity(0)) == cpus  # the caller's thread is left alone


def test_every_worker_is_on_its_cpu(library: Path, example: Example) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    before = set(os.listdir("/proc/self/task"))
    models = [load(library, pin=[cpus[0], cpu]) for cpu in (cpus[0], cpus[-1])]
    for model in models:
        model(example(2, 40))
        workers = set(os.listdir("/proc/self/task")) - before
        assert [os.sched_getaffinity(int(worker)) for worker in workers] == [{model._cpus[1]}]
        before |= workers


def test_models_of_one_file_share_its_weights(library: Path) -> None:
    first, second = load(library, threads=1), load(library, threads=2)
    assert first._model.weights == second._model.weights


def test_closed_model(library: Path, example: Example) -> None:
    model = load(library)
    model.close()
    model.close()
    with pytest.raises(errors.InvalidInput, match="the model is closed"):
        model(example(1, 1))


def test_close_ends_the_threads(library: Path, example: Example) -> None:
    before = len(os.listdir("/proc/self/task"))
    with load(library, threads=4) as model:
        model(example(2, 30))
        assert len(os.listdir("/proc/self/task")) == before + 3
    assert len(os.listdir("/proc/self/task")) == before


def _bytes_mapped() -> int:
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def _succeeds_in_a_child(check: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends it
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def test_a_forked_child_makes_threads_of_its_own(library: Path, example: Example) -> None:
    inputs = example(4, 50)
    with load(library, threads=2) as model:
        wanted = model(inputs)["y"]
        assert _succeeds_in_a_child(lambda: np.array_equal(model(inputs)["y"], wanted))
        np.testing.assert_array_equal(model(inputs)["y"], wanted)


def test_a_forked_child_frees_the_contexts_of_its_parent(library: Path, example: Example) -> None:
    batch, seq = 3, 1 << 20
    arena_bytes = batch * seq * 16  # past 32 MB, which malloc always gives back
    with load(library, threads=2) as model:
        model(example(batch, seq))
        before = _bytes_mapped()
        assert _succeeds_in_a_child(lambda: _bytes_mapped() <= before - arena_bytes)


def test_a_forked_child_waits_for_no_thread_of_its_parent(library: Path, example: Example) -> None:
    inputs = example(4, 50)
    with load(library, threads=1) as model:
        wanted = model(inputs)["y"]
        with model._lock:  # as another thread may at the fork
            assert _succeeds_in_a_child(lambda: np.array_equal(model(inputs)["y"], wanted))


def test_forks_to_come_keep_no_model(library: Path) -> None:
    gone = weakref.ref(load(library))
    assert gone() is None


def test_two_models_with_one_name(
    build_hand: Callable[..., Path], example: Example, expected: Expected
) -> None:
    inputs = example(2, 9)
    first, second = load(build_hand("same")), load(build_hand("same", scale=3.0))
    for _ in range(2):
        for model, scale in ((first, 2.0), (second, 3.0)):
            wanted = expected(**inputs, scale=scale)["y"]
            np.testing.assert_allclose(model(inputs)["y"], wanted, rtol=0, atol=TOLERANCE)


def test_a_replaced_library_is_loaded_anew(
    build_hand: Callable[..., Path], example: Example, expected: Expected, tmp_path: Path
) -> None:
    inputs = example(2, 9)
    path = tmp_path / "model.so"
    os.link(build_hand("old"), path)
    old = load(path)
    os.replace(build_hand("new", scale=3.0), path)
    new = load(path)
    assert (old.name, new.name) == ("old", "new")
    for model, scale in ((new, 3.0), (old, 2.0)):
        wanted = expected(**inputs, scale=scale)["y"]
        np.testing.assert_allclose(model(inputs)["y"], wanted, rtol=0, atol=TOLERANCE)


def test_a_library_that_is_overwritten_in_place_is_refused(
    build_hand: Callable[..., Path], example: Example, tmp_path: Path
) -> None:
    """What was mapped stays so for the process: new bytes under it crash."""
    path = tmp_path / "model.so"
    path.write_bytes(build_hand("old").read_bytes())
    with load(path) as model:
        model(example(1, 2))
    path.write_bytes(build_hand("new", scale=3.0).read_bytes())
    with pytest.raises(errors.AbiMismatch, match=r"model\.so: was overwritten .* rename it"):
        load(path)
    fresh = tmp_path / "fresh.so"
    fresh.write_bytes(build_hand("new", scale=3.0).read_bytes())
    os.replace(fresh, path)
    assert load(path).name == "new"


@pytest.mark.parametrize("keep", [0, 3, 64, 2000, 0.5, 0.99])
def test_truncated_library(library: Path, tmp_path: Path, keep: float) -> None:
    data = library.read_bytes()
    path = tmp_path / "cut.so"
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(errors.AbiMismatch, match=r"cut\.so: (truncated|not a shared library)"):
        load(path)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(errors.AbiMismatch, match="No such file"):
        load(tmp_path / "missing.so")
    text = tmp_path / "text.so"
    text.write_text("hello " * 100)
    with pytest.raises(errors.AbiMismatch, match="not a shared library of 64-bit Linux"):
        load(text)
    other = next(Path(np.__file__).parent.rglob("*_multiarray_umath*.so"))
    with pytest.raises(errors.AbiMismatch, match=r"sparsec_query|can not be loaded"):
        load(other)


def test_damaged_weights_are_found_on_request(library: Path, tmp_path: Path) -> None:
    table = np.arange(40, dtype=np.float32).tobytes()
    data = library.read_bytes()
    assert data.count(table) == 1
    path = tmp_path / "damaged.so"
    path.write_bytes(data.replace(table, table[::-1]))
    assert not load(path).verify_weights()


def test_stands_alone(library: Path, example: Example, tmp_path: Path) -> None:
    """The loader beside the library runs it in a process that can not import sparsec."""
    shutil.copy(library, tmp_path / "hand.so")
    loader_file = shutil.copy(library.with_suffix(".py"), tmp_path / "hand.py")
    inputs = example(2, 3)
    np.savez(tmp_path / "inputs.npz", **inputs)
    code = f"""
import runpy, sys, numpy as np
sys.modules["sparsec"] = None
load = runpy.run_path({str(loader_file)!r})["load"]
with load("hand.so", threads=1) as model:
    np.savez("outputs.npz", **model(dict(np.load("inputs.npz"))))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with load(library) as model, np.load(tmp_path / "outputs.npz") as outputs:
        np.testing.assert_array_equal(outputs["y"], model(inputs)["y"])
    shown = subprocess.run(
        [sys.executable, str(loader_file)], capture_output=True, text=True, check=True
    )
    assert '"look_up"' in shown.stdout


def test_errors_of_the_loader_alone(library: Path, tmp_path: Path) -> None:
    with pytest.raises(loader.AbiMismatch):
        loader.load(tmp_path / "missing.so")
    with loader.load(library) as model, pytest.raises(ValueError, match="got none"):
        model({})


def test_loading_is_fast_and_reads_no_weight(build_hand: Callable[..., Path]) -> None:
    megabytes = 50
    path = build_hand("big", padding_bytes=megabytes << 20)
    code = f"""
import time
from sparsec.runtime import load
start = time.perf_counter()
model = load({str(path)!r})
seconds = time.perf_counter() - start
resident, mine = 0, False
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        mine = line.rstrip().endswith("big.so")
    if mine and line.startswith("Rss:"):
        resident += int(line.split()[1])
print(seconds, resident)
"""
    command = [sys.executable, "-c", code]
    # A process each, since a library stays mapped; of the times the best: others may be at work.
    shown = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert min(float(seconds) for seconds, _ in shown) < 0.05
    # Code, tables and the pages that the system maps around each page that is touched.
    assert all(0 < int(resident) < 1024 for _, resident in shown)


def test_structs_are_those_of_the_header() -> None:
    sizes = {
        loader.DimStruct: 24,
        loader.TensorStruct: 24,
        loader.OptionsStruct: 80,
        loader.ModelStruct: 208,
    }
    header = Path(loader.__file__).parent / "include" / "sparsec.h"
    text = header.read_text()
    names = ("sparsec_dim_v1", "sparsec_tensor_v1", "sparsec_options_v1", "sparsec_model_v1")
    for (struct, size), name in zip(sizes.items(), names, strict=True):
        assert ctypes.sizeof(struct) == size
        assert f"_Static_assert(sizeof({name}) == {size}," in text
    assert f"#define SPARSEC_ABI_VERSION {loader.ABI_VERSION}u" in text
