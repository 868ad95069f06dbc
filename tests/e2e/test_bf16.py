"""bf16 end to end: the library gives the numbers of the rounded graph's oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.cli import main
from sparsec.errors import InvalidInput
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.graph import Graph
from sparsec.models.build import Pruning, build_model
from sparsec.models.tiny import tiny_model, tiny_spec
from sparsec.options import Calibration
from sparsec.passes import bf16_pipeline, graph_pipeline
from sparsec.passes.manager import PassManager
from sparsec.target import Isa
from sparsec.tools.inputs import random_inputs

# A value on the border of two bf16 numbers may be rounded the other way: one step, 2**-7 of it.
# The layer norms of two layers keep results near 1, and few values are on a border.
TOLERANCE = 2.0**-6


def rounded(path: Path, **options: object) -> Graph:
    graph = import_model(path)
    PassManager(graph_pipeline()).run(graph)
    PassManager(bf16_pipeline(**options)).run(graph)  # type: ignore[arg-type]
    return graph


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name, want in wanted.items():
        apart = np.abs(found[name] - want)
        assert apart.max() <= TOLERANCE * max(1.0, np.abs(want).max()), name
        assert apart.mean() <= TOLERANCE / 16, name


@pytest.mark.isa("avx512bf16")
@pytest.mark.parametrize("block", [None, (4, 1), (4, 4)], ids=str)
def test_equals_the_oracle(block: tuple[int, int] | None, tmp_path: Path) -> None:
    path, library = tmp_path / "m.onnx", tmp_path / "m.so"
    pruning = Pruning(0.8, *block) if block else None
    onnx.save(build_model(tiny_spec(), pruning=pruning), path)
    report = sparsec.compile_model(
        path, library, isa=Isa.AVX512_BF16, precision="bf16", keep_padding=True
    ).report
    assert report["precision"] == "bf16"
    assert report["isa"] == "avx512bf16"
    ops = [layer["op"] for layer in report["layers"]]
    assert "attention_bf16" in ops
    assert "linear" not in ops
    model = sparsec.load(library, threads=2)
    for batch, seq in ((1, 1), (3, 33), (2, 40)):
        arrays = random_inputs(model, batch, seq, seed=3, padding=True)
        close(model(arrays), run(rounded(path), arrays))


@pytest.mark.isa("avx512bf16")
def test_tokens_that_are_flattened_in_front_of_a_product(tmp_path: Path) -> None:
    """The rounding moves in front of the reshape, where nothing was in panels."""
    kind, rng = onnx.TensorProto.FLOAT, np.random.default_rng(0)
    w = rng.standard_normal((8, 6)).astype(np.float32)
    shapes = [np.array(s, np.int64) for s in ((-1, 8), (2, -1, 6))]
    arrays = {"w": w, "flat": shapes[0], "back": shapes[1]}
    nodes = [
        onnx.helper.make_node("Reshape", ["x", "flat"], ["f"]),
        onnx.helper.make_node("Gemm", ["f", "w"], ["g"]),
        onnx.helper.make_node("Sin", ["g"], ["s"]),
        onnx.helper.make_node("Reshape", ["s", "back"], ["y"]),
    ]
    graph = onnx.helper.make_graph(
        nodes, "flat",
        [onnx.helper.make_tensor_value_info("x", kind, [2, "seq", 8])],
        [onnx.helper.make_tensor_value_info("y", kind, [2, "seq", 6])],
        [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "m.onnx"
    )
    sparsec.compile_model(tmp_path / "m.onnx", tmp_path / "m.so", precision="bf16")
    x = rng.standard_normal((2, 37, 8)).astype(np.float32)
    close(sparsec.load(tmp_path / "m.so")({"x": x}), run(rounded(tmp_path / "m.onnx"), {"x": x}))


@pytest.mark.isa("amx")
@pytest.mark.isa("avx512bf16")
@pytest.mark.parametrize("block", [None, (16, 1)], ids=str)
def test_equals_the_oracle_by_tiles(
    block: tuple[int, int] | None, tmp_path: Path, amx_models: Any
) -> None:
    path, library = tmp_path / "m.onnx", tmp_path / "m.so"
    pruning = Pruning(0.8, *block) if block else None
    spec = replace(tiny_spec(), hidden=64, heads=2, ffn=256)
    onnx.save(build_model(spec, pruning=pruning), path)
    report = sparsec.compile_model(
        path, library, precision="bf16", target="sapphirerapids", keep_padding=True
    ).report
    assert report["isa"] == "amx"
    model = sparsec.load(library, threads=2)
    steps = model.description["steps"]
    for op in ("linear_bf16", "attention_bf16"):
        assert "amx" in {step["isa"] for step in steps if step["op"] == op}
    for batch, seq in ((1, 1), (3, 33), (2, 40)):
        arrays = random_inputs(model, batch, seq, seed=3, padding=True)
        close(model(arrays), run(rounded(path), arrays))


@pytest.mark.isa("avx2")
@pytest.mark.parametrize("block", [(4, 1), (16, 4), (1, 4)], ids=str)
def test_sparse_fp32(block: tuple[int, int], tmp_path: Path) -> None:
    path, library = tmp_path / "m.onnx", tmp_path / "m.so"
    onnx.save(build_model(tiny_spec(), pruning=Pruning(0.8, *block)), path)
    report = sparsec.compile_model(path, library, precision="fp32", keep_padding=True).report
    schedules = [x["schedule"] for x in report["layers"] if x["op"] == "linear"]
    assert any("float_gemm" in s for s in schedules), schedules
    model = sparsec.load(library, threads=2)
    graph = import_model(path)
    for batch, seq in ((1, 1), (3, 33), (2, 40)):
        arrays = random_inputs(model, batch, seq, seed=3, padding=True)
        for name, want in run(graph, arrays).items():
            np.testing.assert_allclose(model(arrays)[name], want, rtol=1e-4, atol=1e-4)


@pytest.mark.isa("avx512bf16")
def test_mixed_with_int8_and_fp32(tmp_path: Path) -> None:
    path, library = tmp_path / "m.onnx", tmp_path / "m.so"
    onnx.save(tiny_model(), path)
    name = next(n.name for n in rounded(path).nodes if n.op == "linear_bf16")
    report = sparsec.compile_model(
        path, library, precision="int8", calibration=Calibration(random=True), rest="bf16",
        attention="bf16", keep_fp32=[name], keep_padding=True,
    ).report  # fmt: skip
    ops = {layer["node"]: layer["op"] for layer in report["layers"]}
    assert ops[name] == "linear_bf16"
    assert {"linear_int8", "attention_bf16"} <= set(ops.values())
    assert "attention_int8" not in ops.values()
    model = sparsec.load(library, threads=1)
    arrays = random_inputs(model, 2, 17, seed=3, padding=True)
    exact = run(import_model(path), arrays)
    for key, found in model(arrays).items():
        cosine = (found * exact[key]).sum() / np.linalg.norm(found) / np.linalg.norm(exact[key])
        assert cosine > 0.98, key
    kept = sparsec.compile_model(
        path, library, precision="bf16", keep_fp32=[name], keep_padding=True
    ).report
    assert {x["node"]: x["op"] for x in kept["layers"]}[name] == "linear"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "icelake-server"}, "bf16 needs avx512bf16, which the target icelake-server"),
        ({"target": "znver4", "isa": Isa.AVX2}, "the target znver4 limited to avx2"),
        ({"target": "znver4", "attention": "int8"}, "--attention int8 goes with"),
        ({"target": "znver4", "rest": "bf16"}, "--rest goes with --precision int8"),
        (
            {"target": "znver4", "keep_fp32": ["x*"]},
            "or embedding is named like 'x\\*'",
        ),
    ],
)
def test_what_bf16_can_not_be(options: dict[str, object], message: str, tmp_path: Path) -> None:
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    with pytest.raises(InvalidInput, match=message):
        sparsec.compile_model(tmp_path / "m.onnx", tmp_path / "m.so", precision="bf16", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "m.so").exists()


@pytest.mark.isa("avx512bf16")
def test_the_command_line_takes_precisions(tmp_path: Path) -> None:
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    given = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.so"), "-q"]
    assert main([*given, "--precision", "bf16", "--attention", "fp32"]) == 0
    assert (tmp_path / "m.so").exists()
