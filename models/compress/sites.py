"""Finds the parts of a Hugging Face encoder by name: what is pruned, and what goes with it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsec.errors import InvalidInput
from sparsec.models.encoder import BERT_NAMES, DISTILBERT_NAMES, LayerNames

# The list of layers by the end of its qualified name, and what the parts of a layer are called
# there. BERT's names serve RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA too.
LAYER_LISTS: Mapping[str, LayerNames] = {
    "encoder.layer": BERT_NAMES,
    "transformer.layer": DISTILBERT_NAMES,
}


INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of a batch; others are targets


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One encoder layer; `name` is its qualified name, weights are `[out, in]`."""

    name: str
    heads: int
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    ffn_in: nn.Linear
    ffn_out: nn.Linear
    output_norm: nn.LayerNorm


@dataclass(frozen=True, slots=True)
class EmbeddingParts:
    """What makes the input of the first layer; `projection` (ELECTRA) follows the norm."""

    tables: tuple[nn.Embedding, ...]
    norm: nn.LayerNorm
    projection: nn.Linear | None


def encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear of the encoder's layers by its qualified name in `model`, in order.

    Raises `InvalidInput` when `model` is no encoder that is known here.
    """
    name, layers, _ = _layer_list(model)
    return {
        f"{name}.{inner}": module
        for inner, module in layers.named_modules()
        if isinstance(module, nn.Linear)
    }


def layer_parts(model: nn.Module) -> tuple[LayerParts, ...]:
    """Return the parts of each encoder layer; raises `InvalidInput` for an unknown encoder."""
    name, layers, names = _layer_list(model)
    heads = int(model.config.num_attention_heads)
    fields = {field: getattr(names, field) for field in LayerNames.__dataclass_fields__}
    return tuple(
        LayerParts(
            name=f"{name}.{i}",
            heads=heads,
            **{field: _part(layer, path, f"{name}.{i}") for field, path in fields.items()},
        )
        for i, layer in enumerate(layers)
    )


def embedding_parts(model: nn.Module) -> EmbeddingParts:
    """Return what feeds the first layer; raises `InvalidInput` for an unknown encoder."""
    base = _encoder_root(model)
    embeddings = _embeddings(model)
    return EmbeddingParts(
        tables=tuple(m for m in embeddings.modules() if isinstance(m, nn.Embedding)),
        norm=_part(embeddings, "LayerNorm", "the embeddings"),
        projection=getattr(base, "embeddings_project", None),
    )


def vocabulary(model: nn.Module) -> int:
    """Return how many token ids the model has a row for."""
    table: Any = _part(_embeddings(model), "word_embeddings", "the embeddings")
    return int(table.num_embeddings)


def position_room(model: nn.Module) -> int | None:
    """Return how long a sequence may be; None where no table limits it.

    RoBERTa counts from behind the place of padding in its table.
    """
    table: Any = getattr(_embeddings(model), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    return int(table.num_embeddings) - (0 if table.padding_idx is None else table.padding_idx + 1)


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a batch is an input of this model: DistilBERT has no `token_type_ids`."""
    accepted = inspect.signature(model.forward).parameters
    return {name: batch[name] for name in INPUTS if name in accepted and name in batch}


def _embeddings(model: nn.Module) -> nn.Module:
    return _part(_encoder_root(model), "embeddings", "the encoder")


def _encoder_root(model: nn.Module) -> nn.Module:
    """Return the module that holds embeddings and layers: `model` or its `bert`, ..."""
    name, _, _ = _layer_list(model)
    return model.get_submodule(".".join(name.split(".")[:-2]))


def _layer_list(model: nn.Module) -> tuple[str, nn.ModuleList, LayerNames]:
    for name, module in model.named_modules():
        for ending, names in LAYER_LISTS.items():
            if isinstance(module, nn.ModuleList) and f".{name}".endswith(f".{ending}"):
                return name, module, names
    raise InvalidInput(
        f"{type(model).__name__} has no list of layers named {' or '.join(LAYER_LISTS)}; "
        "take a BERT, DistilBERT, RoBERTa or ELECTRA encoder"
    )


def _part(parent: nn.Module, path: str, place: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError:
        raise InvalidInput(
            f"{place} has no part {path}; take a BERT, DistilBERT, RoBERTa or ELECTRA encoder"
        ) from None
