"""What a model is compressed for: how examples are read, learnt from and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sparsec.errors import InvalidInput
from sparsec.models.compress import metrics
from sparsec.models.compress.data import Batch, Encoded, batches, encode
from sparsec.models.compress.distil import mean_pooled
from sparsec.models.compress.readers import (
    LARGEST_SCORE,
    SST2_CLASSES,
    read_pairs,
    read_pieces,
    read_sentences,
)
from sparsec.models.compress.squad import predict_spans, read_squad, score_spans, span_loss
from sparsec.models.registry import Head, output_names

Array = NDArray[Any]
Arrays = Mapping[str, Array]

EVALUATION_TOKENS = 4096  # of a batch
LEAST_NORM = 1e-12  # of an embedding, so that one of zeros has the cosine 0


@dataclass(frozen=True, slots=True)
class Task:
    """A task; the functions work on one batch, but for `read` and `score`.

    `head` is the model's (sparsec.models.registry), with `classes` outputs for "classify".
    `metric` is the key of `score` by which models are selected, higher is better; "" where there
    is no score.
    Outputs are by name: "logits" fp32 [rows, classes], "last_hidden_state" [rows, seq, hidden],
    "start_logits" and "end_logits" [rows, seq].

    read(path, tokenizer, max_length): all examples of a file, or InvalidInput naming the line.
    loss(outputs, batch): from the labels, a scalar; None where there are none to learn from.
    predict(outputs, batch): in NumPy, one prediction per example.
    score(predictions, encoded): figures by name, for the predictions of all examples in order.
    """

    name: str
    head: Head
    metric: str
    classes: int
    read: Callable[[Path, Tokenizer, int], Encoded]
    loss: Callable[[Mapping[str, torch.Tensor], Batch], torch.Tensor | None]
    predict: Callable[[Arrays, Arrays], Any]
    score: Callable[[Any, Encoded], dict[str, float]]

    @property
    def has_labels(self) -> bool:
        """Whether there is a loss from labels; else a model learns from another one alone."""
        return self.loss is not _no_loss

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a model has to give for this task."""
        return output_names(self.head, with_pooler=False)


def find_task(name: str) -> Task:
    """The task of this name that a model can be compressed for: one with a metric.

    Raises InvalidInput when there is none.
    """
    known = [task.name for task in TASKS.values() if task.metric]
    if name not in known:
        raise InvalidInput(f"--task {name!r}: wanted one of {', '.join(known)}")
    return TASKS[name]


def evaluate(
    run: Callable[[dict[str, Array]], Arrays], task: Task, encoded: Encoded
) -> dict[str, float]:
    """The score of a model; `run` makes a batch's outputs from its arrays (Encoded.arrays)."""
    found: list[Any] = [None] * len(encoded)
    tokens = max(1, EVALUATION_TOKENS // encoded.rows_per_example)
    for indices in batches(encoded.lengths, tokens, seed=0, epoch=0):
        arrays = encoded.arrays(indices)
        predictions = task.predict(run(arrays), arrays)
        for index, prediction in zip(indices, predictions, strict=True):
            found[index] = prediction
    return task.score(found, encoded)


def _read_sst2(path: Path, tokenizer: Tokenizer, max_length: int) -> Encoded:
    sentences, labels = read_sentences(path, SST2_CLASSES)
    return encode(tokenizer, [sentences], max_length, {"labels": np.array(labels, np.int64)})


def _read_stsb(path: Path, tokenizer: Tokenizer, max_length: int) -> Encoded:
    left, right, scores = read_pairs(path)
    labels = np.array(scores, np.float32)
    return encode(tokenizer, [left, right], max_length, {"labels": labels})


def _read_text(path: Path, tokenizer: Tokenizer, max_length: int) -> Encoded:
    return encode(tokenizer, [read_pieces(path, tokenizer, max_length)], max_length, {})


def _read_embed(path: Path, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Pairs with scores where the file's name ends in .csv, else plain text."""
    reader = _read_stsb if path.suffix == ".csv" else _read_text
    return reader(path, tokenizer, max_length)


def _class_loss(outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor | None:
    logits = outputs["logits"].float()  # bf16 under autocast
    loss: torch.Tensor = torch.nn.functional.cross_entropy(logits, batch["labels"])
    return loss


def _cosine_loss(outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor | None:
    """Mean squared error of the cosines against the scores brought to 0 .. 1."""
    pooled = mean_pooled(outputs["last_hidden_state"], batch["attention_mask"])
    left, right = pooled.chunk(2)
    cosine = torch.nn.functional.cosine_similarity(left, right)
    loss: torch.Tensor = torch.nn.functional.mse_loss(cosine, batch["labels"] / LARGEST_SCORE)
    return loss


def _no_loss(outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor | None:
    return None


def _predict_class(outputs: Arrays, batch: Arrays) -> Any:
    return outputs["logits"].argmax(axis=-1)


def _predict_cosine(outputs: Arrays, batch: Arrays) -> Any:
    """The cosine of the mean-pooled states of both rows, float64 [examples]."""
    real = batch["attention_mask"].astype(bool)[..., None]
    # Not multiplied by the mask: what a model leaves at padding need not be finite.
    states = np.where(real, outputs["last_hidden_state"], 0).astype(np.float64)
    means = states.sum(axis=1) / real.sum(axis=1)
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    left, right = np.split(means / np.maximum(norms, LEAST_NORM), 2)
    return (left * right).sum(axis=1)


def _predict_nothing(outputs: Arrays, batch: Arrays) -> Any:
    return np.zeros(len(batch["input_ids"]))


def _predict_embed(outputs: Arrays, batch: Arrays) -> Any:
    predict = _predict_cosine if "labels" in batch else _predict_nothing
    return predict(outputs, batch)


def _score_class(predictions: Any, encoded: Encoded) -> dict[str, float]:
    return {"accuracy": metrics.accuracy(predictions, encoded.targets["labels"])}


def _score_cosine(predictions: Any, encoded: Encoded) -> dict[str, float]:
    """Spearman's and Pearson's correlation with the scores; nothing for plain text."""
    labels = encoded.targets.get("labels")
    if labels is None:
        return {}
    kinds = {"spearman": metrics.spearman, "pearson": metrics.pearson}
    return {name: kind(predictions, labels) for name, kind in kinds.items()}


def _score_nothing(predictions: Any, encoded: Encoded) -> dict[str, float]:
    return {}


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst2", "classify", "accuracy", SST2_CLASSES,
             _read_sst2, _class_loss, _predict_class, _score_class),
        Task("stsb", "none", "spearman", 0,
             _read_stsb, _cosine_loss, _predict_cosine, _score_cosine),
        Task("embed", "none", "spearman", 0,
             _read_embed, _no_loss, _predict_embed, _score_cosine),
        Task("squad", "qa", "f1", 0,
             read_squad, span_loss, predict_spans, score_spans),
        Task("text", "none", "", 0,
             _read_text, _no_loss, _predict_nothing, _score_nothing),
    )
}  # fmt: skip
