"""A kernel's fingerprint changes with the code that makes it, and with nothing else."""

from __future__ import annotations

import time

import pytest

from sparsec.codegen.kernels import FAMILIES
from sparsec.codegen.kernels.revision import _reached, fingerprint, module_revision, revision


def test_each_family_has_its_own() -> None:
    found = [revision(op) for op in ("linear", "linear_int8", "attention", "layer_norm")]
    assert None not in found
    assert len(set(found)) == len(found)
    assert revision("no_such_op") is None


def test_a_family_covers_its_instruction_sets_and_no_other_family() -> None:
    reached = _reached("sparsec.codegen.kernels.int8_family")
    assert {"sparsec.codegen.kernels.int8_gemm", "sparsec.codegen.isa.int8"} <= reached
    assert "sparsec.codegen.kernels.layer_norm" not in reached
    assert "sparsec.codegen.kernels.int8_cost" not in reached  # it makes no kernel


@pytest.mark.parametrize("op", ["linear", "linear_int8", "attention", "layer_norm", "to_bf16"])
def test_all_families_cover_what_calls_llvm_and_their_vectors(op: str) -> None:
    reached = _reached(type(FAMILIES[op]).__module__)
    assert {"sparsec.codegen.tir", "sparsec.codegen.isa.avx512"} <= reached


def test_what_does_not_run_does_not_count() -> None:
    plain = "def f(x):\n    return x + 1\n"
    noted = '"""Text."""\n\n\ndef f(x):  # why\n    """More."""\n    return (x + 1)\n'
    assert fingerprint(plain) == fingerprint(noted)
    assert fingerprint(plain) != fingerprint(plain.replace("1", "2"))


def test_it_is_fast() -> None:
    module_revision.cache_clear()
    start = time.process_time()
    revision("linear_int8")
    assert time.process_time() - start < 2.0
