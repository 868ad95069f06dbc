"""The shape that a tool runs: asked for, compiled in, or usual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from sparsec.errors import InvalidInput
from sparsec.runtime.loader import Port
from sparsec.tools.inputs import run_shape


@dataclass(frozen=True, slots=True)
class Ports:
    """A library as far as `run_shape` looks at it."""

    inputs: list[Port]


def library(*shapes: tuple[int | str, ...]) -> Any:
    return Ports([Port(f"x{i}", np.dtype(np.int64), s) for i, s in enumerate(shapes)])


@pytest.mark.parametrize(("shapes", "asked", "run"), [
    ([("batch", "seq")], (None, None), (1, 128)),
    ([("batch", "seq")], (3, 5), (3, 5)),
    ([(8, 32)], (None, None), (8, 32)),
    ([(8, 32)], (8, None), (8, 32)),
    ([("batch", 32)], (4, None), (4, 32)),
    ([("batch", "seq"), ("batch", 5)], (2, 7), (2, 7)),  # a table beside the tokens
    ([(1, 3, 224, 224)], (None, None), (1, 128)),
    ([(8, 32), (8, 16)], (None, 16), (8, 16)),
    ([()], (None, 16), (1, 16)),
])  # fmt: skip
def test_what_is_run(
    shapes: list[tuple[int | str, ...]], asked: tuple[Any, Any], run: tuple[int, int]
) -> None:
    assert run_shape(library(*shapes), *asked) == run


@pytest.mark.parametrize(("asked", "message"), [
    ((4, None), "batch 4: the library is compiled for 8 alone"),
    ((8, 128), "seq 128: the library is compiled for 32 alone"),
])  # fmt: skip
def test_another_shape_than_the_library_has_is_refused(
    asked: tuple[Any, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        run_shape(library((8, 32), (8, 32)), *asked)
