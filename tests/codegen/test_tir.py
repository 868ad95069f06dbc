"""Objects have plain C symbols, need only libc and libm, and are the same bytes every time."""

from __future__ import annotations

import ctypes
import hashlib
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.generic_op import GenericOp, generic_op
from sparsec.codegen.isa import FEATURES
from sparsec.codegen.program import Kind, Parameter
from sparsec.codegen.toolchain import link_kernels
from sparsec.ir.dims import symbol
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType, TensorType
from sparsec.target import Isa

B, S = symbol("batch"), symbol("seq")
X = TensorType(DType.F32, (B, S, 6))
IDS = TensorType(DType.I64, (B, S))
HALF = TensorType(DType.F16, (B, S))

# What a shared library that needs libc and libm alone may leave undefined.
ALLOWED = {"memset", "memcpy", "memmove"} | {
    f"{name}{suffix}"
    for name in (
        *("exp", "log", "tanh", "erf", "erfc", "sin", "cos", "tan", "sinh", "cosh", "asin"),
        *("acos", "atan", "asinh", "acosh", "atanh", "pow", "fmod", "expm1", "log1p"),
    )
    for suffix in ("", "f")
}
# Conversions that LLVM may call for float16; TVM puts them in every object.
WEAK = {"__extendhfsf2", "__truncsfhf2"}
GLOBAL, WEAK_BIND = 1, 2


def scale_function(name: str = "scale") -> object:
    """y = x * factor; status 7 for a negative element, 8 for one above 100."""

    def body(k: tir.KernelScope) -> None:
        with T.serial(k.begin, k.end) as i:
            for status, wrong in ((7, k["x"][i] < 0), (8, k["x"][i] > 100)):
                with T.If(wrong), T.Then():
                    tir.fail(status)
            sums = tir.registers("float32", 1)
            T.buffer_store(sums, k["x"][i] * k["factor"] + T.cast(k["count"], "float32"), [0])
            T.buffer_store(k["y"], sums[0], [i])

    parameters = [
        Parameter("x"),
        Parameter("y"),
        Parameter("count", Kind.INT),
        Parameter("factor", Kind.FLOAT),
    ]
    return tir.kernel_function(name, parameters, body)


def generic_kernels() -> list[GenericOp]:
    forms = [
        ("softmax", {"axis": 2}, [X]),
        ("gelu", {"approximate": "none"}, [HALF]),
        ("gather", {"axis": 1}, [X, IDS]),
        ("gather", {"axis": 0}, [X, IDS]),
        ("cumsum", {"axis": 1, "exclusive": False, "reverse": False}, [X]),
        ("matmul", {}, [X, TensorType(DType.F32, (6, S))]),
        ("arg_max", {"axis": 1, "keepdims": False}, [X]),
        ("cast", {"to": DType.F64}, [HALF]),
        ("cast", {"to": DType.F16}, [TensorType(DType.F64, (S,))]),
        ("cast", {"to": DType.F16}, [TensorType(DType.U64, (S,))]),
        ("reduce_sum", {"axes": (0, 2), "keepdims": False}, [X]),
        ("mod", {"fmod": False}, [HALF, HALF]),
    ]
    return [
        generic_op(op, attrs, tuple(types), OPS[op].infer(types, attrs)[0], "avx2")
        for op, attrs, types in forms
    ]


def symbols(data: bytes) -> Iterator[tuple[str, int, bool]]:
    """Name, binding and definedness of the symbols of a 64-bit ELF object."""
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + size * i) for i in range(count)]
    for _, kind, _, _, start, length, link, _, _, entry in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = data[sections[link][4] :]
        for at in range(start, start + length, entry):
            name, info, _, section = struct.unpack_from("<IBBH", data, at)
            yield names[name : names.index(b"\0", name)].decode(), info >> 4, section != 0


@pytest.mark.parametrize("isa", [Isa.AVX2, Isa.AVX512], ids=lambda i: i.value)
def test_symbol_table_is_plain(isa: Isa) -> None:
    kernels = generic_kernels()
    functions = [scale_function(), scale_function("again"), *(k.build() for k in kernels)]
    table = list(symbols(tir.build_object(functions, FEATURES[isa])))
    defined = {n for n, bind, here in table if here and bind == GLOBAL}
    assert defined == {"scale", "again", *(k.name for k in kernels)}
    assert {n for n, bind, here in table if here and bind == WEAK_BIND} <= WEAK
    undefined = {n for n, bind, here in table if n and bind == GLOBAL and not here}
    assert undefined <= ALLOWED
    assert "expf" in undefined, "softmax calls it: the table was read"


def test_kernel_function_alone_needs_nothing() -> None:
    table = list(symbols(tir.build_object([scale_function()], FEATURES[Isa.AVX2])))
    assert {n for n, bind, here in table if n and not here} == set()


def test_hundreds_of_kernels_fit_into_an_object() -> None:
    """A model may have as many generic ops of different shapes; each has an exit or some."""
    functions = [scale_function(f"scale_{i}") for i in range(300)]
    table = list(symbols(tir.build_object(functions, FEATURES[Isa.AVX2])))
    assert {n for n, _, here in table if n and not here} == set()
    assert len({n for n, bind, here in table if here and bind == GLOBAL}) == 300


def test_fail_leaves_with_its_status(tmp_path: Path) -> None:
    names = ("scale", "again")
    objects = [tir.build_object([scale_function(n)], FEATURES[Isa.AVX2]) for n in names]
    library = tmp_path / "kernels.so"
    link_kernels(objects, library)
    for name in names:
        function = getattr(ctypes.CDLL(str(library)), name)
        for value, status, written in ((3.0, 0, 3), (-1.0, 7, 1), (101.0, 8, 1)):
            x = np.array([1, value, 2], np.float32)
            y = np.full(3, -5, np.float32)
            pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, y)]
            numbers = [ctypes.c_int64(10), ctypes.c_float(2)]
            assert function(*pointers, *numbers, ctypes.c_int64(0), ctypes.c_int64(3)) == status
            expected = np.where(np.arange(3) < written, x * 2 + 10, -5)
            np.testing.assert_array_equal(y, expected)


PRINT_DIGEST = """
import hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("test_tir", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.digest())
"""


def digest() -> str:
    """Of an object with kernels of both kinds."""
    functions = [scale_function(), *(k.build() for k in generic_kernels())]
    return hashlib.sha256(tir.build_object(functions, FEATURES[Isa.AVX2])).hexdigest()


def test_same_functions_give_the_same_bytes_in_another_process() -> None:
    command = [sys.executable, "-c", PRINT_DIGEST, __file__]
    other = subprocess.run(command, check=True, capture_output=True, text=True)
    assert other.stdout.strip() == digest()


def test_two_kernels_of_one_name_are_refused() -> None:
    with pytest.raises(AssertionError, match="one name"):
        tir.build_object([scale_function(), scale_function()], FEATURES[Isa.AVX2])
