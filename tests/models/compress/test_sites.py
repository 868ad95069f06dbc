"""The parts of the encoders are found by name in four architectures, with and without a head."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="compress needs the extra compress")
transformers = pytest.importorskip("transformers", reason="compress needs the extra compress")

from sparsec.errors import InvalidInput  # noqa: E402
from sparsec.models.compress.sites import (  # noqa: E402
    embedding_parts,
    encoder_linears,
    layer_parts,
    model_inputs,
)
from sparsec.models.compress.tiny import ARCHITECTURES, tiny_config  # noqa: E402

AUTO = (
    transformers.AutoModel,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForQuestionAnswering,
)


@pytest.mark.parametrize("auto", AUTO, ids=lambda a: a.__name__)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_are_found(name: str, auto: Any) -> None:
    model = auto.from_config(tiny_config(name))
    linears = encoder_linears(model)
    layers = layer_parts(model)
    assert len(layers) == 2
    assert len(linears) == 12  # six a layer
    for key, linear in linears.items():
        assert model.get_submodule(key) is linear
    found = [
        part
        for layer in layers
        for part in (
            layer.query,
            layer.key,
            layer.value,
            layer.attention_output,
            layer.ffn_in,
            layer.ffn_out,
        )
    ]
    assert [id(part) for part in found] == [id(linear) for linear in linears.values()]
    assert layers[1].ffn_in.weight.shape == (64, 32)
    assert layers[0].heads == 4
    assert layers[0].attention_norm is not layers[0].output_norm


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embeddings_are_found(name: str) -> None:
    model = transformers.AutoModelForSequenceClassification.from_config(tiny_config(name))
    parts = embedding_parts(model)
    width = 16 if name == "electra" else 32
    assert {t.weight.shape[1] for t in parts.tables} == {width}
    assert len(parts.tables) == (2 if name == "distilbert" else 3)
    assert parts.norm.weight.shape == (width,)
    assert (parts.projection is not None) == (name == "electra")


def test_other_models_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"no list of layers.*take a BERT"):
        encoder_linears(torch.nn.Sequential(torch.nn.Linear(4, 4)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_given_its_inputs_and_no_targets(name: str) -> None:
    model = transformers.AutoModel.from_config(tiny_config(name))
    batch = dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), torch.ones(2, 3).long()
    )
    given = model_inputs(model, {**batch, "labels": torch.zeros(2)})
    assert list(given) == list(batch)[: 2 if name == "distilbert" else 3]
    assert model(**given).last_hidden_state.shape == (2, 3, 32)
