"""oneDNN's matmul on u8 activations and s8 weights, called through its C API.

The shared library comes with the package `onednn-cpu-gomp` (in the extra `bench`), is the system's
or the one that SPARSEC_ONEDNN names. Packages of newer versions run on SYCL, and want a driver for
it. Numbers of the enumerations are those of oneDNN 3's headers.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# A variable with which oneDNN, in OpenVINO too, uses all of AVX-512 but no AMX.
WITHOUT_AMX = ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
CPU, IN_ORDER, ANY = 1, 1, 1
F32, S32, S8, U8 = 3, 4, 5, 6
DTYPES = {"float32": F32, "int32": S32, "int8": S8, "uint8": U8}
SRC, DST, WEIGHTS, BIAS, SCALES, ZERO_POINTS = 1, 17, 33, 41, 4096, 8192
PER_COLUMN = 2  # mask of a scale per column of the weights
IMPLEMENTATION, WEIGHTS_DESCRIPTION = 8, 131  # queries


class Version(ctypes.Structure):
    """`dnnl_version_t`, as far as it is read here."""

    _fields_ = (("major", ctypes.c_int), ("minor", ctypes.c_int), ("patch", ctypes.c_int))


class Argument(ctypes.Structure):
    """`dnnl_exec_arg_t`."""

    _fields_ = (("arg", ctypes.c_int), ("memory", ctypes.c_void_p))


class OneDnn:
    """The library with one engine and one stream."""

    def __init__(self, path: str):
        self._library = ctypes.CDLL(path)
        self._library.dnnl_version.restype = ctypes.POINTER(Version)
        self._library.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
        version = self._library.dnnl_version().contents
        if version.major != 3:
            raise OSError(f"{path}: wanted oneDNN 3, it is {version.major}.{version.minor}")
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        self._engine = self._make("engine_create", CPU, ctypes.c_size_t(0))
        self._stream = self._make("stream_create", self._engine, IN_ORDER)
        self._kept: list[Any] = []

    def matmul(self, x: Array, w: Array, scale: Array, bias: Array, y: Array, out_scale: float,
               zero_points: tuple[int, int]) -> tuple[Callable[[], Array], str]:  # fmt: skip
        """A call that fills and gives `y`, and the name of oneDNN's implementation.

        `x` is u8 `[tokens, k]`, `y` u8 `[tokens, m]`, `w` s8 `[m, k]`, `scale` and `bias` f32
        `[m]`; zero_points are those of x and of the result:
        clip(rint((x - z) w * scale + bias) / out_scale) + z').
        """
        (tokens, k), m = x.shape, len(w)
        attr = self._make("primitive_attr_create")
        self._call("primitive_attr_set_scales_mask", attr, WEIGHTS, PER_COLUMN)
        self._call("primitive_attr_set_scales_mask", attr, DST, 0)
        for arg in (SRC, DST):
            self._call("primitive_attr_set_zero_points_mask", attr, arg, 0)
        plain = self._description((k, m), S8, (1, k))
        operands = (
            self._description((tokens, k), U8, (k, 1)),
            self._any_description((k, m), S8),
            self._description((1, m), F32, (m, 1)),
            self._description((tokens, m), U8, (m, 1)),
        )
        plan = self._make("matmul_primitive_desc_create", self._engine, *operands, attr)
        primitive = self._make("primitive_create", plan)
        packed = ctypes.c_void_p(
            self._library.dnnl_primitive_desc_query_md(plan, WEIGHTS_DESCRIPTION, 0)
        )
        weights = self._reordered(plain, np.ascontiguousarray(w), packed)
        vectors = {
            SCALES | WEIGHTS: scale,
            SCALES | DST: np.float32([out_scale]),
            ZERO_POINTS | SRC: np.int32(zero_points[:1]),
            ZERO_POINTS | DST: np.int32(zero_points[1:]),
        }
        memories = {
            SRC: self._memory(operands[0], x),
            WEIGHTS: weights,
            BIAS: self._memory(operands[2], bias),
            DST: self._memory(operands[3], y),
            **{arg: self._vector(data) for arg, data in vectors.items()},
        }
        arguments = (Argument * len(memories))(*(Argument(a, m) for a, m in memories.items()))

        def call() -> Array:
            self._execute(primitive, arguments)
            return y

        return call, self._implementation(plan)

    def _execute(self, primitive: Any, arguments: Any) -> None:
        count = len(arguments)
        self._call("primitive_execute", primitive, self._stream, count, arguments)
        self._call("stream_wait", self._stream)

    def _reordered(self, source: Any, data: Array, target: Any) -> Any:
        plan = self._make(
            "reorder_primitive_desc_create", source, self._engine, target, self._engine, None
        )
        primitive = self._make("primitive_create", plan)
        allocate = ctypes.c_void_p(-1)  # DNNL_MEMORY_ALLOCATE
        result = self._make("memory_create", target, self._engine, allocate)
        arguments = (Argument * 2)(
            Argument(SRC, self._memory(source, data)), Argument(DST, result)
        )
        self._execute(primitive, arguments)
        return result

    def _description(self, dims: tuple[int, ...], dtype: int, strides: tuple[int, ...]) -> Any:
        sizes = ((ctypes.c_int64 * len(d))(*d) for d in (dims, strides))
        shape, steps = sizes
        return self._make("memory_desc_create_with_strides", len(dims), shape, dtype, steps)

    def _any_description(self, dims: tuple[int, ...], dtype: int) -> Any:
        shape = (ctypes.c_int64 * len(dims))(*dims)
        return self._make("memory_desc_create_with_tag", len(dims), shape, dtype, ANY)

    def _vector(self, data: Array) -> Any:
        described = self._description((data.size,), DTYPES[data.dtype.name], (1,))
        return self._memory(described, data)

    def _memory(self, description: Any, data: Array) -> Any:
        self._kept.append(data)
        address = ctypes.c_void_p(data.ctypes.data)
        return self._make("memory_create", description, self._engine, address)

    def _implementation(self, plan: Any) -> str:
        name = ctypes.c_char_p()
        self._call("primitive_desc_query", plan, IMPLEMENTATION, 0, ctypes.byref(name))
        return (name.value or b"").decode()

    def _make(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        """What a function of the C API stores behind its first argument."""
        handle = ctypes.c_void_p()
        self._call(function, ctypes.byref(handle), *arguments)
        return handle

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, f"dnnl_{function}")(*arguments)
        if status != 0:
            raise OSError(f"oneDNN: {function} gave status {status}")


def find_onednn() -> OneDnn:
    """The first library that loads: SPARSEC_ONEDNN, the environment's, the system's.

    Raises OSError, saying why, when there is none.
    """
    given = os.environ.get("SPARSEC_ONEDNN")
    beside = sorted((Path(sys.prefix) / "lib").glob("libdnnl.so*"))
    paths = [given] if given else [*map(str, beside), find_library("dnnl")]
    problems = []
    for path in [p for p in paths if p]:
        try:
            return OneDnn(path)
        except OSError as error:
            problems.append(str(error))
    raise OSError("; ".join(problems) or "oneDNN is not installed: pip install onednn-cpu-gomp")
