"""Trained models in the repository: packed small, unpacked as they were."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from sparsec.errors import InvalidInput
from sparsec.models import stored


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a run of `sparsec compress` leaves, as far as it is kept."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("model.onnx", "tokenizer.json"):
        (folder / name).write_text(f"{name} " * 1000)
    recipe = {"model": str(folder / "dense"), "text": [str(folder / "a.txt")], "block": "16x1"}
    (folder / "result.json").write_text(json.dumps({"recipe": recipe, "dev": {}}))
    return folder


def test_a_packed_model_unpacks_as_it_was(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "FOLDER", tmp_path / "trained")
    kept = stored.pack(run_folder, "tiny", run_folder / "tokenizer.json")
    assert stored.stored_names() == ["tiny"]
    assert (kept / "model.onnx.xz").stat().st_size < 1000
    recipe = json.loads((kept / "result.json").read_text())["recipe"]
    assert recipe == {"model": "dense", "text": ["a.txt"], "block": "16x1"}  # no place of here
    made = stored.unpack("tiny", tmp_path / "out")
    assert made.onnx.read_bytes() == (run_folder / "model.onnx").read_bytes()
    assert made.tokenizer.read_bytes() == (run_folder / "tokenizer.json").read_bytes()


def test_a_model_that_is_too_large_is_not_kept(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "FOLDER", tmp_path / "trained")
    monkeypatch.setattr(stored, "LARGEST_BYTES", 10)
    with pytest.raises(InvalidInput, match=r"model\.onnx: .* MB compressed"):
        stored.pack(run_folder, "tiny", run_folder / "tokenizer.json")
    assert stored.stored_names() == []


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no trained model is called 'sst3'"):
        stored.unpack("sst3", tmp_path)


@pytest.mark.parametrize("name", stored.stored_names())
def test_every_stored_model_is_whole(name: str, tmp_path: Path) -> None:
    made = stored.unpack(name, tmp_path)
    onnx.checker.check_model(str(made.onnx))
    assert json.loads(made.tokenizer.read_text())["model"]["vocab"]
    assert json.loads((stored.FOLDER / name / stored.RESULT).read_text())["dev"]["library"]
