"""Two-layer encoders of a few kilobytes: the zoo's graphs at a size for tests."""

from __future__ import annotations

import onnx

from sparsec.models.build import build_model
from sparsec.models.registry import Family, Head, ModelSpec


def tiny_spec(
    family: Family = "bert",
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 2,
    ffn: int = 64,
    vocab: int = 100,
    positions: int = 64,
) -> ModelSpec:
    """Return the spec of a tiny encoder; any size can be chosen."""
    return ModelSpec(f"tiny-{family}", family, layers, hidden, heads, ffn, vocab, positions)


def tiny_model(
    family: Family = "bert", *, head: Head = "none", opset: int = 17, seed: int = 0
) -> onnx.ModelProto:
    """Return a tiny encoder of the default size."""
    return build_model(tiny_spec(family), head=head, opset=opset, seed=seed)
