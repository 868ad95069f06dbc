"""The benchmark of single kernels calls each with the parameters that it has."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_every_case_has_the_kernels_parameters(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("bench_kernels")
    monkeypatch.setattr(script, "matmul_of_onnxruntime", lambda m, k, tokens: None)
    monkeypatch.setattr(script, "floats", lambda *shape: np.empty(shape, np.float32))
    monkeypatch.setattr(script.Library, "__init__", lambda self: None)
    library = script.Library()
    library.library = MagicMock()  # nothing is built: `bind` counts the arguments
    families: dict[str, list[Any]] = {}
    for family, _, candidates in script.cases(isa, library):
        families.setdefault(family, []).extend(candidates)
    assert set(families) == set(script.TIMED)
    assert all(families.values())
