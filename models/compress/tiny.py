"""Configurations of two-layer encoders of a few kilobytes: architectures at a size for tests."""

from __future__ import annotations

from typing import Any

import transformers

_CLASSES = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "electra": transformers.ElectraConfig,
    "distilbert": transformers.DistilBertConfig,
}
_DISTILBERT = {  # its names
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
}
ARCHITECTURES = tuple(_CLASSES)


def tiny_config(name: str, **changes: Any) -> Any:
    """Return a transformers config: two layers, four heads, 32 channels; `changes` go by BERT's
    names. ELECTRA's embeddings have 16 channels and a projection."""
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        **({"embedding_size": 16} if name == "electra" else {}),
        **changes,
    }
    names = _DISTILBERT if name == "distilbert" else {}
    return _CLASSES[name](**{names.get(key, key): value for key, value in sizes.items()})
