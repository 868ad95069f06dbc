"""Hugging Face model folders: loading with a task's head, saving whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from sparsec.errors import InvalidInput
from sparsec.models.compress.data import TOKENIZER_FILE
from sparsec.models.compress.tasks import Task
from sparsec.models.export import AUTO_CLASSES, check_folder

COPIED = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def load_model(folder: Path, task: Task, seed: int) -> tuple[Any, list[str]]:
    """Return the model with the head of `task` and the names of weights the folder lacked.

    Weights that are missing (a new head) depend on `seed`. Raises InvalidInput for a folder that
    holds no model, or one with another number of classes.
    """
    check_folder(folder)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    auto = getattr(transformers, AUTO_CLASSES[task.head])
    classes = {"num_labels": task.classes} if task.head == "classify" else {}
    torch.manual_seed(seed)
    try:
        model, info = auto.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            dtype="float32",
            # On a CPU, training steps take a third of the time of torch's fused attention.
            attn_implementation="eager",
            output_loading_info=True,
            **classes,
        )
    except Exception as error:  # transformers and safetensors raise many kinds for a bad folder
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise InvalidInput(f"{folder}: cannot be loaded by transformers: {first_line}") from error
    missing = sorted(str(key) for key in info["missing_keys"])
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
