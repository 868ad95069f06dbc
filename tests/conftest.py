"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsec.target import Isa, Target

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests whose `isa(name)` mark this CPU does not meet, and says which."""
    host = Target.host()
    for item in items:
        for mark in item.iter_markers("isa"):
            isa = Isa(mark.args[0])
            if not host.has(isa):
                item.add_marker(pytest.mark.skip(reason=f"this CPU has no {isa.value}"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20230616)


@pytest.fixture(scope="session")
def host() -> Target:
    return Target.host()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with `tests/golden/NAME.txt`; `--update-golden` rewrites the file."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert path.exists(), f"{path.name} is missing: run pytest --update-golden"
        assert text == path.read_text()

    return check
