"""Collects the nodes and constants of an ONNX graph, with each operator in its opset's form."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sparsec.errors import InvalidInput

OLDEST_OPSET = 11


class GraphWriter:
    """An ONNX graph under construction; every method adds nodes and returns the output's name."""

    def __init__(self, name: str, opset: int) -> None:
        newest = onnx.defs.onnx_opset_version()
        if not OLDEST_OPSET <= opset <= newest:
            raise InvalidInput(f"opset {opset} is not from {OLDEST_OPSET} to {newest}")
        self.opset = opset
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._scope: list[str] = []

    def scope(self, *names: str) -> _Scope:
        """Put these names before those of the nodes made inside a `with`."""
        return _Scope(self._scope, names)

    def input(self, name: str, dtype: int, shape: tuple[str | int, ...]) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, shape: tuple[str | int, ...]) -> str:
        """Rename `value` to `name`, declare it a float graph output and return `name`."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [name if used == value else used for used in names]
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        name = "/" + "/".join([*self._scope, f"{kind}_{len(self._nodes)}"])
        results = [f"{name}_output_{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, inputs, results, name=name, **attributes))
        return results

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """Add an initializer under its own name."""
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def integers(self, *values: int) -> str:
        """Add an int64 vector constant."""
        return self._constant(np.array(values, np.int64))

    def integer(self, value: int) -> str:
        """Add an int64 scalar constant."""
        return self._constant(np.array(value, np.int64))

    def scalar(self, value: float) -> str:
        """Add a float32 scalar constant."""
        return self._constant(np.array(value, np.float32))

    def squeeze(self, x: str, axis: int) -> str:
        """Drop an axis of size one."""
        if self.opset < 13:
            return self.op("Squeeze", x, axes=[axis])
        return self.op("Squeeze", x, self.integers(axis))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """Add axes of size one."""
        if self.opset < 13:
            return self.op("Unsqueeze", x, axes=list(axes))
        return self.op("Unsqueeze", x, self.integers(*axes))

    def mean_last(self, x: str) -> str:
        """Mean over the last axis, kept with size one."""
        if self.opset < 18:
            return self.op("ReduceMean", x, axes=[-1], keepdims=1)
        return self.op("ReduceMean", x, self.integers(-1), keepdims=1)

    def split_last(self, x: str, sizes: list[int]) -> list[str]:
        """Cut the last axis."""
        if self.opset < 13:
            return self.ops("Split", x, outputs=len(sizes), axis=-1, split=sizes)
        return self.ops("Split", x, self.integers(*sizes), outputs=len(sizes), axis=-1)

    def size_of(self, x: str, axis: int) -> str:
        """Read the size of an axis as a scalar, as tracing exporters write it."""
        return self.op("Gather", self.op("Shape", x), self.integer(axis), axis=0)

    def shape(self, *parts: str | int) -> str:
        """Build a shape vector from scalars and numbers."""
        vectors = [
            self.integers(part) if isinstance(part, int) else self.unsqueeze(part, 0)
            for part in parts
        ]
        return self.op("Concat", *vectors, axis=0)

    def model(self) -> onnx.ModelProto:
        """Return the finished model; the writer is not to be used afterwards."""
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs)
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(
            graph,
            producer_name="sparsec.models",
            ir_version=helper.find_min_ir_version_for(opsets),
            opset_imports=opsets,
        )
        while self._constants:  # last and one at a time: the weights are not held twice
            constant = self._constants.pop(next(iter(self._constants)))
            model.graph.initializer.append(constant)
        return model

    def _constant(self, value: NDArray[Any]) -> str:
        """Add an initializer named after its value, once."""
        text = re.sub(r"[^0-9A-Za-z.+-]+", "_", str(value.tolist())).strip("_")
        return self.weight(f"{value.dtype}{list(value.shape)}_{text}", value)


class _Scope:
    """Names pushed on enter and taken off on exit."""

    def __init__(self, stack: list[str], names: tuple[str, ...]) -> None:
        self._stack = stack
        self._names = names

    def __enter__(self) -> None:
        self._stack.extend(self._names)

    def __exit__(self, *_: object) -> None:
        del self._stack[len(self._stack) - len(self._names) :]
