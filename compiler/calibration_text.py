"""Calibration samples from plain text, through a model's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.calibration import BATCH, Feed
from sparsec.errors import InvalidInput
from sparsec.ir.graph import Graph

MAX_LINES = 200  # more change the ranges little
MAX_TOKENS = 128

# What a tokenizer gives, by the names that exporters use for the inputs.
FIELDS = {
    "input_ids": "ids",
    "attention_mask": "attention_mask",
    "token_type_ids": "type_ids",
}


def text_batches(path: Path, tokenizer: Path, graph: Graph) -> Iterator[Feed]:
    """The first lines of `path` as padded batches of the graph's inputs.

    Raises InvalidInput when the tokenizer can not be read, the text is empty, or the model has an
    input that a tokenizer does not give.
    """
    unknown = [v.name for v in graph.inputs if v.name not in FIELDS]
    if unknown:
        raise InvalidInput(
            f"the model's input {unknown[0]!r} does not come from a tokenizer (those are "
            f"{', '.join(FIELDS)}); give --calibration FILE.npz instead"
        )
    encode = _tokenizer(tokenizer)
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line][:MAX_LINES]
    if not lines:
        raise InvalidInput(f"{path}: no line of text")
    for start in range(0, len(lines), BATCH):
        rows = encode(lines[start : start + BATCH])
        yield {
            value.name: np.array(
                [getattr(row, FIELDS[value.name]) for row in rows], value.type.dtype.numpy
            )
            for value in graph.inputs
        }


def _tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InvalidInput(
            "the package tokenizers is not installed; pip install 'sparsec[compiler]'"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InvalidInput(f"{path}: not a tokenizer.json: {error}") from None
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    return tokenizer.encode_batch
