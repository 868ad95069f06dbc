"""Runs a compiled model on the arrays of an npz file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from sparsec.errors import InvalidInput
from sparsec.files import check_writable, replacing
from sparsec.runtime import load


def run_file(
    library: Path, inputs: Path, outputs: Path, *, threads: int, isa: str | None = None
) -> list[str]:
    """Read `inputs`, run, write `outputs`; returns a line per output.

    Raises InvalidInput when the npz file can not be read or does not fit the model.
    """
    check_writable(outputs, library, inputs)
    try:
        with np.load(inputs) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise InvalidInput(f"{inputs}: not an npz file of plain arrays: {error}") from None
    results = load(library, threads=threads, isa=isa)(arrays)
    with replacing(outputs) as path, path.open("wb") as file:
        np.savez(file, **results)  # type: ignore[arg-type]  # its stub takes no array names
    return [f"{name}: {array.dtype} {list(array.shape)}" for name, array in results.items()]
