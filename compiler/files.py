"""What is written: files that are there whole or not at all, and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsec.errors import InvalidInput


def check_writable(path: Path, *kept: Path) -> None:
    """Raises InvalidInput where no file can be made, before any work is done for it, and where
    that would replace one of `kept`: what the work is done with, or makes."""
    for other in kept:
        if path.resolve() == other.resolve():
            raise InvalidInput(f"{path}: would replace {other}; name another file")
    if path.is_dir():
        raise InvalidInput(f"{path}: is a folder; name a file in it")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise InvalidInput(f"{path}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise InvalidInput(f"{path}: the folder {folder} can not be written to")


def make_folder(path: Path) -> None:
    """Raises InvalidInput where there can be none, or none to write to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"{path}: can not be made a folder: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InvalidInput(f"{path}: the folder can not be written to")


def json_text(data: Any) -> str:
    """As text that any reader of JSON takes: what is infinite or no number is null."""
    return json.dumps(_finite(data), indent=1, allow_nan=False)


def _finite(data: Any) -> Any:
    match data:
        case dict():
            return {key: _finite(value) for key, value in data.items()}
        case list() | tuple():
            return [_finite(value) for value in data]
        case float() if not math.isfinite(data):
            return None
    return data


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another path to write to, which becomes `path` at the end, or is removed on any error.

    A link stays one: what it points to is replaced. Raises InvalidInput, naming `path`, for an
    error of the system.
    """
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise InvalidInput(f"{path}: can not be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
