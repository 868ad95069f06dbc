"""Tile instructions against NumPy: by the CPU, or by the emulator where it has none."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir, toolchain
from sparsec.codegen.isa import amx as tiles
from sparsec.codegen.isa.amx import FULL, Product, configuration
from sparsec.codegen.program import Kind, Parameter
from sparsec.target import Isa

pytestmark = pytest.mark.isa("amx")

Array = np.ndarray[Any, Any]
INTEGERS = [p for p in Product if p is not Product.BF16]
SHAPES = [(16, 16, 16), (1, 1, 1), (8, 16, 16), (5, 7, 3), (16, 3, 16), (2, 16, 9)]
SUM, A, B = 3, 7, 0


@dataclass(frozen=True, slots=True)
class OneProduct:
    """sum += a b, from and to rows of `stride` bytes."""

    product: Product
    element: str
    isa: str = "amx"
    has_scratch: bool = False

    @property
    def name(self) -> str:
        return f"one_{self.product.value}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        pointers = [("config", "uint8"), ("a", "uint8"), ("b", "uint8"), ("sum", self.element)]
        return (*(Parameter(n, dtype=t) for n, t in pointers), Parameter("stride", Kind.INT))

    def build(self) -> Any:
        return tir.kernel_function(self.name, self.parameters, self._body)

    def _body(self, s: tir.KernelScope) -> None:
        zero, stride = T.int64(0), s["stride"]
        tiles.configure(s["config"])
        tiles.load(SUM, s["sum"], zero, stride)
        tiles.load(A, s["a"], zero, stride)
        tiles.load(B, s["b"], zero, stride)
        tiles.multiply(SUM, A, B, self.product)
        tiles.store(SUM, s["sum"], zero, stride)
        tiles.release()


def shapes_of(rows: int, columns: int, depth: int) -> list[tuple[int, int]]:
    shapes = [(1, 4)] * 8
    shapes[SUM], shapes[A], shapes[B] = (
        (rows, 4 * columns),
        (rows, 4 * depth),
        (depth, 4 * columns),
    )
    return shapes


def multiply(run: Any, product: Product, a: Array, b: Array, total: Array) -> Array:
    """`a` [rows, depth], `b` [depth, columns], `total` [rows, columns] of 32-bit elements."""
    (rows, depth), columns = a.shape, b.shape[1]
    strided = [np.zeros((len(x), 20), x.dtype) for x in (a, b, total)]
    for wide, x in zip(strided, (a, b, total), strict=True):
        wide[:, : x.shape[1]] = x
    kernel = OneProduct(product, str(total.dtype))
    config = configuration(shapes_of(rows, columns, depth))
    operands = [x.view(np.uint8) for x in strided[:2]]
    assert run(kernel, config, *operands, strided[2], 80, output=strided[2], items=1) == 0
    assert (strided[2][:, columns:] == 0).all(), "wrote past the row of the tile"
    return strided[2][:, :columns]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("product", INTEGERS, ids=lambda p: p.value)
def test_products_of_bytes(product: Product, shape: tuple[int, int, int], run: Any) -> None:
    """Sums wrap around."""
    rows, columns, depth = shape
    rng = np.random.default_rng(shape)
    a, b, total = (
        rng.integers(-(2**31), 2**31, size).astype(np.int32)
        for size in ((rows, depth), (depth, columns), (rows, columns))
    )
    signs = product.value[-3:-1]
    left, right = (np.int8 if s == "s" else np.uint8 for s in signs)
    x = np.ascontiguousarray(a).view(left).astype(np.int64)
    y = np.ascontiguousarray(b).view(right).reshape(depth, columns, 4).astype(np.int64)
    expected = total + np.einsum("rqi,qci->rc", x.reshape(rows, depth, 4), y)
    np.testing.assert_array_equal(multiply(run, product, a, b, total), expected.astype(np.int32))


def to_bf16(x: Array) -> Array:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_bf16(shape: tuple[int, int, int], run: Any) -> None:
    rows, columns, depth = shape
    rng = np.random.default_rng(shape)
    a, b = (
        to_bf16(rng.standard_normal((rows, depth, 2))),
        to_bf16(rng.standard_normal((depth, columns, 2))),
    )
    total = rng.standard_normal((rows, columns)).astype(np.float32)
    x, y = ((v.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for v in (a, b))
    words = [np.ascontiguousarray(v).view(np.int32)[..., 0] for v in (a, b)]
    got = multiply(run, Product.BF16, *words, total)
    terms = np.einsum("rqi,qci->rc", np.abs(x), np.abs(y)) + np.abs(total)
    # Up to depth + 2 roundings to fp32, each of at most all terms' sum.
    bound = (depth + 2) * 2.0**-24 * terms
    assert (np.abs(got - (total + np.einsum("rqi,qci->rc", x, y))) <= bound).all()


def test_denormals_of_bf16_are_zero(run: Any) -> None:
    a, b = np.full((1, 1, 2), 0x0001, np.uint16), np.full((1, 1, 2), 0x7F00, np.uint16)
    words = [v.view(np.int32)[..., 0] for v in (a, b)]
    total = np.full((1, 1), 1e-40, np.float32)
    assert multiply(run, Product.BF16, *words, total) == 0


def test_configurations() -> None:
    config = configuration([FULL, (8, 12)])
    assert config.nbytes == 64
    assert list(np.flatnonzero(config)) == [0, 16, 18, 48, 49]
    assert (config[0], config[16], config[18], config[48], config[49]) == (1, 64, 12, 16, 8)


# Every addressing mode, the two instructions that no kernel uses, and registers 8 to 15.
ASSEMBLY = """
.text
.globl store_config, load_forms
store_config: /* (config, out) */
  ldtilecfg (%rdi)
  sttilecfg (%rsi)
  tilerelease
  sttilecfg 64(%rsi)
  ret
load_forms: /* (config, from, to, 16) */
  push %r12
  push %r13
  ldtilecfg (%rdi)
  mov %rsi, %r12
  mov %rcx, %r13
  sub $256, %rdx
  tileloaddt1 (%r12,%r13,4), %tmm5
  tilestored %tmm5, 256(%rdx,%rcx,4)
  tileloadd 8(%rsi,%rcx,4), %tmm6
  add $1024, %rdx
  tilestored %tmm6, 256(%rdx,%rcx,4)
  lea 64(%rcx), %r13
  tileloadd (%r12), %tmm1
  add $1024, %rdx
  tilestored %tmm1, 256(%rdx,%rcx,4)
  tilezero %tmm1
  add $1024, %rdx
  tilestored %tmm1, 256(%rdx,%rcx,4)
  ldtilecfg empty(%rip)
  pop %r13
  pop %r12
  ret
.section .rodata
.balign 64
empty: .zero 64
.section .note.GNU-stack,"",@progbits
"""


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("assembled")
    (folder / "forms.s").write_text(ASSEMBLY)
    tools = toolchain.find_toolchain(None)
    env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(folder), "ZIG_LOCAL_CACHE_DIR": str(folder)}
    target = [f if f != "-mcpu=x86_64" else "-mcpu=sapphirerapids" for f in tools.compile]
    for command in ([*target, "forms.s", "-o", "forms.o"],
                    [*tools.link, "forms.o", "-o", "forms.so"]):  # fmt: skip
        subprocess.run(command, check=True, cwd=folder, env=env)
    return ctypes.CDLL(str(folder / "forms.so"))


def test_the_configuration_is_stored(assembled: ctypes.CDLL, amx: Any) -> None:
    config, out = configuration([FULL, (3, 4)] * 4), np.full(128, 99, np.uint8)
    assembled.store_config(ctypes.c_void_p(config.ctypes.data), ctypes.c_void_p(out.ctypes.data))
    np.testing.assert_array_equal(out[:64], config)
    assert not out[64:].any()


def test_forms_of_addresses(assembled: ctypes.CDLL, amx: Any, rng: Any) -> None:
    """No index register is a stride of zero."""
    config, source = configuration([FULL] * 8), rng.integers(0, 256, 1100).astype(np.uint8)
    out = np.full((4, 1024), 99, np.uint8)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (config, source, out)]
    assembled.load_forms(*pointers, ctypes.c_int64(16))
    np.testing.assert_array_equal(out[0], source[:1024])
    np.testing.assert_array_equal(out[1], source[8:1032])
    np.testing.assert_array_equal(out[2], np.tile(source[:64], 16))
    assert not out[3].any()


WRONG = """
import ctypes, mmap, sys
library = ctypes.CDLL(sys.argv[1])
assert library.amx_emulator_install() == 0
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex(sys.argv[2]))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("0f0b", "an instruction that is not AMX's"),  # ud2
        ("c4e27b49c0", "a tile that is not configured"),  # tilezero tmm0
    ],
)
def test_what_no_cpu_executes_ends_the_program(
    code: str, message: str, emulate_amx: Callable[[], ctypes.CDLL], host: Any
) -> None:
    if host.has(Isa.AMX):
        pytest.skip("the emulator is not in use on a CPU with AMX")
    command = [sys.executable, "-c", WRONG, emulate_amx()._name, code + "c3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGILL
    assert message in done.stderr


def test_the_fixture_uses_the_cpu_where_it_can(amx: Any, host: Any, run: Any) -> None:
    before = amx.amx_emulator_executed() if amx else 0
    one = np.ones((1, 1), np.int32)
    assert multiply(run, Product.S8_S8, one, one, one) == 2
    assert (amx is None) == host.has(Isa.AMX)
    if amx:
        assert amx.amx_emulator_executed() == before + 7
