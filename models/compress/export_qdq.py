"""Writes a model that was prepared for quantisation as an ONNX QDQ file.

    weight        DequantizeLinear(s8[in, out], a scale per output channel) -> MatMul
    activation    QuantizeLinear, DequantizeLinear to u8 in front of each product
    large table   DequantizeLinear(s8[rows, channels], a scale per row) -> Gather

A table is rounded as `sparsec compile --precision int8` rounds it. Biases, small tables and what
lies between the products are fp32, softmax is the plain operator.
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsec.errors import CompilerError, InvalidInput
from sparsec.files import check_writable
from sparsec.models.compress.plain import make_plain
from sparsec.models.compress.quantise import (
    enabled,
    quantised_linears,
    remove_hook,
    scale_parameters,
)
from sparsec.models.compress.rounding import (
    ROUNDING,
    AttentionRounding,
    rounded_rows,
)
from sparsec.models.compress.sites import embedding_parts
from sparsec.models.evaluate import Evaluator, evaluator
from sparsec.models.export import (
    LARGEST_DIFFERENCE,
    ExportResult,
    Loaded,
    compared,
    trace_model,
    wrap_model,
)
from sparsec.models.files import write_model
from sparsec.models.registry import Head

Array = NDArray[Any]

OPSET = 17
# What _check wants: a wrong rounding changes every answer, one at an edge a few of them. Errors
# that have nothing to do with each other any more differ by 1.4 times their size.
PAIRS = (32, 2)  # batch, seq
LEAST_SAME = 2
MOST_NOISE = 1.5


def export(
    model: nn.Module,
    path: Path,
    head: Head,
    tokenizer_folder: Path | None = None,
) -> ExportResult:
    """Write a prepared model to `path`, unless ONNX and torch disagree about its outputs.

    The folder's tokenizer.json, if it has one, is copied beside the file. The model itself is
    left alone. Raises InvalidInput for a model that is not prepared and calibrated, and for a
    path that cannot be written; CompilerError where the file would not be what torch computes.
    """
    check_writable(path)
    _check_ready(model)
    loaded = wrap_model(_stored(model), head, with_pooler=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: what they fear is checked below
        traced = trace_model(loaded, OPSET, "torchscript")
    store_constants(traced)
    errors = _check(loaded, traced)
    files = write_model(traced, path)
    tokenizer = tokenizer_folder and tokenizer_folder / "tokenizer.json"
    if tokenizer and tokenizer.is_file():
        shutil.copyfile(tokenizer, path.with_name("tokenizer.json"))
    return ExportResult(files, errors)


def _check_ready(model: nn.Module) -> None:
    scales = scale_parameters(model)
    if not scales:
        raise InvalidInput("this model has no fake quantisation; call `prepare` and `calibrate`")
    if not all(bool(torch.isfinite(p).all()) for p in scales):
        raise InvalidInput("a scale is not finite: call `calibrate` before `export`")


class _Stored(nn.Module):  # type: ignore[misc]
    """A parametrization of a weight that holds whole steps of a scale per row."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int32))

    def forward(self, weight: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return weight
        return torch.fake_quantize_per_channel_affine(weight, self.scale, self.zero, 0, -128, 127)


def _stored(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose weights and large tables are what the file will hold."""
    found = copy.deepcopy(model).cpu().eval()
    for linear in quantised_linears(found).values():
        scale = linear.parametrizations.weight[-1].scale
        make_plain(linear)
        parametrize.register_parametrization(linear, "weight", _Stored(scale))
    for table in embedding_parts(found).tables:
        rounding = getattr(table, ROUNDING, None)
        if rounding is not None:
            levels, scale = rounded_rows(table.weight.detach())
            table.weight.data = levels * scale
            remove_hook(table, rounding)
            parametrize.register_parametrization(table, "weight", _Stored(scale.reshape(-1)))
    for module in found.modules():
        if isinstance(module, AttentionRounding):
            module.probabilities = False  # the file has none of its roundings
    return found


def store_constants(model: onnx.ModelProto) -> None:
    """QuantizeLinear(constant) -> its bytes, transposed where only a Transpose reads them."""
    graph = _Graph(model)
    for node in [n for n in model.graph.node if n.op_type == "QuantizeLinear"]:
        if graph.constant(node.input[0]) is not None:
            graph.store(node)
    graph.drop_unused()


class _Graph:
    """Constants, producers and readers of an ONNX graph, by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.initializers = {t.name: t for t in self.graph.initializer}
        self.producers = {name: n for n in self.graph.node for name in n.output}
        self.readers: defaultdict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)

    def constant(self, name: str) -> Array | None:
        """Return the value of an initialiser or Constant; of equal ones torch keeps the first."""
        if name in self.initializers:
            return np.asarray(numpy_helper.to_array(self.initializers[name]))
        node = self.producers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            return np.asarray(numpy_helper.to_array(node.attribute[0].t))
        return self.constant(node.input[0]) if node.op_type == "Identity" else None

    def store(self, quantize: onnx.NodeProto) -> None:
        """Replace a QuantizeLinear of a constant, per row, by an initialiser."""
        weight, scale = (self.constant(quantize.input[i]) for i in range(2))
        assert weight is not None, quantize.name
        assert scale is not None, quantize.name
        (dequantize,) = self.readers[quantize.output[0]]
        name = quantize.input[0].replace(".parametrizations.weight.original", ".weight")
        steps = np.rint(weight / scale[:, None]).astype(np.int8)
        axis, output = 0, dequantize.output[0]
        readers = self.readers[output]
        if [n.op_type for n in readers] == ["Transpose"]:
            steps, axis, output = np.ascontiguousarray(steps.T), 1, readers[0].output[0]
            self.graph.node.remove(readers[0])
        zeros = np.zeros(len(scale), np.int8)
        added = {f"{name}_quantized": steps, f"{name}_scale": scale, f"{name}_zero_point": zeros}
        self.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in added.items())
        dequantize.input[:] = list(added)
        dequantize.output[:] = [output]
        del dequantize.attribute[:]
        dequantize.attribute.append(helper.make_attribute("axis", axis))
        self.graph.node.remove(quantize)

    def drop_unused(self) -> None:
        """Leave out what no output depends on any more."""
        wanted = {o.name for o in self.graph.output}
        kept = []
        for node in reversed(self.graph.node):
            if wanted & set(node.output):
                wanted |= set(node.input)
                kept.append(node)
        constants = [t for t in self.graph.initializer if t.name in wanted]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(reversed(kept))
        self.graph.initializer.extend(constants)


def _check(loaded: Loaded, model: onnx.ModelProto) -> dict[str, float]:
    """The error of each output relative to torch's; CompilerError where it tells of a fault.

    Both sides sum in fp32 in their own order. A number on the edge between two steps may so fall
    to the other side (seen: 3 in a million), and what reads it moves: the longer the sequence and
    the deeper the model, the fewer answers are the same. So pairs of tokens tell whether every
    rounding is the right one, and longer sequences whether the differences stay of the size of
    what rounding itself changes.
    """
    run = evaluator(model, optimise=False)
    same = [
        np.abs(got - wanted).reshape(PAIRS[0], -1).max(axis=1) <= LARGEST_DIFFERENCE
        for _, wanted, got in compared(loaded, run, [PAIRS])
    ]
    count = int(np.logical_and.reduce(same).sum())
    if count < LEAST_SAME:
        raise CompilerError(
            f"of {PAIRS[0]} sequences of {PAIRS[1]} tokens the ONNX model answers {count} as "
            f"torch does (wanted {LEAST_SAME}); nothing was written"
        )
    errors = _errors(loaded, run)
    with enabled(loaded.module, False):
        limits = _errors(loaded, run)
    for name, error in errors.items():
        if not error <= MOST_NOISE * limits[name] + 1e-5:  # NaN fails too
            raise CompilerError(
                f"the exported {name} differs from torch's by {error:.2%} of its size, where "
                f"rounding changes {limits[name]:.2%}; nothing was written"
            )
    return errors


def _errors(loaded: Loaded, run: Evaluator) -> dict[str, float]:
    """|run - torch| / |torch| of each output over several shapes, Euclidean norms."""
    squares = {name: np.zeros(2) for name in loaded.outputs}
    for name, wanted, got in compared(loaded, run):
        squares[name] += ((got - wanted) ** 2).sum(), (wanted**2).sum()
    return {name: float(np.sqrt(a / max(b, 1e-30))) for name, (a, b) in squares.items()}
