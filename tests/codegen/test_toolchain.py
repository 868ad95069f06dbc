"""Compile and link: without any tool of the system, reproducibly, and clean when it fails."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsec import errors
from sparsec.codegen.program import (
    BufferRef,
    KernelCall,
    Parameter,
    Port,
    Program,
    Region,
    Weight,
)
from sparsec.codegen.toolchain import GLIBC, build_library
from sparsec.ir.dims import symbol
from sparsec.ir.types import DType, TensorType
from sparsec.runtime import load
from sparsec.target import Isa

KERNEL = """
#include <stdint.h>
float expf(float);
int32_t exp_add(const float *x, const float *w, float *y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) y[i] = expf(x[i]) + w[0];
  return 0;
}
"""


@dataclass(frozen=True, slots=True)
class CKernel:
    """A kernel whose object comes from C text."""

    name: str = "exp_add"
    parameters: tuple[Parameter, ...] = (Parameter("x"), Parameter("w"), Parameter("y"))
    has_scratch: bool = False
    isa: str = "avx2"

    def build(self) -> Any:
        raise AssertionError("the object is given")


def program() -> Program:
    """y = exp(x) + 0.5"""
    type = TensorType(DType.F32, (symbol("n"),))
    x = BufferRef(Region.INPUT, 0, type, "x")
    w = BufferRef(Region.WEIGHTS, 0, TensorType(DType.F32, (1,)), "w")
    y = BufferRef(Region.OUTPUT, 0, type, "y")
    return Program(
        "exp",
        (Port("x", type),),
        (Port("y", type),),
        ("n",),
        (Weight("w", np.array([0.5], np.float32)),),
        (),
        (KernelCall(CKernel(), (x, w, y), symbol("n"), "exp"),),
    )


@pytest.fixture(scope="module")
def compile_kernel(
    zig: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], bytes]:
    """The object of a kernel's C text."""

    def compile(text: str) -> bytes:
        source = tmp_path_factory.mktemp("kernel") / "kernel.c"
        source.write_text(text)
        target = ["-target", "x86_64-linux-gnu.2.17", "-O2", "-fPIC"]
        zig("cc", "-c", *target, str(source), "-o", str(source.with_suffix(".o")))
        return source.with_suffix(".o").read_bytes()

    return compile


@pytest.fixture(scope="module")
def kernel(compile_kernel: Callable[[str], bytes]) -> bytes:
    return compile_kernel(KERNEL)


def build(output: Path, kernel: bytes, **options: Any) -> None:
    build_library(program(), {"k": kernel}, output, isa=Isa.AVX2, metadata={}, **options)


def check(library: Path) -> None:
    x = np.linspace(-3, 3, 100, dtype=np.float32)
    with load(library) as model:
        np.testing.assert_allclose(model({"x": x})["y"], np.exp(x) + 0.5, rtol=1e-6)


def test_needs_no_tool_and_no_home(
    kernel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    stages: list[str] = []
    build(tmp_path / "exp.so", kernel, progress=stages.append)
    check(tmp_path / "exp.so")
    assert stages == ["writing weights", "compiling model.c", "linking"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exp.py", "exp.so"]


def test_system_compiler(kernel: bytes, tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("this system has no gcc")
    build(tmp_path / "exp.so", kernel, cc="gcc")
    check(tmp_path / "exp.so")


def test_same_input_same_bytes(kernel: bytes, tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "exp.so", tmp_path / "another" / "folder" / "model.so"]
    for path in paths:
        build(path, kernel)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    here = str(Path(__file__).parent.parent.parent).encode()
    assert here not in paths[0].read_bytes()
    assert str(tmp_path).encode() not in paths[0].read_bytes()


def test_missing_compilers(kernel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.ToolchainFailed, match="no C compiler 'no-such-cc' on the PATH"):
        build(tmp_path / "exp.so", kernel, cc="no-such-cc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.ToolchainFailed, match="install the package ziglang"):
        build(tmp_path / "exp.so", kernel)
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_what_was_there(
    kernel: bytes, compile_kernel: Callable[[str], bytes], tmp_path: Path
) -> None:
    output = tmp_path / "exp.so"
    output.write_text("precious")
    with pytest.raises(errors.ToolchainFailed, match=r"ld\.lld .*ended with status 1") as caught:
        build(output, b"not an object")
    assert "kernel_0.o" in str(caught.value)
    unknown = KERNEL.replace("expf", "no_such_function")
    with pytest.raises(errors.ToolchainFailed, match="undefined symbol: no_such_function"):
        build(output, compile_kernel(unknown))
    with pytest.raises(errors.ToolchainFailed, match=r"duplicate symbol: exp_add"):
        build_library(program(), {"a": kernel, "b": kernel}, output, isa=Isa.AVX2, metadata={})
    assert [p.name for p in tmp_path.iterdir()] == ["exp.so"]
    assert output.read_text() == "precious"


def test_a_compiler_that_fails(kernel: bytes, tmp_path: Path) -> None:
    if shutil.which("false") is None:
        pytest.skip("this system has no command that fails")
    with pytest.raises(errors.ToolchainFailed, match=r"false .*ended with status 1"):
        build(tmp_path / "exp.so", kernel, cc="false")
    assert list(tmp_path.iterdir()) == []


def test_the_listed_functions_exist() -> None:
    """Every function that a library may call is in this system's C library, in that version."""
    dl = ctypes.CDLL(None)
    dl.dlvsym.restype = ctypes.c_void_p
    dl.dlvsym.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
    loaded = [ctypes.CDLL(library) for library in GLIBC]
    for library, versions in GLIBC.items():
        for version, functions in versions.items():
            for function in functions:
                names = (function.encode(), version.encode())
                found = any(dl.dlvsym(handle._handle, *names) for handle in loaded)
                assert found, f"{function}@{version} of {library}"
