"""`--balance` through the whole compiler: the report, the answers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.calibration import calibrate, channel_maxima
from sparsec.errors import InvalidInput
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.models.tiny import tiny_model
from sparsec.options import Calibration, CompileOptions
from sparsec.passes import balanced_values, graph_pipeline
from sparsec.passes.manager import PassManager
from sparsec.target import Target

OUTPUT = "last_hidden_state"


def sample() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    mask = np.ones((6, 12), np.int64)
    mask[1::2, 8:] = 0
    ids = rng.integers(0, 100, (6, 12))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def compiled(folder: Path, **options: Any) -> tuple[Any, np.ndarray]:
    """The report, and what the int8 library computes for the sample's real tokens."""
    onnx.save(tiny_model(), folder / "m.onnx")
    np.savez(folder / "samples.npz", **sample())
    options |= {"precision": "int8", "calibration": Calibration(data=folder / "samples.npz")}
    report = sparsec.compile_model(folder / "m.onnx", folder / "m.so", **options).report
    found = np.array(sparsec.load(folder / "m.so", threads=1)(sample())[OUTPUT])
    return report, found[sample()["attention_mask"] == 1]


def fp32_answers() -> np.ndarray:
    """By the oracle."""
    found = run(import_model(tiny_model()), sample())[OUTPUT]
    return found[sample()["attention_mask"] == 1]


def record(report: Any, name: str) -> Any:
    return next(r for r in report["passes"] if r["name"] == name)


def test_a_balanced_library_answers_as_fp32_does(tmp_path: Path):
    """Some layers int8 and some, by the bound, fp32 again."""
    report, found = compiled(tmp_path, balance=0.5, max_error=0.004)
    assert record(report, "balance")["changed"] == 6
    assert any("gelu" in note for note in record(report, "balance")["notes"])
    assert record(report, "unbalance")["changed"] > 0
    fp32 = {x["node"] for x in report["accuracy"]["layers"] if x["precision"] == "fp32"}
    quantised = {x["node"] for x in report["layers"] if x["op"].endswith("_int8")}
    assert fp32
    assert quantised
    assert not fp32 & quantised
    schedules = [x["schedule"] for x in report["layers"] if x["op"] == "layer_norm"]
    assert all(schedule.startswith("layer_norm") for schedule in schedules)
    exact = fp32_answers()
    # 0.004 is what the oracle measures; sums in another order may round a byte otherwise.
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.0045


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan"), float("inf")])
def test_bad_shares_are_refused(alpha: float):
    with pytest.raises(InvalidInput, match=r"--balance .*: wanted 0 to 1"):
        CompileOptions(
            Target.named("icelake-server"),
            precision="int8",
            calibration=Calibration(random=True),
            balance=alpha,
        )


@pytest.mark.parametrize("options", [{}, {"precision": "int8", "dynamic": True}])
def test_balancing_needs_samples(options: dict[str, Any]):
    with pytest.raises(InvalidInput, match="--balance is found on calibration data"):
        CompileOptions(Target.named("icelake-server"), balance=0.5, **options)


def test_maxima_of_channels_are_those_of_real_tokens():
    graph = import_model(tiny_model())
    PassManager(graph_pipeline()).run(graph)
    names = balanced_values(graph)
    first = {name: data[:2] for name, data in sample().items()}
    rest = {name: data[2:] for name, data in sample().items()}
    parts = channel_maxima(graph, [first, rest], names)
    whole = channel_maxima(graph, [sample()], names)
    ranges = calibrate(graph, [sample()], names)
    for name in names:
        assert parts[name].dtype == np.float32
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)
        limits = ranges[name]
        assert whole[name].max() == pytest.approx(max(-limits.low, limits.high))
    with pytest.raises(InvalidInput, match="no calibration sample"):
        channel_maxima(graph, [], names)
