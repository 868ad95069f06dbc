"""python -m sparsec.models: what it writes, and what it says about bad requests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from sparsec.models.__main__ import main
from sparsec.sparse.bsr import block_zeros


def test_builds_a_pruned_model_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    command = ["build", "bert-mini", "-o", str(path), "--sparsity", "0.8", "--block", "16x1"]
    done = subprocess.run(
        [sys.executable, "-m", "sparsec.models", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {path} (")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    ffn = weights["encoder.layer.3.intermediate.dense.weight"].T
    assert ffn.shape == (1024, 256)
    assert block_zeros(ffn, [(16, 1)])[16, 1] == pytest.approx(0.8, abs=1e-4)


def test_options_reach_the_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    command = ["build", "bert-mini", "-o", str(path), "--head", "qa", "--opset", "20"]
    assert main([*command, "--ops", "fused", "--seed", "3"]) == 0
    model = onnx.load(path)
    assert [o.name for o in model.graph.output] == ["start_logits", "end_logits"]
    assert model.opset_import[0].version == 20
    assert "Gelu" in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bert-tiny"], "no model is called 'bert-tiny'"),
        (["bert-mini", "--sparsity", "1.5"], "0 to 1"),
        (["bert-mini", "--sparsity", "nan"], "0 to 1"),
        (["bert-mini", "--sparsity", "0.8", "--block", "4"], "ROWSxCOLS"),
        (["bert-mini", "--sparsity", "0.8", "--block", "4x-1"], "ROWSxCOLS"),
        (["bert-mini", "--sparsity", "0.8", "--block", "0x4"], "no rows or no columns"),
        (["bert-mini", "--sparsity", "0.8", "--block", "3x1"], "do not divide"),
        (["bert-mini", "--block", "4x1"], "--sparsity"),
        (["bert-mini", "--seed", "-1"], "seed"),
        (["bert-mini", "--opset", "9"], "opset 9"),
    ],
)
def test_bad_requests_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", *arguments, "-o", str(tmp_path / "m.onnx")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", [".", "no/such/folder/m.onnx"])
def test_bad_output_paths(output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "bert-mini", "-o", str(tmp_path / output)]) == 2
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_end_with_status_2(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["build", "bert-mini", "-o", str(tmp_path / "m.onnx"), "--head", "pooled"])
    assert stop.value.code == 2


def test_a_failed_build_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    assert main(["build", "bert-mini", "-o", str(path), "--opset", "9"]) == 2
    assert path.read_bytes() == b"old"
