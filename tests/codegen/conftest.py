"""Generic kernels linked into a shared library and called through ctypes."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsec.codegen import tir, toolchain
from sparsec.codegen.generic_op import GenericOp
from sparsec.codegen.isa import FEATURES
from sparsec.ir.dims import evaluate
from sparsec.target import Isa, Target

Array = np.ndarray[Any, Any]


class Kernels:
    """Kernels of one ISA, in two objects as a model may have them."""

    def __init__(self, kernels: Sequence[GenericOp], isa: Isa, folder: Path):
        functions = [k.build() for k in {k.name: k for k in kernels}.values()]
        halves = (functions[0::2], functions[1::2])
        library = folder / "kernels.so"
        toolchain.link_kernels([tir.build_object(h, FEATURES[isa]) for h in halves], library)
        ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(library))
        self.items = {k.name: k.plan().items for k in kernels}

    def run(
        self, kernel: GenericOp, arrays: Sequence[Array], env: Mapping[str, int], pieces: int = 1
    ) -> tuple[int, Array]:
        """Status and result; the items are cut into `pieces` ranges."""
        shape = [evaluate(d, env) for d in kernel.result.shape]
        result = np.full(shape, 77).astype(kernel.result.dtype.numpy)
        function = getattr(self.library, kernel.name)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*arrays, result)]
        sizes = [ctypes.c_int64(env[s]) for s in kernel.symbols]
        items = evaluate(self.items[kernel.name], env)
        status = 0
        for begin, end in itertools.pairwise(items * p // pieces for p in range(pieces + 1)):
            call = [*pointers, *sizes, ctypes.c_int64(begin), ctypes.c_int64(end)]
            status = function(*call) or status
        return status, result


@pytest.fixture(scope="session")
def link_kernels(
    host: Target, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Sequence[GenericOp]], Kernels]:
    """Builds kernels that share an ISA; skips where this CPU does not have it."""

    def link(kernels: Sequence[GenericOp]) -> Kernels:
        isa = Isa(kernels[0].isa)
        if not host.has(isa):
            pytest.skip(f"this CPU has no {isa.value}")
        return Kernels(kernels, isa, tmp_path_factory.mktemp("kernels"))

    return link
