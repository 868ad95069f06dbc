"""Checkpoints that are whole or not there: written beside, then renamed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from sparsec.errors import InvalidInput


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts, and dicts and lists of them) to `path`.

    Raises InvalidInput when the disk does not take it; what was at `path` is still there then.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch wraps what its writer meets
        with contextlib.suppress(OSError):
            part.unlink()
        raise InvalidInput(
            f"{path}: cannot be written ({error}); earlier checkpoints are whole: make room and "
            "go on with --resume"
        ) from error


def load(path: Path, device: Any = "cpu") -> dict[str, Any]:
    """Read what `save` wrote; raises InvalidInput for a file that it did not."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise InvalidInput(
            f"{path}: is no checkpoint that can be read ({first_line}); delete it to do its "
            "stage again"
        ) from error
    if not isinstance(state, dict):
        raise InvalidInput(f"{path}: is no checkpoint of `sparsec compress`; delete it")
    return state
