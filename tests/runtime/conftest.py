"""A small library from a hand-made Program: what the tests of the runtime and the loader run.

h = 2 * x + w;  y = h + table[ids];  z = sum of h over the tokens of a sequence (uses scratch)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import FEATURES
from sparsec.codegen.program import (
    BufferRef,
    KernelCall,
    Kind,
    Parameter,
    Part,
    Port,
    Program,
    Region,
    Weight,
)
from sparsec.codegen.toolchain import build_library, link_library
from sparsec.ir.dims import symbol
from sparsec.ir.types import DType, TensorType
from sparsec.target import Isa

CHANNELS = 4
ROWS = 10


@dataclass(frozen=True, slots=True)
class HandKernel:
    """A kernel that is a name, parameters and a body."""

    name: str
    parameters: tuple[Parameter, ...]
    body: Callable[[tir.KernelScope], None]
    has_scratch: bool = False
    isa: str = "avx2"

    def build(self) -> Any:
        scratch = "float32" if self.has_scratch else None
        return tir.kernel_function(self.name, self.parameters, self.body, scratch=scratch)


def _scale_add(k: tir.KernelScope) -> None:
    with T.serial(k.begin, k.end) as i:
        T.buffer_store(k["h"], k["x"][i] * k["a"] + k["w"][i % k["n"]], [i])


def _look_up(k: tir.KernelScope) -> None:
    with T.serial(k.begin, k.end) as token:
        row = T.Bind(k["ids"][token])
        with T.If(T.Or(row < 0, row >= k["rows"])), T.Then():
            tir.fail(1)
        with T.serial(T.int64(0), k["n"]) as c:
            at = token * k["n"] + c
            T.buffer_store(k["y"], k["h"][at] + k["table"][row * k["n"] + c], [at])


def _sum_tokens(k: tir.KernelScope) -> None:
    with T.serial(k.begin, k.end) as b:
        with T.serial(T.int64(0), k["n"]) as c:
            T.buffer_store(k.scratch, T.float32(0), [c])
        with T.serial(T.int64(0), k["seq"]) as t, T.serial(T.int64(0), k["n"]) as c:
            value = k.scratch[c] + k["h"][(b * k["seq"] + t) * k["n"] + c]
            T.buffer_store(k.scratch, value, [c])
        with T.serial(T.int64(0), k["n"]) as c:
            T.buffer_store(k["z"], k.scratch[c], [b * k["n"] + c])


def _ints(*names: str) -> tuple[Parameter, ...]:
    return tuple(Parameter(n, Kind.INT) for n in names)


SCALE_ADD = HandKernel(
    "scale_add",
    (Parameter("x"), Parameter("w"), Parameter("h"), *_ints("n"), Parameter("a", Kind.FLOAT)),
    _scale_add,
)
LOOK_UP = HandKernel(
    "look_up",
    (
        Parameter("ids", dtype="int64"),
        Parameter("table"),
        Parameter("h"),
        Parameter("y"),
        *_ints("rows", "n"),
    ),
    _look_up,
)
SUM_TOKENS = HandKernel(
    "sum_tokens", (Parameter("h"), Parameter("z"), *_ints("seq", "n")), _sum_tokens, True
)


def hand_program(
    name: str = "hand",
    *,
    scale: float = 2.0,
    padding_bytes: int = 0,
    order: tuple[int, ...] = (0, 1, 2),
) -> Program:
    """See the top; `padding_bytes` of weights that no kernel reads; `order` of h, y and z."""
    batch, seq = symbol("batch"), symbol("seq")
    f32 = DType.F32
    ids_type = TensorType(DType.I64, (batch, seq))
    token_type = TensorType(f32, (batch, seq, CHANNELS))
    sum_type = TensorType(f32, (batch, CHANNELS))
    w = np.arange(CHANNELS, dtype=np.float32)
    table = np.arange(ROWS * CHANNELS, dtype=np.float32).reshape(ROWS, CHANNELS)
    weights = (Weight("w", w), Weight("table", table))
    if padding_bytes:
        weights += (Weight("padding", np.full(padding_bytes, 7, np.uint8)),)

    def ref(region: Region, index: int, type: TensorType, name: str) -> BufferRef:
        return BufferRef(region, index, type, name)

    h = ref(Region.ARENA, 0, token_type, "h")
    x = ref(Region.INPUT, 1, token_type, "x")
    w_ref = ref(Region.WEIGHTS, 0, TensorType(f32, w.shape), "w")
    table_ref = ref(Region.WEIGHTS, 1, TensorType(f32, table.shape), "table")
    ids = ref(Region.INPUT, 0, ids_type, "ids")
    y = ref(Region.OUTPUT, 0, token_type, "y")
    z = ref(Region.OUTPUT, 1, sum_type, "z")
    calls = (
        KernelCall(SCALE_ADD, (x, w_ref, h, CHANNELS, scale), token_type.elements, "scale"),
        KernelCall(LOOK_UP, (ids, table_ref, h, y, ROWS, CHANNELS), batch * seq, "embedding"),
        KernelCall(SUM_TOKENS, (h, z, seq, CHANNELS), batch, "sums", scratch_bytes=4 * CHANNELS),
    )
    return Program(
        name,
        (Port("ids", ids_type), Port("x", token_type)),
        (Port("y", token_type), Port("z", sum_type)),
        ("batch", "seq"),
        weights,
        (token_type.nbytes,),
        tuple(calls[index] for index in order),
    )


def _objects(program: Program) -> dict[str, bytes]:
    kernels = {c.kernel.name: c.kernel for c in program.calls}
    return {n: tir.build_object([k.build()], FEATURES[Isa.AVX2]) for n, k in kernels.items()}


def _build(program: Program, output: Path, isa: Isa = Isa.AVX2) -> Path:
    build_library(program, _objects(program), output, isa=isa, metadata={"passes": []})
    return output


@pytest.fixture(scope="session")
def build_parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`build_parts((target, level, needed), ...)` -> a new library with the same code for each
    target; its tables say that it needs those levels."""

    def make(*targets: tuple[str, Isa, Isa]) -> Path:
        program = hand_program("hand")
        parts = [
            Part(program, name, level, needed, {"target": name}) for name, level, needed in targets
        ]
        output = tmp_path_factory.mktemp("parts") / "parts.so"
        link_library(parts, _objects(program), output)
        return output

    return make


@pytest.fixture(scope="session")
def build_hand(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`build_hand(name, isa=, **options of hand_program)` -> a new library."""

    def make(name: str = "hand", *, isa: Isa = Isa.AVX2, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("library")
        return _build(hand_program(name, **options), folder / f"{name}.so", isa)

    return make


@pytest.fixture(scope="session")
def library(build_hand: Callable[..., Path]) -> Path:
    return build_hand()


@pytest.fixture(scope="session")
def expected() -> Callable[..., dict[str, np.ndarray[Any, Any]]]:
    """What the hand-made model computes, in float64."""

    def compute(
        ids: np.ndarray[Any, Any], x: np.ndarray[Any, Any], scale: float = 2.0
    ) -> dict[str, np.ndarray[Any, Any]]:
        h = x.astype(np.float64) * scale + np.arange(CHANNELS)
        table = np.arange(ROWS * CHANNELS).reshape(ROWS, CHANNELS)
        return {"y": h + table[ids], "z": h.sum(axis=1)}

    return compute


@pytest.fixture
def example(rng: np.random.Generator) -> Callable[[int, int], dict[str, np.ndarray[Any, Any]]]:
    """`example(batch, seq)` -> inputs."""

    def make(batch: int, seq: int) -> dict[str, np.ndarray[Any, Any]]:
        return {
            "ids": rng.integers(0, ROWS, (batch, seq)),
            "x": rng.standard_normal((batch, seq, CHANNELS)).astype(np.float32),
        }

    return make
