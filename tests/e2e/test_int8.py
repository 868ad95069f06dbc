"""int8 end to end: the library gives the numbers of the quantised graph's oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.calibration import calibrate, load_calibration
from sparsec.cli import main
from sparsec.codegen.isa import pieces
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run, run_node
from sparsec.ir.graph import Node
from sparsec.ir.ops import OPS
from sparsec.models.build import Pruning, build_model
from sparsec.models.tiny import tiny_model, tiny_spec
from sparsec.options import Calibration
from sparsec.passes import (
    Quantization,
    attention_values,
    graph_pipeline,
    int8_pipeline,
    quantized_values,
)
from sparsec.passes.manager import PassManager
from sparsec.ranges import choose_range
from sparsec.target import Isa
from sparsec.tools.inputs import random_inputs
from sparsec.tools.verify import without_padding

NAMES = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture
def samples(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "samples.npz"
    arrays = {
        "input_ids": rng.integers(0, 100, (24, 12)),
        "attention_mask": np.ones((24, 12), np.int64),
        "token_type_ids": np.zeros((24, 12), np.int64),
    }
    np.savez(path, **arrays)
    return path


def oracle(
    path: Path, samples: Path, arrays: dict[str, np.ndarray], int8_attention: bool, isa: str
) -> dict[str, np.ndarray]:
    """The answer of the quantised graph in NumPy, activations in pieces where `isa` has them."""
    graph = import_model(path)
    PassManager(graph_pipeline()).run(graph)
    names = [*quantized_values(graph), *attention_values(graph)]
    observed = calibrate(graph, load_calibration(samples, graph), names)
    ranges = {name: choose_range(o, "minmax") for name, o in observed.items()}
    pipeline = int8_pipeline(Quantization(ranges), supported=lambda node: int8_attention)
    PassManager(pipeline).run(graph)
    return run(graph, arrays, compute=run_node if isa == "avx2" else in_pieces)


def in_pieces(
    node: Node, operands: list[np.ndarray | None], env: dict[str, int]
) -> list[np.ndarray]:
    """A layer's result, of straight pieces where they may be taken; docs/kernels.md."""
    scale = node.attrs.get("out_scale")
    is_stored = node.op == "linear_int8" and scale is not None and not any(node.inputs[4:])
    table = pieces.piece_table(str(node.attrs["activation"]), scale) if is_stored else None
    if table is None:
        return run_node(node, operands, env)
    plain = {**node.attrs, "activation": "none", "out_scale": None, "out_zero_point": None}
    (sums,) = OPS[node.op].evaluate(operands, plain, env)
    units = np.rint(sums * np.float32(pieces.units_per_step(table) / scale))
    steps = pieces.evaluate(np.clip(units, -(2**15), 2**15 - 1), table)
    return [np.clip(steps + node.attrs["out_zero_point"], 0, 255).astype(np.uint8)]


@pytest.mark.parametrize(
    ("isa", "block"),
    [
        pytest.param(isa, block, marks=pytest.mark.isa(isa), id=f"{isa}-{block}")
        for isa, blocks in (
            ("avx2", [None, (4, 1), (16, 1), (4, 4)]),
            ("avx512vnni", [None, (4, 1), (16, 1), (4, 4)]),
            ("amx", [None, (16, 1)]),
        )
        for block in blocks
    ],
)
def test_library_equals_the_oracle(
    isa: str,
    block: tuple[int, int] | None,
    samples: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if isa == "amx":
        request.getfixturevalue("amx_models")
    pruning = Pruning(0.7, *block) if block else None
    path, library = tmp_path / "m.onnx", tmp_path / "m.so"
    onnx.save(build_model(tiny_spec(), pruning=pruning), path)
    sparsec.compile_model(
        path,
        library,
        precision="int8",
        calibration=Calibration(data=samples),
        target="sapphirerapids",  # which has them all
        isa=Isa(isa),
    )
    model = sparsec.load(library, threads=2)
    assert model.description["isa"] == isa
    layers = {x["op"] for x in model.description["layers"]}
    assert "linear_int8" in layers
    attention = [x["isa"] for x in model.description["steps"] if x["op"] == "attention_int8"]
    assert set(attention) == {isa}
    for batch, seq in [(1, 1), (3, 33), (2, 64)]:
        arrays = random_inputs(model, batch, seq, seed=seq, padding=True)
        every = oracle(path, samples, arrays, "attention_int8" in layers, isa)
        wanted = without_padding(model, arrays, every)
        got = model(arrays)
        for name, array in wanted.items():
            # Both sides round activations to 255 levels of a range of about 8: where fp32 differs
            # in its last bits a value falls on the next level, 0.03 away, for one in some tens.
            assert np.abs(got[name] - array).max() < 0.1, name
            assert np.abs(got[name] - array).mean() < 3e-3, name


def test_int8_is_near_fp32_and_needs_less_memory(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(tiny_model(), path)
    sparsec.compile_model(path, tmp_path / "f.so")
    sparsec.compile_model(
        path, tmp_path / "q.so", precision="int8", calibration=Calibration(data=samples)
    )
    full, small = sparsec.load(tmp_path / "f.so"), sparsec.load(tmp_path / "q.so")
    arrays = random_inputs(full, 4, 20, seed=5, padding=True)
    a = full(arrays)["last_hidden_state"].ravel()
    b = small(arrays)["last_hidden_state"].ravel()
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.995
    weights = [m.description["weights"]["bytes"] for m in (full, small)]
    assert weights[1] < weights[0]


@pytest.mark.parametrize("words", [[], ["--attention", "int8"]], ids=["unasked", "asked"])
def test_attention_stays_fp32_where_that_is_faster(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AVX-512 without VNNI has int8 kernels for half of its vectors. It says so."""
    path, report = tmp_path / "m.onnx", tmp_path / "report.json"
    onnx.save(tiny_model(), path)
    command = ["compile", str(path), "-o", str(tmp_path / "m.so"), "--target", "skylake-avx512"]
    command += ["--precision", "int8", "--calibration", "random", "--report", str(report)]
    assert main([*command, *words]) == 0
    layers = [x["op"] for x in json.loads(report.read_text())["layers"]]
    assert layers.count("attention") == (0 if words else 2)
    assert layers.count("attention_int8") == (2 if words else 0)
    said = "stays fp32 inside: that is expected to be faster" in capsys.readouterr().out
    assert said == (not words)


def test_keep_fp32_leaves_layers(samples: Path, tmp_path: Path) -> None:
    path, library = tmp_path / "m.onnx", tmp_path / "m.so"
    onnx.save(tiny_model(), path)
    sparsec.compile_model(
        path,
        library,
        precision="int8",
        calibration=Calibration(data=samples),
        keep_fp32=["*layer.0*"],
    )
    layers = sparsec.load(library).description["layers"]
    kinds = {x["node"]: x["op"] for x in layers if x["op"].startswith("linear")}
    assert {op for name, op in kinds.items() if "layer.0" in name} == {"linear"}
    assert "linear_int8" in {op for name, op in kinds.items() if "layer.1" in name}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--calibration", "random"]),
        (["--calibration", "nowhere.npz"], ["nowhere.npz"]),
        (["--calibration-text", "lines.txt"], ["--tokenizer"]),
        (["--calibration", "random", "--calibration-text", "lines.txt"], ["one of"]),
    ],
    ids=["none", "missing file", "no tokenizer", "two sources"],
)
def test_bad_calibration(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    base = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.so"), "-q"]
    assert main([*base, "--precision", "int8", *words]) == 2
    message = capsys.readouterr().err
    assert message.count("sparsec: error:") == 1
    assert all(part in message for part in parts), message
    assert not (tmp_path / "m.so").exists()


def test_calibration_without_int8_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    words = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.so"), "-q"]
    assert main([*words, "--calibration", "random"]) == 2
    assert "--precision int8" in capsys.readouterr().err
