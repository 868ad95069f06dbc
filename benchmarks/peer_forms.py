"""An ONNX model in the forms that two engines know, which make use of zeros in the weights.

    matmul_integer   QDQ -> MatMulInteger, Add (int32), Cast, Mul: the only int8 form that
                     DeepSparse fuses
    itrex_spelling   the mask and the inputs as the exporter of its day wrote them: ITREX finds its
                     layers by their spelling

Both change the model in place and leave its meaning as it is (matmul_integer rounds a bias to the
int32 that it is added in).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
# In the order in which ITREX takes them.
ITREX_INPUTS = ("input_ids", "token_type_ids", "attention_mask")
ITREX_IR_VERSION = 8  # of ONNX files; it comes with onnx 1.14


def matmul_integer(model: onnx.ModelProto) -> None:
    """Write each product of quantised values over the integers, with its bias.

    Takes what `quantize_static` writes: u8 activations per tensor, s8 weights per tensor or per
    column with zero point 0. Of Gemm transB is known.
    """
    form = _IntegerForm(model.graph)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.output[0] not in form.folded:
            nodes += form.of(node) or [node]
    _keep_used(model.graph, _without_twins(nodes, form.constants), form.constants)


@dataclass(slots=True)
class _Operand:
    """A quantised operand of a product: names of values and zero point; scale scalar or [out]."""

    values: str
    zero: str
    scale: Array


@dataclass(slots=True)
class _IntegerForm:
    """The graph that is read, and the constants with those that are new."""

    graph: onnx.GraphProto
    constants: dict[str, Array] = field(init=False)
    folded: set[str] = field(default_factory=set)  # outputs of Adds that are part of a product
    _makers: dict[str, onnx.NodeProto] = field(init=False)
    _readers: dict[str, list[onnx.NodeProto]] = field(init=False)

    def __post_init__(self) -> None:
        nodes = self.graph.node
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self._makers = {node.output[0]: node for node in nodes}
        self._readers = {}
        for node in nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def of(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """The nodes for a product of quantised operands; None for another node."""
        if node.op_type not in ("MatMul", "Gemm"):
            return None
        left, right = self._activation(node.input[0]), self._operand(node)
        if left is None or right is None:
            return None
        scale = np.asarray(left.scale * right.scale, np.float32)
        bias, output = self._bias(node)
        base = node.name
        nodes = [
            helper.make_node(
                "MatMulInteger",
                [left.values, right.values, left.zero, right.zero],
                [f"{base}.sums"],
                f"{base}.integer",
            )
        ]
        last = f"{base}.sums"
        if bias is not None:
            steps = self._new(f"{base}.bias_steps", np.rint(bias / scale).astype(np.int32))
            nodes.append(helper.make_node("Add", [last, steps], [f"{base}.biased"], f"{base}.add"))
            last = f"{base}.biased"
        real, factor = f"{base}.real", self._new(f"{base}.scale", scale)
        nodes.append(
            helper.make_node("Cast", [last], [real], f"{base}.cast", to=TensorProto.FLOAT)
        )
        nodes.append(helper.make_node("Mul", [real, factor], [output], f"{base}.mul"))
        return nodes

    def _operand(self, node: onnx.NodeProto) -> _Operand | None:
        """The second operand of a product, [in, out] when it is a weight."""
        maker = self._makers.get(node.input[1])
        if maker is None or maker.op_type != "DequantizeLinear":
            return None
        weight = self.constants.get(maker.input[0])
        if weight is None:
            return self._activation(node.input[1])
        if any(a.name == "transB" and a.i for a in node.attribute):
            weight = weight.T
        values = self._new(f"{node.name}.weight", np.ascontiguousarray(weight))
        zero = self._new(f"{node.name}.weight_zero", np.zeros((), weight.dtype))
        return _Operand(values, zero, self.constants[maker.input[1]])

    def _activation(self, name: str) -> _Operand | None:
        """What was quantised and dequantised again to `name`."""
        maker = self._makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            return None
        if maker.input[0] not in self._makers:  # a constant
            return None
        return _Operand(maker.input[0], maker.input[2], self.constants[maker.input[1]])

    def _bias(self, node: onnx.NodeProto) -> tuple[Array | None, str]:
        """The bias of a linear layer and the name of its sum: of the Gemm, or the Add after it."""
        if node.op_type == "Gemm":
            return (self._real(node.input[2]) if len(node.input) > 2 else None), node.output[0]
        readers = self._readers.get(node.output[0], [])
        if len(readers) == 1 and readers[0].op_type == "Add":
            add = readers[0]
            other = add.input[1] if add.input[0] == node.output[0] else add.input[0]
            if other in self.constants:
                self.folded.add(add.output[0])
                return self.constants[other], add.output[0]
        return None, node.output[0]

    def _real(self, name: str) -> Array:
        """A constant, or one that is dequantised from int32 with zero point 0."""
        if name in self.constants:
            return self.constants[name]
        maker = self._makers[name]
        steps, scale = (self.constants[part] for part in maker.input[:2])
        return np.asarray(steps * scale, np.float32)

    def _new(self, name: str, value: Array) -> str:
        self.constants[name] = value
        return name


def _without_twins(
    nodes: list[onnx.NodeProto], constants: dict[str, Array]
) -> list[onnx.NodeProto]:
    """Leave out a QuantizeLinear that does what one before it does: queries, keys, values."""
    first: dict[tuple[str, float, int], str] = {}
    instead: dict[str, str] = {}
    kept = []
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = instead.get(name, name)
        if node.op_type == "QuantizeLinear" and node.input[1] in constants:
            scale, zero = (constants[name].item() for name in node.input[1:])
            same = first.setdefault((node.input[0], scale, zero), node.output[0])
            if same != node.output[0]:
                instead[node.output[0]] = same
                continue
        kept.append(node)
    return kept


def _keep_used(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto], constants: dict[str, Array]
) -> None:
    """Give the graph those of the nodes and constants that its outputs need."""
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if used & set(node.output):
            kept.append(node)
            used.update(node.input)
    known = {t.name: t for t in graph.initializer}
    tensors = [
        known.get(name) or numpy_helper.from_array(value, name)
        for name, value in constants.items()
        if name in used
    ]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(tensors)


def itrex_spelling(model: onnx.ModelProto) -> None:
    """Write one Unsqueeze for each axis, and a Cast before each Where; order the inputs."""
    graph = model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Unsqueeze" and len(constants.get(node.input[1], ())) > 1:
            nodes += _unsqueezes(node, constants)
            continue
        if node.op_type == "Where":
            cast = f"{node.name}.condition"
            nodes.append(
                helper.make_node("Cast", [node.input[0]], [cast], cast, to=TensorProto.BOOL)
            )
            node.input[0] = cast
        nodes.append(node)
    inputs = sorted(graph.input, key=lambda value: ITREX_INPUTS.index(value.name))
    del graph.input[:]
    graph.input.extend(inputs)
    _keep_used(graph, nodes, constants)
    model.ir_version = min(model.ir_version, ITREX_IR_VERSION)


def _unsqueezes(node: onnx.NodeProto, constants: dict[str, Array]) -> list[onnx.NodeProto]:
    """One for each axis, from the first on; adds their axes to the constants."""
    nodes = []
    axes = sorted(constants[node.input[1]].tolist())
    last = node.input[0]
    for axis in axes:
        name = f"{node.name}.{axis}"
        constants[f"{name}.axes"] = np.array([axis])
        output = node.output[0] if axis == axes[-1] else f"{name}.output"
        nodes.append(helper.make_node("Unsqueeze", [last, f"{name}.axes"], [output], name))
        last = output
    return nodes
