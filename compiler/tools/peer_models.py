"""int8 files for the peers, made by ONNX Runtime's quantiser from an fp32 file.

Activations are u8 per tensor, weights s8 symmetric per channel: what runs fastest on a CPU with
VNNI or AMX. Outputs of the products stay fp32: rounding them to u8 first, the quantiser's own
default, is slower in ONNX Runtime and in OpenVINO.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from sparsec.errors import InvalidInput
from sparsec.files import replacing

Arrays = dict[str, np.ndarray[Any, Any]]
PRODUCTS = ("MatMul", "Gemm")


def quantize_static(
    path: Path,
    output: Path,
    samples: Arrays,
    *,
    attention: bool,
    products: Sequence[str] = PRODUCTS,
    outputs: bool = False,
) -> None:
    """Write the QDQ form of `path`, ranges from `samples` (first axis of each array = samples).

    `attention` quantises the two products of attention as well as the linear layers; only ops
    in `products` are quantised. `outputs` rounds the outputs of the products too.
    """
    _check_installed()
    from onnxruntime.quantization import QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    with _whole(output) as partial:
        quantize(
            str(path),
            str(partial),
            _Samples(samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(products),
            nodes_to_exclude=[] if attention else _products_of_activations(path),
            extra_options={
                "WeightSymmetric": True,
                "ActivationSymmetric": False,
                "QDQDisableWeightAdjustForInt32Bias": True,
                "OpTypesToExcludeOutputQuantization": [] if outputs else list(products),
            },
        )


def quantize_dynamic(path: Path, output: Path) -> None:
    """Write the form of `path` whose activations are quantised by their range in each run."""
    _check_installed()
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    with _whole(output) as partial:
        quantize(
            str(path),
            str(partial),
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"WeightSymmetric": True},
        )


def without_roundings(path: Path, output: Path) -> None:
    """Write the fp32 form of a QDQ file: weights dequantised, no rounding of activations."""
    model = onnx.load(path)
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    rounded = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    aliases: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = _dequantized(node, constants)
        elif node.op_type == "DequantizeLinear" and node.input[0] in rounded:
            aliases[node.output[0]] = rounded[node.input[0]]
        elif node.op_type != "QuantizeLinear":
            kept.append(node)
    used = set()
    for node in kept:
        for i, name in enumerate(node.input):
            while name in aliases:
                name = aliases[name]
            node.input[i] = name
            used.add(name)
    kept = [n for n in kept if n.op_type != "Constant" or n.output[0] in used]  # were scales
    for value in graph.output:
        if value.name in aliases:  # a name that the caller knows
            kept.append(onnx.helper.make_node("Identity", [aliases[value.name]], [value.name]))
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(t for name, t in constants.items() if name in used)
    with _whole(output) as partial:
        onnx.save(model, partial)


def with_fp32_tables(path: Path, output: Path) -> None:
    """Write a QDQ file with its look-up tables in fp32.

    ONNX Runtime would dequantise a whole table in every run, to read some rows of it.
    """
    model = onnx.load(path)
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    folded = [
        node
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in constants
        and node.output[0] in tables
    ]
    for node in folded:
        constants[node.output[0]] = _dequantized(node, constants)
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(t for name, t in constants.items() if name in used)
    with _whole(output) as partial:
        onnx.save(model, partial)


def _dequantized(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> onnx.TensorProto:
    """What a DequantizeLinear of constants gives, per tensor or along its axis."""
    values, scale, *zero = (onnx.numpy_helper.to_array(constants[name]) for name in node.input)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [1] * values.ndim
    if scale.ndim:
        shape[axis] = -1
    shifted = values.astype(np.int32) - (zero[0].astype(np.int32).reshape(shape) if zero else 0)
    array = shifted.astype(np.float32) * scale.reshape(shape)
    return onnx.numpy_helper.from_array(array, node.output[0])


class _Samples:
    """The samples one by one, as ONNX Runtime's CalibrationDataReader gives them."""

    def __init__(self, samples: Arrays):
        count = min(len(array) for array in samples.values())
        self._rest = iter(
            [{name: array[i : i + 1] for name, array in samples.items()} for i in range(count)]
        )

    def get_next(self) -> Arrays | None:
        return next(self._rest, None)


def _products_of_activations(path: Path) -> list[str]:
    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    return [
        node.name
        for node in graph.node
        if node.op_type in PRODUCTS and not constants & set(node.input[:2])
    ]


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """As `replacing`, without the quantiser's advice."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with replacing(output) as partial:
            yield partial
    finally:
        logging.disable(before)


def _check_installed() -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        raise InvalidInput(
            "int8 files for the peers need onnxruntime: pip install 'sparsec[bench]'"
        )
