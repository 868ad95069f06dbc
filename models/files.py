"""Writes ONNX files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import onnx
from onnx import external_data_helper

from sparsec.errors import InvalidInput
from sparsec.files import check_writable

# A protobuf message must stay below 2 GiB; above this the weights go to FILE.data.
EXTERNAL_ABOVE_BYTES = 1_500_000_000


def write_model(
    model: onnx.ModelProto, path: Path, *, external_above_bytes: int = EXTERNAL_ABOVE_BYTES
) -> list[Path]:
    """Write `model`, its weights beside it when large, and return the files written.

    Everything is written in a folder beside `path` first, then renamed, the model last.
    A model whose weights went to a second file refers to it afterwards.
    """
    check_writable(path)
    weight_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    external = weight_bytes > external_above_bytes
    data_name = f"{path.name}.data"
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            part = Path(folder, path.name)
            if external:
                external_data_helper.convert_model_to_external_data(model, location=data_name)
                model = external_data_helper.write_external_data_tensors(model, folder)
            part.write_bytes(model.SerializeToString(deterministic=True))
            names = [data_name, path.name] if external else [path.name]
            for name in names:
                os.replace(Path(folder, name), path.parent / name)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written: {error.strerror or error}") from error
    return [path.parent / name for name in reversed(names)]
