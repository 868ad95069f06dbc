"""How near a compiled QDQ model is to ONNX Runtime, rounding by rounding.

Two engines sum fp32 numbers in another order. A sum on the edge between two steps falls to another
side, and all layers behind it move: the outputs tell little of how well the roundings are done. So
a model is cut at its roundings, each piece reads the numbers that ONNX Runtime found, and what it
gives is compared with ONNX Runtime's number at its end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import sparsec

Array = NDArray[Any]
Feed = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Point:
    """A rounding: `stored` is the name of its numbers, which stand for (number - zero) * scale."""

    stored: str
    scale: Array
    zero: Array

    @property
    def begin(self) -> str:
        """The input of the pieces behind it."""
        return f"{self.stored}.begin"

    @property
    def end(self) -> str:
        """The output of the piece before it."""
        return f"{self.stored}.end"

    def real(self, stored: Array) -> Array:
        """f32: what ONNX's DequantizeLinear gives. An end of the range of a mask can be -inf."""
        shifted = stored.astype(np.int32) - self.zero.astype(np.int32)
        with np.errstate(over="ignore"):
            result: Array = shifted.astype(np.float32) * self.scale
        return result

    def number(self, real: Array) -> Array:
        """i32: the numbers that `real` was made of."""
        limits = np.iinfo(self.zero.dtype)
        number = np.rint(real.astype(np.float64) / self.scale) + self.zero
        result: Array = np.clip(number, limits.min, limits.max).astype(np.int32)
        return result


@dataclass(frozen=True, slots=True)
class Agreement:
    """At one rounding, over real tokens: how many numbers, and how many are not ONNX Runtime's.

    `ours` and `literal` differ at all, `ours_far` by more than a step. `literal` is ONNX Runtime
    without its optimisations: fp32 products of dequantised numbers, as the file says.
    """

    point: str
    numbers: int
    ours: int
    ours_far: int
    literal: int


def agreement(path: Path, feed: Feed, folder: Path) -> list[Agreement]:
    """Compile the pieces of the QDQ model at `path` into `folder`; compare them on `feed`.

    The rows are the roundings of `points`. Tokens where `attention_mask` is 0 do not count.
    """
    model = onnx.load(path)
    found = points(model)
    theirs = run_onnxruntime(with_outputs(model, [p.stored for p in found]), feed)
    cut = pieces(model, found, feed, theirs)
    file = folder / "pieces.onnx"
    onnx.save(cut, file)
    sparsec.compile_model(file, file.with_suffix(".so"), all_roundings=True)
    library = sparsec.load(file.with_suffix(".so"))
    known = {**feed, **{p.begin: p.real(theirs[p.stored]) for p in found}}
    inputs = {i.name: known[i.name] for i in cut.graph.input}
    ours, literal = library(inputs), run_onnxruntime(cut, inputs, optimised=False)
    mask = feed.get("attention_mask")
    rows = []
    for point in found:
        wanted = theirs[point.stored]
        steps = [np.abs(point.number(got[point.end]) - wanted) for got in (ours, literal)]
        if mask is not None and wanted.shape[:2] == mask.shape:
            steps = [s[mask == 1] for s in steps]
        counts = [int(np.count_nonzero(s)) for s in (steps[0], steps[0] > 1, steps[1])]
        rows.append(Agreement(point.stored, steps[0].size, *counts))
    return rows


def quantise(
    source: Path,
    output: Path,
    samples: Sequence[Feed],
    kind: str,
    *,
    per_channel: bool,
    everything: bool = False,
) -> None:
    """Write the QDQ form that ONNX Runtime makes by default: weights s8, activations `kind`
    (QUInt8 or QInt8, the latter symmetric), of the products alone or of all that it can."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    logging.disable(logging.WARNING)  # advice to simplify the model first
    try:
        quantize_static(
            source,
            output,
            _Samples(iter(samples)),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType[kind],
            weight_type=QuantType.QInt8,
            per_channel=per_channel,
            op_types_to_quantize=None if everything else ["MatMul", "Gemm"],
            extra_options={"ActivationSymmetric": kind == "QInt8"},
        )
    finally:
        logging.disable(logging.NOTSET)


@dataclass(frozen=True, slots=True)
class _Samples:
    """What quantize_static reads samples from."""

    rest: Iterator[Feed]

    def get_next(self) -> Feed | None:
        return next(self.rest, None)


def points(model: onnx.ModelProto) -> list[Point]:
    """The roundings of values that are no constants, in the order of the file."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return [
        Point(node.output[0], constants[node.input[1]], constants[node.input[2]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    ]


def with_outputs(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """A copy that gives the values of these names too."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    return copy


def pieces(
    model: onnx.ModelProto, found: list[Point], feed: Feed, theirs: Feed
) -> onnx.ModelProto:
    """The model cut at each rounding, which rounds what comes and, for the pieces behind, what is
    given. Its outputs are the ends; all shapes are those of `feed` and of `theirs`."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    graph = cut.graph
    for value in graph.input:
        shape = feed[value.name].shape
        value.type.CopyFrom(helper.make_tensor_type_proto(value.type.tensor_type.elem_type, shape))
    del graph.output[:]
    operands = {n.output[0]: list(n.input) for n in graph.node if n.op_type == "QuantizeLinear"}
    begun = {p.stored: f"{p.begin}.stored" for p in found}
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        node.input[:] = [begun.get(name, name) for name in node.input]
    kind = onnx.TensorProto.FLOAT
    for point in found:
        quant = operands[point.stored][1:]
        shape = theirs[point.stored].shape
        graph.input.append(helper.make_tensor_value_info(point.begin, kind, shape))
        graph.output.append(helper.make_tensor_value_info(point.end, kind, shape))
        begin = helper.make_node("QuantizeLinear", [point.begin, *quant], [begun[point.stored]])
        end = helper.make_node("DequantizeLinear", [point.stored, *quant], [point.end])
        graph.node.append(begin)  # in front of what reads it
        nodes.append(end)
    graph.node.extend(nodes)
    return cut


def run_onnxruntime(
    model: onnx.ModelProto, feed: Feed, *, optimised: bool = True
) -> dict[str, Array]:
    """The outputs by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    wanted = {i.name: feed[i.name] for i in session.get_inputs()}
    return dict(zip(names, map(np.asarray, session.run(names, wanted)), strict=True))
