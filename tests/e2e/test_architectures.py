"""What other encoders have and BERT has not, compiled: one layer of each, without torch.

`benchmarks/export_architectures.py` makes whole models with the real exporters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import sparsec
from sparsec.calibration import calibrate, load_calibration
from sparsec.errors import InvalidInput
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.graph import Graph
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

# Sums of up to 48 fp32 products of order 1, in another order, through one layer.
TOLERANCE = 2e-5

HEADS = """
    shape = Shape (ids)
    split = Concat <axis = 0> (shape, heads)
    merged = Concat <axis = 0> (shape, minus)
"""

# GPT-2: flattened tokens around a Gemm with the weight as [in, out], and a causal mask.
CAUSAL = f"""{HEADS}
    x = Gather (table, ids)
    flat = Reshape (x, rows)
    y = Gemm (flat, wqkv, bqkv)
    wide = Concat <axis = 0> (shape, wide_channels)
    qkv = Reshape (y, wide)
    q, k, v = Split <axis = 2> (qkv)
    q4 = Reshape (q, split)
    k4 = Reshape (k, split)
    v4 = Reshape (v, split)
    qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    kt = Transpose <perm = [0, 2, 3, 1]> (k4)
    vh = Transpose <perm = [0, 2, 1, 3]> (v4)
    raw = MatMul (qh, kt)
    scaled = Mul (raw, half)
    seq1 = Gather (shape, one)
    square = Concat <axis = 0> (seq1, seq1)
    ones = ConstantOfShape <value = int64[1] {{1}}> (square)
    lower = Trilu <upper = 0> (ones)
    causal = Cast <to = 9> (lower)
    keys = Unsqueeze (mask, middle)
    padding = Cast <to = 9> (keys)
    both = And (causal, padding)
    scores = Where (both, scaled, lowest)
    p = Softmax <axis = -1> (scores)
    c = MatMul (p, vh)
    c4 = Transpose <perm = [0, 2, 1, 3]> (c)
    c3 = Reshape (c4, merged)
    flat2 = Reshape (c3, rows)
    o = Gemm (flat2, wo, bo)
    like = Shape (x)
    o3 = Reshape (o, like)
    out = Add (o3, x)
"""

# ModernBERT: one product with an axis for q, k and v; rotary, local attention, GeGLU.
ROTARY = f"""{HEADS}
    x = Gather (table, ids)
    y = MatMul (x, wqkv)
    three = Concat <axis = 0> (shape, three_heads)
    y5 = Reshape (y, three)
    q5, k5, v5 = Split <axis = 2> (y5)
    q4 = Squeeze (q5, two)
    k4 = Squeeze (k5, two)
    v4 = Squeeze (v5, two)
    qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    kh = Transpose <perm = [0, 2, 1, 3]> (k4)
    vh = Transpose <perm = [0, 2, 1, 3]> (v4)
    seq1 = Gather (shape, one)
    seq = Squeeze (seq1)
    positions = Range (zero, seq, step)
    column = Unsqueeze (positions, one)
    floats = Cast <to = 1> (column)
    angles = Mul (floats, frequencies)
    doubled = Concat <axis = -1> (angles, angles)
    cos = Cos (doubled)
    sin = Sin (doubled)
    qlow = Slice (qh, zeros, halves, threes)
    qhigh = Slice (qh, halves, ends, threes)
    qneg = Neg (qhigh)
    qturned = Concat <axis = -1> (qneg, qlow)
    q1 = Mul (qh, cos)
    q2 = Mul (qturned, sin)
    qr = Add (q1, q2)
    klow = Slice (kh, zeros, halves, threes)
    khigh = Slice (kh, halves, ends, threes)
    kneg = Neg (khigh)
    kturned = Concat <axis = -1> (kneg, klow)
    k1 = Mul (kh, cos)
    k2 = Mul (kturned, sin)
    kr = Add (k1, k2)
    kt = Transpose <perm = [0, 1, 3, 2]> (kr)
    raw = MatMul (qr, kt)
    scaled = Mul (raw, half)
    row = Unsqueeze (positions, zeros)
    distance = Sub (column, row)
    far = Abs (distance)
    near = LessOrEqual (far, window)
    keys = Unsqueeze (mask, middle)
    padding = Cast <to = 9> (keys)
    both = And (near, padding)
    fill = Where (both, zero_float, lowest)
    scores = Add (scaled, fill)
    p = Softmax <axis = -1> (scores)
    c = MatMul (p, vh)
    c4 = Transpose <perm = [0, 2, 1, 3]> (c)
    c3 = Reshape (c4, merged)
    o = MatMul (c3, wo)
    a = Add (o, x)
    wi = MatMul (a, wgate)
    gate, value = Split <axis = 2> (wi)
    gs = Sigmoid (gate)
    active = Mul (gate, gs)
    out = Mul (active, value)
"""

# MPNet: a bias per head and distance, from a table, added to all scores.
RELATIVE = f"""{HEADS}
    x = Gather (table, ids)
    q = MatMul (x, wo)
    q4 = Reshape (q, split)
    qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    kt = Transpose <perm = [0, 2, 3, 1]> (q4)
    raw = MatMul (qh, kt)
    seq1 = Gather (shape, one)
    seq = Squeeze (seq1)
    positions = Range (zero, seq, step)
    column = Unsqueeze (positions, one)
    row = Unsqueeze (positions, zeros)
    distance = Sub (row, column)
    far = Abs (distance)
    bucket = Min (far, window)
    values = Gather (biases, bucket)
    bias3 = Transpose <perm = [2, 0, 1]> (values)
    bias = Unsqueeze (bias3, zeros)
    scores = Add (raw, bias)
    keys = Unsqueeze (mask, middle)
    floats = Cast <to = 1> (keys)
    off = Sub (one_float, floats)
    fill = Mul (off, lowest)
    masked = Add (scores, fill)
    p = Softmax <axis = -1> (masked)
    c = MatMul (p, qh)
    c4 = Transpose <perm = [0, 2, 1, 3]> (c)
    out = Reshape (c4, merged)
"""

BODIES = {"causal": CAUSAL, "rotary": ROTARY, "relative": RELATIVE}
FUSED = {
    "causal": {"embedding": 1, "linear": 2, "attention": 1},
    "rotary": {"embedding": 1, "linear": 3, "attention": 1, "rotary": 2, "gated": 1},
    "relative": {"linear": 1, "attention": 1},
}


def constants(rng: np.random.Generator) -> dict[str, Any]:
    def weight(*shape: int) -> Any:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    numbers = {
        "heads": [2, 4],
        "minus": [-1],
        "rows": [-1, 8],
        "wide_channels": [24],
        "three_heads": [3, 2, 4],
        "middle": [1, 2],
        "one": [1],
        "two": [2],
        "zeros": [0],
        "halves": [2],
        "ends": [4],
        "threes": [3],
        "zero": 0,
        "step": 1,
        "window": 2,
    }
    floats = {"half": 0.5, "lowest": -3.4e38, "zero_float": 0.0, "one_float": 1.0}
    return {
        **{name: np.array(value, np.int64) for name, value in numbers.items()},
        **{name: np.float32(value) for name, value in floats.items()},
        "table": weight(11, 8),
        "wqkv": weight(8, 24),
        "bqkv": weight(24),
        "wo": weight(8, 8),
        "bo": weight(8),
        "wgate": weight(8, 12),
        "biases": weight(3, 2),
        "frequencies": np.array([[1.0, 0.1]], np.float32),
    }


def model_of(body: str, rng: np.random.Generator) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>\n'
        "g (int64[batch, seq] ids, int64[batch, seq] mask) => (float[batch, seq, c] out) {"
        f"{body}}}"
    )
    words = set(body.replace(",", " ").replace("(", " ").replace(")", " ").split())
    for name, data in constants(rng).items():
        if name in words:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(data), name))
    if "mask" not in words:
        del model.graph.input[1]
    return model


def masks(batch: int, seq: int) -> list[Any]:
    right = np.ones((batch, seq), np.int64)
    right[-1, (seq + 1) // 2 :] = 0
    holes = np.ones((batch, seq), np.int64)
    holes[:, 1::3] = 0
    ones, zeros = np.ones((batch, seq), np.int64), np.zeros((batch, seq), np.int64)
    return [ones, right, right[:, ::-1].copy(), holes, zeros]


@pytest.mark.parametrize("name", BODIES)
def test_layer(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    model = model_of(BODIES[name], rng)
    path = tmp_path / f"{name}.onnx"
    onnx.save(model, path)
    report = sparsec.compile_model(path, path.with_suffix(".so")).report
    ops = [layer["op"] for layer in report["layers"] if not layer["generic"]]
    assert {op: ops.count(op) for op in FUSED[name]} == FUSED[name]
    reference = ReferenceEvaluator(model)
    with sparsec.load(path.with_suffix(".so"), threads=2) as compiled:
        for batch, seq in ((1, 1), (2, 7), (3, 33), (1, 70)):
            ids = rng.integers(0, 11, (batch, seq))
            for mask in masks(batch, seq):
                feed = {"ids": ids, "mask": mask}
                (wanted,) = reference.run(None, feed)
                np.testing.assert_allclose(compiled(feed)["out"], wanted, 0, TOLERANCE)


def quantised(path: Path, samples: Path) -> Graph:
    """The graph in int8, with ranges of these samples."""
    graph = import_model(path)
    PassManager(graph_pipeline()).run(graph)
    names = [*quantized_values(graph), *attention_values(graph)]
    observed = calibrate(graph, load_calibration(samples, graph), names)
    ranges = {name: choose_range(o, "minmax") for name, o in observed.items()}
    PassManager(int8_pipeline(Quantization(ranges))).run(graph)
    return graph


@pytest.mark.parametrize(
    ("name", "isa"),
    [
        pytest.param("causal", "avx2", marks=pytest.mark.isa("avx2")),
        pytest.param("relative", "avx512vnni", marks=pytest.mark.isa("avx512vnni")),
        pytest.param("rotary", "avx512vnni", marks=pytest.mark.isa("avx512vnni")),
    ],
)
def test_int8_attention_takes_its_mask(
    name: str, isa: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path, library, samples = (tmp_path / f for f in ("m.onnx", "m.so", "samples.npz"))
    onnx.save(model_of(BODIES[name], rng), path)
    np.savez(samples, ids=rng.integers(0, 11, (24, 12)), mask=np.ones((24, 12), np.int64))
    sparsec.compile_model(
        path,
        library,
        precision="int8",
        calibration=Calibration(data=samples),
        attention="int8",
        target="icelake-server",
        isa=Isa(isa),
    )
    graph = quantised(path, samples)
    with sparsec.load(library, threads=2) as compiled:
        steps = compiled.description["steps"]
        assert [s["isa"] for s in steps if s["op"] == "attention_int8"] == [isa]
        for batch, seq in ((1, 1), (3, 33), (1, 70)):
            feed = {"ids": rng.integers(0, 11, (batch, seq)), "mask": masks(batch, seq)[1]}
            got, wanted = compiled(feed)["out"], run(graph, feed)["out"]
            # Values of order 1 have steps of about 0.02; a doubtful one falls on the next.
            assert np.abs(got - wanted).max() < 0.1
            assert np.abs(got - wanted).mean() < 3e-3


def test_bad_inputs_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "causal.onnx"
    onnx.save(model_of(CAUSAL, rng), path)
    sparsec.compile_model(path, path.with_suffix(".so"))
    good = np.ones((2, 5), np.int64)
    with sparsec.load(path.with_suffix(".so"), threads=1) as model:
        for changes, message in (
            ({"ids": good * 0.5}, "'ids': wanted int64, got float64"),
            ({"mask": good.astype(np.float32)}, "'mask': wanted int64, got float32"),
            ({"ids": good + 11}, "an index is out of range: a token id, or a position"),
            ({"ids": good - 20}, "an index is out of range"),
            ({"ids": good[:0], "mask": good[:0]}, "axis 0: wanted a size of at least 1, got 0"),
            ({"mask": good[:, :4]}, "wanted seq = 5|got 4"),
        ):
            with pytest.raises(InvalidInput, match=message):
                model({"ids": good, "mask": good, **changes})
        assert np.isfinite(model({"ids": good, "mask": good})["out"]).all()


IMAGE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[batch, 3, 10, 7] image) => (float[batch, n, 5] out) {
    grid = Conv <kernel_shape = [4, 3], strides = [4, 3]> (image, kernel, bias)
    flat = Reshape (grid, patches)
    out = Transpose <perm = [0, 2, 1]> (flat)
}"""


def test_patches_of_an_image_are_one_linear_layer(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    model = onnx.parser.parse_model(IMAGE)
    for name, data in {
        "kernel": rng.standard_normal((5, 3, 4, 3)).astype(np.float32) / 6,
        "bias": rng.standard_normal(5).astype(np.float32),
        "patches": np.array([0, 5, -1]),
    }.items():
        model.graph.initializer.append(numpy_helper.from_array(data, name))
    path = tmp_path / "image.onnx"
    onnx.save(model, path)
    report = sparsec.compile_model(path, path.with_suffix(".so")).report
    assert [r["op"] for r in report["layers"]].count("linear") == 1
    assert not any(r["op"] == "conv" for r in report["layers"])
    reference = ReferenceEvaluator(model)
    with sparsec.load(path.with_suffix(".so"), threads=1) as compiled:
        for batch in (1, 3):
            feed = {"image": rng.standard_normal((batch, 3, 10, 7)).astype(np.float32)}
            (wanted,) = reference.run(None, feed)
            np.testing.assert_allclose(compiled(feed)["out"], wanted, 0, TOLERANCE)
