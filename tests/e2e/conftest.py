"""Compiled models that the end-to-end tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import sparsec
from sparsec.models.build import build_model
from sparsec.models.registry import find_model
from sparsec.models.tiny import tiny_model


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """`build(name, head)` -> (model.onnx, model.so), made once per name and head."""
    folder = tmp_path_factory.mktemp("models")

    def make(name: str, head: str = "none") -> tuple[Path, Path]:
        path = folder / f"{name}-{head}.onnx"
        library = path.with_suffix(".so")
        if not library.exists():
            onnx.save(_model(name, head), path)
            sparsec.compile_model(path, library)
        return path, library

    return make


def _model(name: str, head: str) -> onnx.ModelProto:
    if name.startswith("tiny-"):
        return tiny_model(name.removeprefix("tiny-"), head=head)
    return build_model(find_model(name), head=head, seed=0)
