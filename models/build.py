"""Builds the ONNX of a spec with random weights: no torch, any sparsity pattern, same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from sparsec.errors import InvalidInput
from sparsec.models.encoder import EncoderWriter
from sparsec.models.files import write_model
from sparsec.models.registry import HEADS, Head, ModelSpec
from sparsec.models.weights import Pruning, RandomWeights

DEFAULT_OPSET = 17


def build_model(
    spec: ModelSpec,
    *,
    head: Head = "none",
    seed: int = 0,
    pruning: Pruning | None = None,
    opset: int = DEFAULT_OPSET,
    spelled: bool = True,
    on_layer: Callable[[], None] = lambda: None,
) -> onnx.ModelProto:
    """Return an encoder with random weights; `on_layer` is called after each layer.

    `spelled` writes LayerNorm and GELU in elementary operators, as older exporters do.
    """
    if head not in HEADS:
        raise InvalidInput(f"no head is called {head!r}; known: {', '.join(HEADS)}")
    if seed < 0:
        raise InvalidInput(f"the seed is not negative, but {seed} is")
    if pruning is not None:
        pruning.check(spec)
    weights = RandomWeights(seed, pruning)
    writer = EncoderWriter(spec, weights, opset=opset, spelled=spelled, on_layer=on_layer)
    writer.write(head)
    return writer.g.model()


def build_file(
    spec: ModelSpec,
    path: Path,
    *,
    head: Head = "none",
    seed: int = 0,
    pruning: Pruning | None = None,
    opset: int = DEFAULT_OPSET,
    spelled: bool = True,
    on_layer: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Build the model into `path` and return the files written."""
    model = build_model(
        spec,
        head=head,
        seed=seed,
        pruning=pruning,
        opset=opset,
        spelled=spelled,
        on_layer=on_layer,
    )
    return write_model(model, path)
