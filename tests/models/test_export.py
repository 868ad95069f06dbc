"""Export of Hugging Face folders. Most of it needs torch, which the extra `compress` brings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from sparsec.errors import CompilerError, InvalidInput
from sparsec.models import export
from sparsec.models.__main__ import main
from sparsec.models.export import EXPORTERS, Exporter, export_file
from sparsec.models.registry import Head

SIZES = {"vocab_size": 100, "initializer_range": 0.2}
BERT = {
    **SIZES,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}
DISTILBERT = {
    **SIZES,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 64,
    "max_position_embeddings": 64,
}
TOKENS = ["input_ids", "attention_mask"]
TYPED = [*TOKENS, "token_type_ids"]
POOLED = ["last_hidden_state", "pooler_output"]
# model class, configuration, head to ask for, inputs and outputs to get
MODELS: list[tuple[str, dict[str, Any], Head, list[str], list[str]]] = [
    ("BertModel", BERT, "none", TYPED, POOLED),
    ("BertForMaskedLM", BERT, "none", TYPED, ["last_hidden_state"]),
    ("BertForSequenceClassification", BERT, "classify", TYPED, ["logits"]),
    ("RobertaModel", {**BERT, "type_vocab_size": 1}, "none", TOKENS, POOLED),
    ("DistilBertModel", DISTILBERT, "none", TOKENS, ["last_hidden_state"]),
    ("DistilBertForSequenceClassification", DISTILBERT, "classify", TOKENS, ["logits"]),
    ("DistilBertForQuestionAnswering", DISTILBERT, "qa", TOKENS, ["start_logits", "end_logits"]),
]


def save_model(name: str, config: dict[str, Any], folder: Path) -> None:
    """Write a folder of random weights, as save_pretrained does."""
    torch = pytest.importorskip("torch", reason="export needs the extra compress")
    transformers = pytest.importorskip("transformers", reason="export needs the extra compress")
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    kind(kind.config_class(**config)).save_pretrained(folder)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    ("name", "config", "head", "inputs", "outputs"), MODELS, ids=lambda x: str(x)[:40]
)
def test_exports(
    name: str,
    config: dict[str, Any],
    head: Head,
    inputs: list[str],
    outputs: list[str],
    exporter: Exporter,
    tmp_path: Path,
) -> None:
    folder, path = tmp_path / "folder", tmp_path / "m.onnx"
    save_model(name, config, folder)
    result = export_file(folder, path, head=head, exporter=exporter)
    assert result.files == [path]
    assert list(result.differences) == outputs
    assert max(result.differences.values()) < 1e-4  # fp32 on both sides
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == inputs
    assert [value.name for value in graph.output] == outputs
    for value in graph.input:
        assert [d.dim_param for d in value.type.tensor_type.shape.dim] == ["batch", "seq"]


@pytest.mark.parametrize(
    ("exporter", "opset"), [("torchscript", 11), ("torchscript", 20), ("dynamo", 23)]
)
def test_exports_to_the_opset_asked_for(exporter: Exporter, opset: int, tmp_path: Path) -> None:
    folder, path = tmp_path / "folder", tmp_path / "m.onnx"
    save_model("BertModel", BERT, folder)
    export_file(folder, path, exporter=exporter, opset=opset)
    assert onnx.load(path).opset_import[0].version == opset


@pytest.mark.parametrize(
    ("exporter", "opset"), [("torchscript", 10), ("torchscript", 21), ("dynamo", 17)]
)
def test_refuses_opsets_that_an_exporter_cannot_write(
    exporter: Exporter, opset: int, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=f"not {opset}"):
        export_file(tmp_path, tmp_path / "m.onnx", exporter=exporter, opset=opset)


def test_refuses_a_head_without_weights(tmp_path: Path) -> None:
    save_model("BertModel", BERT, tmp_path / "folder")
    with pytest.raises(InvalidInput, match="no weights for classifier"):
        export_file(tmp_path / "folder", tmp_path / "m.onnx", head="classify")
    assert not (tmp_path / "m.onnx").exists()


def test_refuses_an_export_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("BertModel", BERT, tmp_path / "folder")
    monkeypatch.setattr(export, "LARGEST_DIFFERENCE", 0.0)
    with pytest.raises(CompilerError, match="differs from torch's"):
        export_file(tmp_path / "folder", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", b'{"model_type": "unheard"}'),
        ("model.safetensors", b"damaged"),
    ],
)
def test_damaged_folders(
    file: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = tmp_path / "folder", tmp_path / "m.onnx"
    save_model("BertModel", BERT, folder)
    (folder / file).write_bytes(content)
    assert main(["export", str(folder), "-o", str(path)]) == 2
    assert f"error: {folder}: cannot be loaded" in capsys.readouterr().err.replace("\n", "")
    assert not path.exists()


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(InvalidInput, match="not a folder"):
        export_file(tmp_path / "none", path)
    with pytest.raises(InvalidInput, match=r"config\.json"):
        export_file(tmp_path, path)
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    with pytest.raises(InvalidInput, match="safetensors"):
        export_file(tmp_path, path)


def test_says_which_extra_brings_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "m.onnx")]) == 2
    assert "sparsec[compress]" in capsys.readouterr().err
