"""Scales per token end to end: with --dynamic, and in models that ONNX Runtime wrote."""

from __future__ import annotations

from collections import Counter
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
from sparsec.models.build import Pruning, build_model
from sparsec.models.tiny import tiny_model, tiny_spec
from sparsec.options import Calibration
from sparsec.passes import Quantization, graph_pipeline, int8_pipeline
from sparsec.passes.manager import PassManager
from sparsec.target import Isa, Target
from sparsec.tools.inputs import random_inputs
from sparsec.tools.verify import without_padding

PRODUCTS = 8  # of tiny BERT's encoder


def ops(report: Any) -> Counter[str]:
    return Counter(layer["op"] for layer in report["layers"])


@pytest.mark.parametrize("isa", ["avx2", "avx512vnni"])
@pytest.mark.parametrize("block", [None, (4, 1)], ids=str)
def test_library_equals_the_oracle(isa: str, block: tuple[int, int] | None, tmp_path: Path):
    if not Target.host().has(Isa(isa)):
        pytest.skip(f"this CPU has no {isa}")
    path = tmp_path / "m.onnx"
    onnx.save(build_model(tiny_spec(), pruning=Pruning(0.7, *block) if block else None), path)
    result = sparsec.compile_model(
        path, path.with_suffix(".so"), precision="int8", dynamic=True, isa=Isa(isa)
    )
    found = ops(result.report)
    assert (found["linear_int8"], found["quantize_tokens"], found["attention"]) == (8, 8, 2)
    model = sparsec.load(result.library)
    graph = import_model(path)
    PassManager([*graph_pipeline(), *int8_pipeline(Quantization({}, dynamic=True))]).run(graph)
    for batch, seq in [(1, 1), (3, 33), (2, 64)]:
        arrays = random_inputs(model, batch, seq, seed=seq, padding=True)
        for name, wanted in without_padding(model, arrays, run(graph, arrays)).items():
            # Where fp32 differs in its last bits a number falls on the next of 255 levels.
            difference = np.abs(model(arrays)[name] - wanted)
            assert difference.max() < 0.1, name
            assert difference.mean() < 3e-3, name


def test_a_token_does_not_depend_on_its_neighbours_in_the_batch(tmp_path: Path):
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    library = tmp_path / "m.so"
    sparsec.compile_model(tmp_path / "m.onnx", library, precision="int8", dynamic=True)
    model = sparsec.load(library)
    both = random_inputs(model, 2, 17, seed=3, padding=False)
    alone = {name: array[:1] for name, array in both.items()}
    y = [np.array(model(x)["last_hidden_state"][0]) for x in (both, alone)]
    np.testing.assert_array_equal(*y)


def test_dynamic_goes_with_int8_and_without_calibration(tmp_path: Path, capsys: Any):
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    words = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.so"), "-q", "--dynamic"]
    assert main(words) == 2
    assert "--precision int8" in capsys.readouterr().err
    assert main([*words, "--precision", "int8", "--calibration", "random"]) == 2
    assert "leave out either" in capsys.readouterr().err
    assert main([*words, "--precision", "int8", "--keep-fp32", "*layer.0*"]) == 0
    layers = sparsec.load(tmp_path / "m.so").description["layers"]
    kinds = {x["node"]: x["op"] for x in layers if x["op"].startswith("linear")}
    assert {op for name, op in kinds.items() if "layer.0" in name} == {"linear"}
    with pytest.raises(InvalidInput, match="--dynamic"):
        sparsec.compile_model(
            tmp_path / "m.onnx",
            tmp_path / "n.so",
            precision="int8",
            dynamic=True,
            calibration=Calibration(random=True),
        )


@pytest.mark.isa("avx512bf16")
def test_what_int8_leaves_may_be_bf16(tmp_path: Path):
    path = tmp_path / "m.onnx"
    onnx.save(tiny_model(), path)
    result = sparsec.compile_model(
        path, tmp_path / "m.so", precision="int8", dynamic=True, keep_fp32=["*layer.0*"],
        rest="bf16", attention="bf16",
    )  # fmt: skip
    found = ops(result.report)
    half = PRODUCTS // 2
    assert (found["linear_int8"], found["linear_bf16"]) == (half, half + 1)  # and the pooler
    assert (found["attention_bf16"], found["attention"], found["linear"]) == (2, 0, 0)
    model = sparsec.load(result.library)
    arrays = random_inputs(model, 2, 17, seed=3, padding=True)
    for name, exact in without_padding(model, arrays, run(import_model(path), arrays)).items():
        off = np.linalg.norm(model(arrays)[name] - exact) / np.linalg.norm(exact)
        assert off < 0.05, name


def test_attention_in_int8_needs_ranges(tmp_path: Path):
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    with pytest.raises(InvalidInput, match="--attention int8 needs the ranges"):
        sparsec.compile_model(
            tmp_path / "m.onnx",
            tmp_path / "m.so",
            precision="int8",
            dynamic=True,
            attention="int8",
        )
    assert not (tmp_path / "m.so").exists()


class Batches:
    """What quantize_static reads samples from."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        names, ones = ("attention_mask", "token_type_ids"), np.ones((4, 33), np.int64)
        feeds = [
            {"input_ids": rng.integers(0, 100, (4, 33)), **dict.fromkeys(names, ones)}
            for _ in range(2)
        ]
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@pytest.mark.parametrize("kind", ["dynamic", "dynamic, per channel", "static", "all static"])
def test_models_that_onnx_runtime_quantised(kind: str, tmp_path: Path):
    """Operators of bytes reach the int8 kernels, and answer as well as ONNX Runtime does."""
    quantization = pytest.importorskip(
        "onnxruntime.quantization", reason="ONNX Runtime writes the models of these tests"
    )
    import onnxruntime

    source, path = tmp_path / "source.onnx", tmp_path / "m.onnx"
    onnx.save(tiny_model(), source)
    if kind.startswith("dynamic"):
        quantization.quantize_dynamic(source, path, per_channel="channel" in kind)
    else:
        quantization.quantize_static(
            source,
            path,
            Batches(),
            quant_format=quantization.QuantFormat.QOperator,
            op_types_to_quantize=None if kind.startswith("all") else ["MatMul", "Gemm"],
        )
    written = {n.op_type for n in onnx.load(path).graph.node}
    assert written & {"MatMulInteger", "QLinearMatMul"}
    result = sparsec.compile_model(path, tmp_path / "m.so", keep_padding=True)
    found = ops(result.report)
    assert (result.report["precision"], found["linear_int8"]) == ("int8", PRODUCTS)
    assert found["attention"] + found["attention_int8"] == 2
    assert not found["matmul"] + found["quantize"] + found["dequantize"]
    model = sparsec.load(result.library)
    feed = random_inputs(model, 3, 21, seed=1, padding=True)
    exact = run(import_model(source), feed)["last_hidden_state"]
    session = onnxruntime.InferenceSession(path)
    (theirs,) = session.run(["last_hidden_state"], feed)
    ours = model(feed)["last_hidden_state"]
    assert np.abs(ours - exact).mean() < 1.1 * np.abs(theirs - exact).mean()


def test_to_the_letter_a_dynamic_model_is_onnx_runtime(tmp_path: Path):
    quantization = pytest.importorskip(
        "onnxruntime.quantization", reason="ONNX Runtime writes the model of this test"
    )
    import onnxruntime

    source, path = tmp_path / "source.onnx", tmp_path / "m.onnx"
    onnx.save(tiny_model(), source)
    quantization.quantize_dynamic(source, path)
    result = sparsec.compile_model(path, tmp_path / "m.so", all_roundings=True, keep_padding=True)
    model = sparsec.load(result.library)
    feed = random_inputs(model, 3, 21, seed=1, padding=True)
    (theirs,) = onnxruntime.InferenceSession(path).run(["last_hidden_state"], feed)
    step = (theirs.max() - theirs.min()) / 255
    assert (np.abs(model(feed)["last_hidden_state"] - theirs) <= step).mean() > 0.99
