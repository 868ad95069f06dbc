"""Files in fp16 or bf16: the kernels, and the answers, that the same model in fp32 has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparsec
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.models.tiny import tiny_model

MASK = np.arange(33) < np.array([33, 16, 33])[:, None]
HALF_BITS = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # what rounding to it changes, relative
PLAIN: Mapping[str, Any] = {"precision": "fp32"}


def feed() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 100, MASK.shape)
    return {
        "input_ids": ids,
        "attention_mask": MASK.astype(np.int64),
        "token_type_ids": np.zeros(MASK.shape, np.int64),
    }


def written(kind: str, ports: str) -> onnx.ModelProto:
    """tiny BERT in half precision as tools write it; its outputs are of the type `ports`."""
    if kind == "bf16":
        return in_bf16(tiny_model("bert"))
    float16 = pytest.importorskip(
        "onnxruntime.transformers.float16", reason="its converter writes the fp16 files"
    )
    model: onnx.ModelProto = float16.convert_float_to_float16(
        tiny_model("bert"), keep_io_types=ports == "fp32"
    )
    return model


def in_bf16(model: onnx.ModelProto) -> onnx.ModelProto:
    """All constants, casts and outputs in bf16."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            numbers = np.clip(numpy_helper.to_array(tensor), -3e38, 3e38)  # the mask's least
            stored = numbers.astype(bf16())
            tensor.CopyFrom(numpy_helper.from_array(stored, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.BFLOAT16
    for output in model.graph.output:
        output.type.tensor_type.elem_type = TensorProto.BFLOAT16
    return model


def bf16() -> np.dtype[Any]:
    return helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)


def compiled(model: onnx.ModelProto, folder: Path, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """(hidden states, report)"""
    path = folder / "model.onnx"
    onnx.save(model, path)
    result = sparsec.compile_model(path, path.with_suffix(".so"), **options)
    return sparsec.load(result.library)(feed())["last_hidden_state"], result.report


def ops(report: Mapping[str, Any]) -> Counter[str]:
    found = Counter(layer["op"] for layer in report["layers"])
    del found["cast"]  # of the mask, and of the outputs
    return found


@pytest.mark.parametrize(
    ("kind", "ports", "options"),
    [
        ("fp16", "fp16", PLAIN),
        ("fp16", "fp32", {"precision": "int8", "dynamic": True}),
        ("bf16", "bf16", PLAIN),
        pytest.param("bf16", "bf16", {"precision": "bf16"}, marks=pytest.mark.isa("avx512bf16")),
    ],
)
def test_a_file_in_half_precision(kind, ports, options, tmp_path):
    model = written(kind, ports)
    hidden, report = compiled(model, tmp_path, options)
    assert hidden.dtype == (np.float16 if ports == "fp16" else np.float32)
    # What is meant is exactly the file's numbers, computed in fp32.
    wanted = run(import_model(model), feed())["last_hidden_state"]
    plain, plain_report = compiled(tiny_model("bert"), tmp_path, options)
    assert ops(report) == ops(plain_report)
    assert report["padding"] == plain_report["padding"]
    assert not report["padding"]["dropped"] or not hidden[~MASK].any()
    error = np.abs(hidden.astype(np.float32) - wanted)[MASK]
    if options is PLAIN:
        # GELU's sqrt(2), by 1.4e-4 off in the file, is exact; outputs, within -4..4, are in fp16.
        assert error.max() < 2e-4 + 4 * (HALF_BITS["fp16"] if ports == "fp16" else 0)
    else:
        # No worse than the same precision does for the model in fp32, and what the half adds.
        fp32 = run(import_model(tiny_model("bert")), feed())["last_hidden_state"]
        usual = np.abs(plain - fp32)[MASK].mean()
        assert error.mean() < 1.2 * usual + HALF_BITS[kind] * np.abs(fp32[MASK]).mean()
