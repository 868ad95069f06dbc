"""Hugging Face model folders: loading with a task's head, saving whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsec.errors import InvalidInput
from sparsec.models.compress.data import TOKENIZER_FILE
from sparsec.models.compress.tasks import Task
from sparsec.models.export import load_pretrained

COPIED = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def load_model(folder: Path, task: Task, seed: int) -> tuple[Any, list[str]]:
    """Return the model with the head of `task` and the names of weights the folder lacked.

    Weights that are missing (a new head) depend on `seed`. Raises InvalidInput for a folder that
    holds no model, or one with another number of classes.
    """
    classes = {"num_labels": task.classes} if task.head == "classify" else {}
    torch.manual_seed(seed)
    model, missing = load_pretrained(folder, task.head, **classes)
    if missing and any(".layer." in key or "embeddings" in key for key in missing):
        raise InvalidInput(f"{folder}: has no weights for {', '.join(missing[:4])}")
    return model, missing


def save_model(
    model: Any, tokenizer_folder: Path, folder: Path, more: Mapping[str, str] | None = None
) -> None:
    """Write `model`, the tokenizer's files and `more` texts by file name as a model folder."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(str(part))
        for name in COPIED:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, part / name)
        for name, text in (more or {}).items():
            (part / name).write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise InvalidInput(f"{folder}: cannot be written ({error})") from error
