"""Trained block-sparse models that are kept here, compressed, and how they were made.

models/trained/NAME/model.onnx.xz  tokenizer.json.xz  result.json
"""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsec.errors import InvalidInput
from sparsec.files import replacing

FOLDER = Path(__file__).parent / "trained"
FILES = ("model.onnx", "tokenizer.json")
RESULT = "result.json"  # recipe, seeds, metrics and latencies of the run that made the model
LARGEST_BYTES = 16_000_000  # of a stored model


@dataclass(frozen=True, slots=True)
class Stored:
    """A model taken out of the repository: files in a folder of the user's."""

    onnx: Path
    tokenizer: Path


def stored_names() -> list[str]:
    """Return the names of the models that are kept here."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{RESULT}"))


def unpack(name: str, folder: Path) -> Stored:
    """Write the files of a stored model into `folder`, unless they are there already."""
    source = FOLDER / name
    if name not in stored_names():
        raise InvalidInput(f"no trained model is called {name!r}; known: {stored_names()}")
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        data = lzma.decompress((source / f"{file}.xz").read_bytes())
        _write(folder / file, data)
    return Stored(*(folder / file for file in FILES))


def pack(run: Path, name: str, tokenizer: Path) -> Path:
    """Keep what `sparsec compress` wrote to `run` under `name`; returns its folder here."""
    target = FOLDER / name
    target.mkdir(parents=True, exist_ok=True)
    for file, source in zip(FILES, (run / "model.onnx", tokenizer), strict=True):
        packed = lzma.compress(source.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
        if len(packed) > LARGEST_BYTES:
            raise InvalidInput(
                f"{source}: {len(packed) / 1e6:.1f} MB compressed; at most "
                f"{LARGEST_BYTES / 1e6:.0f} MB are kept in the repository"
            )
        _write(target / f"{file}.xz", packed)
    result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    result["recipe"] = _without_folders(result["recipe"])
    _write(target / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return target


def _without_folders(value: Any) -> Any:
    """Files and folders of the machine that ran a recipe, by their last name."""
    match value:
        case dict():
            return {name: _without_folders(one) for name, one in value.items()}
        case list():
            return [_without_folders(one) for one in value]
        case str() if value.startswith("/"):
            return Path(value).name
    return value


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(data)
