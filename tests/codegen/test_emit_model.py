"""model.c: readable, complete, the same every time, and safe with any name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.c_text import c_float, c_names, c_string, comment_text, magnitude
from sparsec.codegen.emit_model import emit_model, emit_targets
from sparsec.codegen.pack_weights import WeightBlob
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
from sparsec.codegen.toolchain import RUNTIME
from sparsec.errors import InvalidGraph
from sparsec.ir import dims
from sparsec.ir.dims import Dim, ceildiv, maximum, minimum, symbol
from sparsec.ir.types import DType, TensorType
from sparsec.target import Isa


@dataclass(frozen=True, slots=True)
class NamedKernel:
    """A kernel that is declared only: emission never builds it."""

    name: str
    parameters: tuple[Parameter, ...]
    has_scratch: bool = False
    isa: str = "avx2"

    def build(self) -> Any:
        raise AssertionError("emission builds no kernel")


BLOB = WeightBlob((0, 4096), 4160, "00ff")


def example_program() -> Program:
    """Two calls, names that are no C names, an absent operand, scratch, sizes of every form."""
    batch, seq = symbol("batch size"), symbol("int")
    ids = TensorType(DType.I64, (batch, seq))
    hidden = TensorType(DType.F32, (batch, seq, 8))
    pairs = TensorType(DType.F32, (batch, ceildiv(seq, 2), 2 * seq + 1))
    w = Weight("w", np.zeros((10, 8), np.float32))
    b = Weight("b", np.zeros(8, np.float32))

    def ref(region: Region, index: int, type: TensorType, name: str) -> BufferRef:
        return BufferRef(region, index, type, name)

    table = ref(Region.WEIGHTS, 0, TensorType(DType.F32, (10, 8)), "w")
    bias = ref(Region.WEIGHTS, 1, TensorType(DType.F32, (8,)), "b")
    h = ref(Region.ARENA, 0, hidden, "layer 0 */ h")
    embed = NamedKernel(
        "embed_i64",
        (
            Parameter("ids", dtype="int64"),
            Parameter("table"),
            Parameter("y"),
            Parameter("rows", Kind.INT),
        ),
    )
    mix = NamedKernel(
        "mix",
        (
            Parameter("x"),
            Parameter("bias"),
            Parameter("mask"),
            Parameter("y"),
            Parameter("long", Kind.INT),
            Parameter("scale", Kind.FLOAT),
        ),
        has_scratch=True,
    )
    return Program(
        'tiny "model"',
        (Port("input_ids", ids),),
        (Port("pairs", pairs),),
        ("batch size", "int"),
        (w, b),
        (hidden.nbytes,),
        (
            KernelCall(
                embed,
                (ref(Region.INPUT, 0, ids, "input_ids"), table, h, 10),
                batch * seq,
                "embeddings */ of tokens",
                grain=16,
            ),
            KernelCall(
                mix,
                (h, bias, None, ref(Region.OUTPUT, 0, pairs, "pairs"), maximum(seq, 4), 0.125),
                batch * ceildiv(seq, 2),
                "layer 0, mix",
                scratch_bytes=64 * seq,
            ),
        ),
    )


def emit(program: Program) -> str:
    metadata = {"passes": ["fuse"], "target": "haswell"}
    return emit_model(Part(program, "haswell", Isa.AVX2, Isa.AVX2, metadata), BLOB)


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden("emit_model", emit(example_program()))


def test_targets_are_listed_best_first() -> None:
    parts = [
        Part(example_program(), name, level, Isa.AVX2, {})
        for name, level in (("znver4", Isa.AVX512_BF16), ("haswell", Isa.AVX2))
    ]
    text = emit_targets(parts)
    assert "{&sparsec_model_avx512bf16, &sparsec_model_avx2}" in text
    assert "sparsec_target_count = 2;" in text
    table = emit_model(parts[0], BLOB, len(parts))
    assert '.target = "znver4"' in table
    assert '.target_isa = "avx512bf16"' in table
    assert '.required_isa = "avx2"' in table


def test_compiles_without_warnings(zig: Callable[..., None], tmp_path: Path) -> None:
    source = tmp_path / "model.c"
    source.write_text(emit(example_program()))
    folders = [f"-I{RUNTIME / 'include'}", f"-I{RUNTIME / 'src'}"]
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-pedantic"]
    zig("cc", "-c", *flags, *folders, str(source), "-o", str(tmp_path / "model.o"))


def test_description_is_json() -> None:
    lines = re.search(r"char description\[\] =\n(.*?);\n", emit(example_program()), re.S)
    assert lines is not None
    text = "".join(json.loads(line) for line in lines[1].split("\n"))
    description = json.loads(text)
    assert description["name"] == 'tiny "model"'
    assert description["symbols"] == ["batch size", "int"]
    assert description["inputs"] == [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch size", "int"]}
    ]
    assert [s["comment"] for s in description["steps"]] == [
        "embeddings */ of tokens",
        "layer 0, mix",
    ]
    assert description["weights"] == {"count": 2, "bytes": 4160, "blake2b_128": "00ff"}
    assert (description["passes"], description["target"]) == (["fuse"], "haswell")


def test_a_symbol_that_no_input_has() -> None:
    program = replace(example_program(), symbols=("batch size", "int", "heads"))
    with pytest.raises(InvalidGraph, match="no input has an axis of size heads"):
        emit(program)
    half = Port("half", TensorType(DType.F32, (ceildiv(symbol("n"), 2),)))
    with pytest.raises(InvalidGraph, match="no input has an axis of size n"):
        emit(Program("p", (half,), (), ("n",), (), (), ()))


def test_rank_above_the_abi() -> None:
    port = Port("deep", TensorType(DType.F32, (1,) * 9))
    with pytest.raises(InvalidGraph, match="deep: rank 9 is above 8"):
        emit(Program("p", (port,), (), (), (), (), ()))


@pytest.mark.parametrize("seed", range(20))
def test_magnitude_bounds_every_expression(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = symbol("a"), symbol("b")

    def grow(depth: int) -> Dim:
        if depth == 0:
            return [a, b, int(rng.integers(-9, 10))][rng.integers(3)]
        x, y, size = grow(depth - 1), grow(depth - 1), int(rng.integers(1, 9))
        forms = [x + y, x - y, x * y, ceildiv(x, size), x % size, maximum(x, y), minimum(x, y)]
        return forms[rng.integers(len(forms))]

    values = [grow(depth) for depth in (1, 2, 3, 3)]
    bound = magnitude(values)
    for _ in range(20):
        env = {"a": int(rng.integers(1, 1000)), "b": int(rng.integers(1, 1000))}
        largest = max(abs(dims.evaluate(v, env)) for v in values)
        assert dims.evaluate(bound, env) >= largest


def test_names() -> None:
    names = ["batch", "batch size", "batch-size", "int", "2x", "", "f", "sparsec_max", "größe"]
    found = c_names(names, ("f",))
    assert found[0] == "batch"
    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"[A-Za-z_]\w*", n, re.ASCII) for n in found)
    assert not {"int", "f", "sparsec_max"} & set(found)


def test_comments_and_strings_stay_closed() -> None:
    assert "*/" not in comment_text("a */ b\nc /* d")
    assert "\n" not in comment_text("a */ b\nc /* d")
    assert c_string('a"b\\c\n??/é') == '"a\\"b\\\\c\\n\\?\\?/\\303\\251"'


@pytest.mark.parametrize("value", [0.0, 1, -0.125, 0.1, 1e-12, 3.4e38, 1e-45, 16777216.0])
def test_floats_are_exact(value: float) -> None:
    text = c_float(value)
    assert text.endswith("f")
    assert any(c in text for c in ".e")
    assert np.float32(text[:-1]) == np.float32(value)


def test_floats_without_digits() -> None:
    assert [c_float(v) for v in (math.inf, -math.inf, math.nan, 1e300)] == [
        "INFINITY",
        "-INFINITY",
        "NAN",
        "INFINITY",
    ]
