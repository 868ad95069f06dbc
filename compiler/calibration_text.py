"""Calibration samples from plain text, through a model's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.calibration import BATCH, Feed, batch_size, largest
from sparsec.errors import InvalidInput, MissingPackage
from sparsec.ir import dims
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

    Where the model fixes the length, all are padded or cut to it; where it fixes the batch, the
    last one is filled up with the first lines. Raises InvalidInput when the tokenizer can not be
    read, the text is empty, or the model has an input that a tokenizer does not give.
    """
    unknown = [v.name for v in graph.inputs if v.name not in FIELDS]
    if unknown:
        raise InvalidInput(
            f"the model's input {unknown[0]!r} does not come from a tokenizer (those are "
            f"{', '.join(FIELDS)}); give --calibration FILE.npz instead"
        )
    encode = _tokenizer(tokenizer, graph)
    lines = _lines(path)[:MAX_LINES]
    size = batch_size(graph)
    if size is not None:
        lines = list(islice(cycle(lines), -(-len(lines) // size) * size))
    for start in range(0, len(lines), size or BATCH):
        rows = encode(lines[start : start + (size or BATCH)])
        yield {
            value.name: np.array(
                [getattr(row, FIELDS[value.name]) for row in rows], value.type.dtype.numpy
            )
            for value in graph.inputs
        }


def _lines(path: Path) -> list[str]:
    """Those that are not empty. Raises InvalidInput when there is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read as text in UTF-8: {error}") from None
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise InvalidInput(f"{path}: no line of text")
    return found


def _tokenizer(path: Path, graph: Graph) -> Any:
    """What makes a batch of lines a batch of rows that the graph can run."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise MissingPackage("tokenizers") from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InvalidInput(f"{path}: not a tokenizer.json: {error}") from None
    lengths = [d for v in graph.inputs for d in v.type.shape[1:]]
    fixed = next((d for d in lengths if isinstance(d, int)), None)
    most = [largest(graph, name) for d in lengths for name in dims.symbols(d)]
    tokenizer.enable_truncation(fixed or min([MAX_TOKENS, *most]))
    tokenizer.enable_padding(length=fixed)
    return tokenizer.encode_batch
