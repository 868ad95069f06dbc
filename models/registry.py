"""The models that the zoo knows: their real shapes, without their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sparsec.errors import InvalidInput

Family = Literal["bert", "distilbert"]
Head = Literal["none", "classify", "qa"]

HEADS: tuple[Head, ...] = ("none", "classify", "qa")
# What a model gives, in order; the pooler's where it has one.
OUTPUTS: Mapping[Head, tuple[str, ...]] = {
    "none": ("last_hidden_state", "pooler_output"),
    "classify": ("logits",),
    "qa": ("start_logits", "end_logits"),
}
CLASSES = 2  # outputs of the classify head
TOKEN_TYPES = 2  # rows of the token type table


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """An encoder architecture: everything that fixes its shapes and its operators."""

    name: str
    family: Family
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int = 30522
    positions: int = 512
    epsilon: float = 1e-12  # of every LayerNorm

    def __post_init__(self) -> None:
        if self.heads < 1 or self.hidden % self.heads:
            raise InvalidInput(
                f"{self.name}: {self.hidden} hidden channels do not divide into {self.heads} heads"
            )

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden // self.heads

    @property
    def has_token_types(self) -> bool:
        """Whether the model reads `token_type_ids`."""
        return self.family == "bert"

    @property
    def has_pooler(self) -> bool:
        """Whether the headless model also gives `pooler_output`."""
        return self.family == "bert"

    @property
    def input_names(self) -> tuple[str, ...]:
        """Inputs in order; each is int64 [batch, seq]."""
        token_types = ("token_type_ids",) if self.has_token_types else ()
        return ("input_ids", "attention_mask", *token_types)

    def output_names(self, head: Head = "none") -> tuple[str, ...]:
        """Outputs in order for a head."""
        return output_names(head, with_pooler=self.has_pooler)


def output_names(head: Head, *, with_pooler: bool) -> tuple[str, ...]:
    """What a model with this head gives, in order, with the pooler's output or without."""
    return tuple(name for name in OUTPUTS[head] if with_pooler or name != "pooler_output")


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("bert-mini", "bert", layers=4, hidden=256, heads=4, ffn=1024),
        ModelSpec("minilm-l6", "bert", layers=6, hidden=384, heads=12, ffn=1536),
        ModelSpec("distilbert", "distilbert", layers=6, hidden=768, heads=12, ffn=3072),
        ModelSpec("bert-base", "bert", layers=12, hidden=768, heads=12, ffn=3072),
        ModelSpec("bert-large", "bert", layers=24, hidden=1024, heads=16, ffn=4096),
    )
}


def find_model(name: str) -> ModelSpec:
    """Return the spec of this name."""
    spec = MODELS.get(name)
    if spec is None:
        raise InvalidInput(f"no model is called {name!r}; known: {', '.join(MODELS)}")
    return spec
