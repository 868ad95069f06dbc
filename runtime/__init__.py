"""Load and run compiled models. Needs NumPy only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sparsec import errors
from sparsec.runtime import loader
from sparsec.runtime.loader import Model

__all__ = ["Model", "describe", "load"]

# `loader.py` stands alone beside a library, so it has errors of its own; within this package they
# are the ones that a user of the compiler knows.
_ERRORS = loader.ErrorTypes(
    invalid_input=errors.InvalidInput,
    abi_mismatch=errors.AbiMismatch,
    unsupported_cpu=errors.UnsupportedCpu,
    run_failed=errors.CompilerError,
)


def load(
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    pin: bool | Sequence[int] = False,
    isa: str | None = None,
) -> Model:
    """A model from a shared library; its errors are those of `sparsec.errors`.

    Of a library for several targets the best is used that this machine has, or that of the
    level `isa`.
    """
    return Model(path, threads=threads, pin=pin, isa=isa, errors=_ERRORS)


def describe(path: str | os.PathLike[str], isa: str | None = None) -> dict[str, Any]:
    """What a library says about itself; works for one that this CPU can not run."""
    with Model(path, threads=1, isa=isa, errors=_ERRORS, check_cpu=False) as model:
        return model.description
