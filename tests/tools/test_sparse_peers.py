"""The files for DeepSparse and ITREX: made for each share of zeros, and kept if answers are right.

The engines are played by ONNX Runtime in workers, which runs what DeepSparse would run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sparsec.models.build import build_file
from sparsec.models.registry import ModelSpec
from sparsec.models.tiny import tiny_spec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORKER = f"""
import shutil, sys
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS / "workers")!r})
import numpy as np
import onnxruntime
from protocol import serve

def load(path, inputs, threads):
    file = Path(path, "model.onnx") if Path(path).is_dir() else path
    session = onnxruntime.InferenceSession(str(file))
    names = [output.name for output in session.get_outputs()]
    arrays = dict(np.load(inputs))
    change = CHANGE
    return (
        lambda: session.run(None, arrays),
        lambda outputs: {{name: change(array) for name, array in zip(names, outputs)}},
    )

def compile(path, output, sparse):
    if sparse and FAILS:
        raise ValueError("an unknown layer")
    Path(output).mkdir()
    shutil.copy(path, Path(output, "model.onnx"))
    return {{}}

serve(load, compile=compile)
"""

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("remote"), "FOLDER", tmp_path)
    return importlib.import_module("sparse_peers")


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    here = Path(sys.executable)
    return argparse.Namespace(folder=tmp_path, deepsparse_python=here, itrex_python=here)


def write_worker(path: Path, *, change: str = "lambda array: array", fails: bool = False) -> None:
    path.write_text(WORKER.replace("CHANGE", change).replace("FAILS", str(fails)))


@pytest.fixture
def spec() -> ModelSpec:
    return tiny_spec(layers=1)


def zero_groups(path: Path, rows: int, cols: int) -> float:
    """Share of zero rows x cols (output x input) blocks in the encoder's int8 weights."""
    found = []
    for tensor in onnx.load(path).graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.dtype == np.int8 and weight.ndim == 2 and "encoder" in tensor.name:
            out, depth = weight.shape[1], weight.shape[0]
            blocks = weight.T.reshape(out // rows, rows, depth // cols, cols)
            found.append((blocks == 0).all(axis=(1, 3)).mean())
    return float(np.mean(found))


def test_deepsparse_gets_its_own_blocks_for_each_share_of_zeros(
    module: ModuleType, options: argparse.Namespace, spec: ModelSpec, tmp_path: Path
) -> None:
    write_worker(tmp_path / "deepsparse_worker.py")
    sides = module.sparse_peers(spec, options, ["deepsparse"], [75])
    assert [(side.setting, side.sparsity) for side in sides] == [
        ("dense", 0),
        ("1x1_75", 75),
        ("4x1_75", 75),
        ("1x4_75", 75),
    ]
    dense, single, tall, wide = (side.path for side in sides)
    # A block whose values are all below half a step is zero too: more, but few, of 4 values.
    assert zero_groups(dense, 4, 1) < 0.01
    assert zero_groups(single, 1, 1) == pytest.approx(0.75, abs=0.03)
    assert zero_groups(tall, 4, 1) == pytest.approx(0.75, abs=0.01)
    assert zero_groups(wide, 1, 4) == pytest.approx(0.75, abs=0.01)
    assert zero_groups(wide, 4, 1) < 0.5
    # Nothing is made twice.
    (tmp_path / "deepsparse_worker.py").unlink()
    assert module.sparse_peers(spec, options, ["deepsparse"], [75]) == sides
    assert {path.name for path in dense.parent.iterdir()} == {
        "samples.npz", dense.name, single.name, tall.name, wide.name
    }  # fmt: skip


def test_itrex_is_dense_below_its_least_zeros(
    module: ModuleType, options: argparse.Namespace, spec: ModelSpec, tmp_path: Path
) -> None:
    write_worker(tmp_path / "itrex_worker.py")
    sides = module.sparse_peers(spec, options, ["itrex"], [50, 75])
    copies = module.SPARSE_ENGINES["itrex"].copies
    assert [side.sparsity for side in sides] == [0] * copies + [75] * copies
    assert len({(side.group, side.setting) for side in sides}) == 2 * copies
    assert zero_groups(sides[-1].path / "model.onnx", 4, 1) == pytest.approx(0.75, abs=0.01)


def test_a_file_that_can_not_be_made_costs_its_settings(
    module: ModuleType,
    options: argparse.Namespace,
    spec: ModelSpec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_worker(tmp_path / "itrex_worker.py", fails=True)
    sides = module.sparse_peers(spec, options, ["itrex"], [75])
    assert {side.sparsity for side in sides} == {0}
    assert "ValueError: an unknown layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("lambda array: np.roll(array, 1)", "is wrong: cosine"),
        ("lambda array: array * np.nan", "is wrong: cosine"),
    ],
)
def test_wrong_answers_do_not_count(
    module: ModuleType,
    options: argparse.Namespace,
    spec: ModelSpec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    reason: str,
) -> None:
    write_worker(tmp_path / "itrex_worker.py", change=change)
    assert module.sparse_peers(spec, options, ["itrex"], []) == []
    assert reason in " ".join(capsys.readouterr().err.split())
    assert list((tmp_path / spec.name).glob("peer_itrex*")) == []


def test_a_cell_times_workers_beside_functions(
    module: ModuleType, spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = importlib.import_module("bench_models")
    files = importlib.import_module("bench_files")
    path = tmp_path / "model.onnx"
    build_file(spec, path)
    write_worker(tmp_path / "fake_worker.py")
    worker = module.Worker(Path(sys.executable), "fake_worker.py")
    ours = files.Library("dense", 0, tmp_path, {"max_abs_error": 0.0, "cosine": 1.0})
    sides = (
        files.Side("ORT fp32", "fp32", path),
        files.Side("fake int8", "one", path, worker=worker),
        files.Side("fake int8", "none", tmp_path / "no.onnx", worker=worker),
    )
    # Compiling a library is not what is tested here.
    arrays = {name: np.ones((1, 16), np.int64) for name in spec.input_names}
    monkeypatch.setattr(bench.sparsec, "load", lambda path, threads: lambda arrays: None)
    monkeypatch.setattr(bench, "random_inputs", lambda *_, **__: arrays)
    before = os.sched_getaffinity(0)
    try:
        outcomes = bench.measure(bench.Cell(1, 16, 1, 0.01, "wall", (ours,), sides))
    finally:
        os.sched_setaffinity(0, before)
    assert [bool(outcome.seconds) for outcome in outcomes] == [True, True, True, False]
    assert [outcome.failure for outcome in outcomes[:3]] == [None] * 3
    assert "no.onnx" in outcomes[3].failure
