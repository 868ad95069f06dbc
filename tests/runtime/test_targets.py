"""Which of a library's targets is used: by the CPU, by request, and when neither can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsec import errors
from sparsec.runtime import describe, load
from sparsec.target import Isa, Target


@pytest.fixture(scope="module")
def several(build_parts: Callable[..., Path]) -> Path:
    """For "any", which needs AVX2, and for machines with AMX, whose code says so."""
    return build_parts(("future", Isa.AMX, Isa.AMX), ("any", Isa.AVX2, Isa.AVX2))


@pytest.fixture
def amx_lacking(host: Target) -> None:
    if host.has(Isa.AMX):
        pytest.skip("this machine has every level")


def test_the_first_that_the_cpu_has(several: Path, host: Target) -> None:
    with load(several, threads=1) as model:
        assert model.targets == {"future": "amx", "any": "avx2"}
        assert model.target == ("future" if host.has(Isa.AMX) else "any")


def test_forced(several: Path) -> None:
    ids, x = np.array([[1, 2]]), np.ones((1, 2, 4), np.float32)
    with load(several, threads=1, isa="avx2") as forced, load(several, threads=1) as chosen:
        assert forced.target == "any"
        np.testing.assert_array_equal(
            forced({"ids": ids, "x": x})["y"], chosen({"ids": ids, "x": x})["y"]
        )


def test_forced_to_what_the_cpu_lacks(several: Path, amx_lacking: None) -> None:
    with pytest.raises(
        errors.UnsupportedCpu, match=r"compiled for amx; this machine lacks AMX-\w+; compile"
    ):
        load(several, isa="amx")
    assert describe(several, "amx")["isa"] == "amx"


@pytest.mark.parametrize("isa", ["avx512", "warp"])
def test_forced_to_what_the_library_lacks(isa: str, several: Path, library: Path) -> None:
    with pytest.raises(
        errors.InvalidInput, match=rf"'{isa}': .* has code for amx \(future\), avx2 \(any\)"
    ):
        load(several, isa=isa)
    with pytest.raises(errors.InvalidInput, match=r"has code for avx2 \(avx2\)"):
        load(library, isa=isa)


def test_the_last_says_what_lacks(build_parts: Callable[..., Path], amx_lacking: None) -> None:
    path = build_parts(("future", Isa.AMX, Isa.AMX))
    with pytest.raises(errors.UnsupportedCpu, match="compiled for amx"):
        load(path)


@pytest.mark.isa("avx512")
def test_what_code_needs_decides_and_then_whom_it_is_for(
    build_parts: Callable[..., Path], host: Target
) -> None:
    """Code for a better machine may need no more than this one has: then it is the best; but one
    of the same instructions that is made for a machine like this one is preferred."""
    for_future = ("future", Isa.AMX, Isa.AVX512)
    for_any = ("any", Isa.AVX2, Isa.AVX2)
    for_this = ("this", Isa.AVX512, Isa.AVX512)
    with load(build_parts(for_future, for_any), threads=1) as model:
        assert model.target == "future"
    with load(build_parts(for_future, for_this, for_any), threads=1) as model:
        assert model.target == ("future" if host.has(Isa.AMX) else "this")
