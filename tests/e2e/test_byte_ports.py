"""Models that take or give bytes: a product whose output is quantised, and its quantised input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparsec
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run

INPUTS, OUTPUTS = 32, 72
ZEROS = {TensorProto.UINT8: np.uint8(121), TensorProto.INT8: np.int8(3)}
WIDE_ZEROS = {TensorProto.UINT16: np.uint16(30000), TensorProto.INT16: np.int16(-5)}


def model(kind: int, bytes_in: bool) -> onnx.ModelProto:
    """x -> [quantise] -> dequantise -> MatMul -> quantise -> y."""
    weights = np.random.default_rng(0).integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8)
    constants = {
        "zero": (ZEROS | WIDE_ZEROS)[kind], "w": weights, "w_zero": np.int8(0),
        "x_scale": np.float32(0.05), "w_scale": np.float32(0.01), "y_scale": np.float32(0.0371),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["stored", "x_scale", "zero"], ["real"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_real"]),
        helper.make_node("MatMul", ["real", "w_real"], ["product"]),
        helper.make_node("QuantizeLinear", ["product", "y_scale", "zero"], ["y"]),
    ]
    if not bytes_in:
        quantise = helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["stored"])
        nodes.insert(0, quantise)
    name, type_in = ("stored", kind) if bytes_in else ("x", TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "bytes",
        [helper.make_tensor_value_info(name, type_in, ["batch", "seq", INPUTS])],
        [helper.make_tensor_value_info("y", kind, ["batch", "seq", OUTPUTS])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21)]  # from there on 16 bits are
    return helper.make_model(graph, opset_imports=opsets)


@pytest.mark.parametrize("all_roundings", [False, True])
@pytest.mark.parametrize("bytes_in", [False, True])
@pytest.mark.parametrize("kind", list(ZEROS), ids=["u8", "i8"])
def test_bytes_come_and_go(kind: int, bytes_in: bool, all_roundings: bool, tmp_path: Path) -> None:
    proto = model(kind, bytes_in)
    onnx.save(proto, tmp_path / "m.onnx")
    library = tmp_path / "m.so"
    sparsec.compile_model(tmp_path / "m.onnx", library, all_roundings=all_roundings)
    # Sums are whole numbers below 2**24, so exact in fp32 too: only the last product may round
    # apart, and the scales are such that hardly a result is near a tie.
    check_numbers(library, proto, ZEROS[kind], bytes_in)


def check_numbers(library: Path, proto: onnx.ModelProto, zero: Any, bytes_in: bool) -> None:
    """The library gives the oracle's stored numbers, but for one in a thousand a step apart."""
    rng, limits = np.random.default_rng(1), np.iinfo(zero.dtype)
    with sparsec.load(library) as loaded:
        for batch, seq in ((1, 1), (2, 9), (3, 33)):
            x = rng.standard_normal((batch, seq, INPUTS)).astype(np.float32)
            if bytes_in:
                numbers = np.rint(x * 40) + zero
                x = numbers.clip(limits.min, limits.max).astype(zero.dtype)
            feed = {"stored" if bytes_in else "x": x}
            got, wanted = loaded(feed)["y"], run(import_model(proto), feed)["y"]
            assert got.dtype == zero.dtype
            off = np.abs(got.astype(int) - wanted.astype(int))
            assert off.max() <= 1
            assert np.count_nonzero(off) <= 0.001 * off.size


@pytest.mark.parametrize("bytes_in", [False, True])
@pytest.mark.parametrize("kind", list(WIDE_ZEROS), ids=["u16", "i16"])
def test_16_bits_come_and_go(kind: int, bytes_in: bool, tmp_path: Path) -> None:
    """With all roundings where the input is to be rounded, which else is dropped."""
    proto = model(kind, bytes_in)
    onnx.save(proto, tmp_path / "m.onnx")
    library = tmp_path / "m.so"
    sparsec.compile_model(tmp_path / "m.onnx", library, all_roundings=not bytes_in)
    # A product is some hundred steps of 0.0371, and its sum in fp32 off by 1e-6 of that.
    check_numbers(library, proto, WIDE_ZEROS[kind], bytes_in)
