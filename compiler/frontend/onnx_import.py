"""ONNX model -> Graph.

Every ONNX value becomes a Value of the Graph or, for shape arithmetic, known dims. The rows of
DOMAINS do the work; an op without a row is replaced by its function body: the model's own, or
the one that the ONNX standard gives for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
)

from sparsec.errors import CompilerError, InvalidGraph, InvalidModel, UnsupportedOp
from sparsec.frontend.builder import Builder, Operand
from sparsec.frontend.call import Call
from sparsec.frontend.inputs import Overrides, add_inputs
from sparsec.frontend.onnx_load import (
    STANDARD,
    load,
    ordered_nodes,
    reads_of,
    standard_opset,
    title,
)
from sparsec.frontend.onnx_ops import DOMAINS
from sparsec.frontend.tensors import NIBBLES, ONNX_TYPES, array_of, attribute, nibbles_of
from sparsec.ir.dims import Expr
from sparsec.ir.graph import Graph
from sparsec.ir.types import DType, TensorType

Names = dict[str, Operand | None]
Opsets = dict[str, int]
FunctionId = tuple[str, str, str]  # domain, name, overload

_OF_NIBBLES = {"DequantizeLinear", "GatherBlockQuantized"}

# What reading a node that is not as the standard says can raise, here or inside of onnx.
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def import_model(
    model: str | Path | ModelProto, overrides: Overrides | None = None, name: str | None = None
) -> Graph:
    """The Graph of an ONNX model.

    `overrides` gives the shapes of inputs by name: an int fixes a dim, a str names it. Raises
    InvalidModel for a damaged file, UnsupportedOp for what has no lowering, InvalidGraph for
    contradicting shapes.
    """
    proto, folder = load(model)
    graph = Graph(name or _identifier(proto.graph.name or "model"))
    _Importer(proto, folder, graph).run(overrides or {})
    graph.drop_dead_nodes()
    _settle_limits(graph)
    return graph


def _settle_limits(graph: Graph) -> None:
    """Limits of sizes that turned out to be numbers are checked now."""
    for limit in graph.limits:
        if isinstance(limit.dim, int) and limit.dim > limit.most:
            raise InvalidGraph(f"{limit.dim} is more than {limit.most}: {limit.reason}")
    graph.replace_limits([x for x in graph.limits if not isinstance(x.dim, int)])


def _identifier(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_") or "model"


class _Importer:
    def __init__(self, model: ModelProto, folder: Path | None, graph: Graph):
        self.model = model
        self.folder = folder
        self.graph = graph
        self.builder = Builder(graph)
        self.functions: dict[FunctionId, FunctionProto] = {
            (f.domain, f.name, f.overload): f for f in model.functions
        }
        self.calling: list[str] = []  # names of the functions being expanded

    def run(self, overrides: Overrides) -> None:
        proto = self.model.graph
        nodes = ordered_nodes(proto)
        used = {name for node in nodes for name in reads_of(node)}
        names = self._initialisers(proto, used | {o.name for o in proto.output})
        for value in add_inputs(self.graph, proto, overrides):
            half = value.type.dtype is DType.F16
            names[value.name] = self.builder.cast(value, DType.F32) if half else value
        opsets = {i.domain: i.version for i in self.model.opset_import}
        self._nodes(nodes, names, opsets, "", {})
        self.builder.name = ""
        for output in proto.output:
            operand = names.get(output.name)
            if operand is None:
                raise InvalidModel(f"nothing produces the output {output.name!r}")
            if output.type.tensor_type.elem_type == TensorProto.FLOAT16:
                operand = self.builder.cast(operand, DType.F16)
            self.graph.add_output(output.name, self.builder.value(operand))

    def _initialisers(self, proto: GraphProto, used: set[str]) -> Names:
        """Constants of the tensors that are read; sparse ones have no lowering."""
        names: Names = {}
        for sparse in proto.sparse_initializer:
            if sparse.values.name in used:
                raise UnsupportedOp(
                    f"initialiser {sparse.values.name!r} is a sparse tensor; store it densely, "
                    "zeros and all: sparsec finds the blocks by itself"
                )
        for tensor in proto.initializer:
            if tensor.name in used:
                data = self._data(tensor, proto)
                names[tensor.name] = self.graph.add_constant(data, tensor.name)
        return names

    def _data(self, tensor: TensorProto, proto: GraphProto) -> np.ndarray[Any, Any]:
        """The numbers of an initialiser; of 4 bits only for ops that want nothing but numbers.

        Others would take the wider type for that of the file.
        """
        place = f"initialiser {tensor.name!r}"
        if tensor.data_type not in NIBBLES:
            return array_of(tensor, self.folder, place)
        readers = {n.op_type for n in proto.node if tensor.name in reads_of(n)}
        is_output = any(o.name == tensor.name for o in proto.output)
        read = array_of if is_output or readers - _OF_NIBBLES else nibbles_of
        return read(tensor, self.folder, place)

    def _nodes(
        self,
        nodes: list[NodeProto],
        names: Names,
        opsets: Opsets,
        prefix: str,
        refs: Mapping[str, AttributeProto],
    ) -> None:
        for node in nodes:
            place = f"{prefix}{title(node)}"
            opset = standard_opset(opsets) if _is_standard(node) else opsets.get(node.domain)
            where = f"node {place!r} ({_op_name(node)}, opset {opset or 'not imported'})"
            try:
                results = self._node(node, names, opsets, place, refs)
            except CompilerError as error:
                raise type(error)(f"{where}: {error}") from error
            except _MALFORMED as error:
                reason = f"{type(error).__name__}: {error}"
                raise InvalidModel(f"{where} is malformed: {reason}") from error
            if len(results) < sum(1 for o in node.output if o):
                count = len(results)
                raise UnsupportedOp(f"{where}: only its first {count} results are supported")
            names.update(zip(node.output, results, strict=False))

    def _node(
        self,
        node: NodeProto,
        names: Names,
        opsets: Opsets,
        place: str,
        refs: Mapping[str, AttributeProto],
    ) -> list[Operand | None]:
        inputs = tuple(names[n] if n else None for n in node.input)
        bound = [_bound(a, refs) for a in node.attribute]
        attributes = [a for a in bound if a is not None]
        function = self.functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            return self._function(function, inputs, attributes, place)

        def subgraph(graph: GraphProto) -> list[Operand]:
            return self._subgraph(graph, names, opsets, place, refs)

        opset = standard_opset(opsets)
        converter = DOMAINS.get(node.domain, {}).get(node.op_type)
        if converter is None:
            known = _is_standard(node)
            body = _standard_body(node, opset, inputs, attributes) if known else None
            if body is None:
                raise _no_converter(node, opset)
            return self._function(body, inputs, [*_defaults(node, opset), *attributes], place)
        self.builder.name = place
        attrs = {a.name: self._attribute(a) for a in attributes}
        outputs = tuple(node.output)
        call = Call(node.op_type, opset, inputs, outputs, attrs, self.builder, subgraph)
        result = converter(call)
        return result if isinstance(result, list) else [result]

    def _attribute(self, item: AttributeProto) -> Any:
        if item.type == AttributeProto.TENSOR:
            return array_of(item.t, self.folder, f"attribute {item.name!r}")
        return attribute(item)

    def _subgraph(
        self,
        graph: GraphProto,
        outer: Names,
        opsets: Opsets,
        place: str,
        refs: Mapping[str, AttributeProto],
    ) -> list[Operand]:
        nodes = ordered_nodes(graph, outer)
        used = {name for node in nodes for name in reads_of(node)}
        own = self._initialisers(graph, used | {o.name for o in graph.output})
        names = {**outer, **own}
        self._nodes(nodes, names, opsets, f"{place}/", refs)
        return [_produced(names, o.name) for o in graph.output]

    def _function(
        self,
        function: FunctionProto,
        inputs: tuple[Operand | None, ...],
        attributes: list[AttributeProto],
        place: str,
    ) -> list[Operand | None]:
        if function.name in self.calling:
            raise InvalidModel(f"the function {function.name!r} calls itself")
        names: Names = dict.fromkeys(function.input)
        names.update(zip(function.input, inputs, strict=False))
        refs = {a.name: a for a in [*function.attribute_proto, *attributes]}
        opsets = {i.domain: i.version for i in function.opset_import}
        body = GraphProto(node=function.node)
        made = {o for n in function.node for o in n.output} | set(names)
        body.output.extend(onnx.ValueInfoProto(name=o) for o in function.output if o in made)
        self.calling.append(function.name)
        self._nodes(ordered_nodes(body, names), names, opsets, f"{place}/", refs)
        self.calling.pop()
        return [names.get(o) for o in function.output]


def _produced(names: Names, name: str) -> Operand:
    operand = names.get(name)
    if operand is None:
        raise InvalidModel(f"nothing produces {name!r}")
    return operand


def _bound(item: AttributeProto, refs: Mapping[str, AttributeProto]) -> AttributeProto | None:
    """The attribute with a reference to the function's own attribute resolved."""
    if not item.ref_attr_name:
        return item
    source = refs.get(item.ref_attr_name)
    if source is None:
        return None
    result = AttributeProto()
    result.CopyFrom(source)
    result.name = item.name
    return result


def _standard_body(
    node: NodeProto,
    opset: int,
    inputs: tuple[Operand | None, ...],
    attributes: list[AttributeProto],
) -> FunctionProto | None:
    """The meaning that the ONNX standard gives to an op in terms of others, or None."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    if schema.deprecated:
        return None
    raw = b""
    if schema.has_context_dependent_function:
        plain = NodeProto()
        plain.CopyFrom(node)
        del plain.attribute[:]
        plain.attribute.extend(attributes)
        types = [_type_proto(x).SerializeToString() for x in inputs if x is not None]
        raw = schema.get_context_dependent_function_with_opset_version(
            _newest(schema.context_dependent_function_opset_versions, opset),
            plain.SerializeToString(),
            types,
        )
    elif schema.has_function:
        raw = schema.get_function_with_opset_version(
            _newest(schema.function_opset_versions, opset)
        )
    body = FunctionProto()
    body.ParseFromString(raw)
    return body if raw and body.node else None


def _defaults(node: NodeProto, opset: int) -> list[AttributeProto]:
    """The attributes of a standard op that have a default."""
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    values = [a.default_value for a in schema.attributes.values()]
    return [v for v in values if v.type != AttributeProto.UNDEFINED]


def _newest(versions: list[int], opset: int) -> int:
    return max((v for v in versions if v <= opset), default=min(versions))


def _type_proto(operand: Operand) -> TypeProto:
    type: TensorType = operand.type
    shape = [str(d) if isinstance(d, Expr) else d for d in type.shape]
    return onnx.helper.make_tensor_type_proto(ONNX_TYPES[type.dtype], shape)


def _is_standard(node: NodeProto) -> bool:
    return node.domain in STANDARD


def _op_name(node: NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _no_converter(node: NodeProto, opset: int) -> UnsupportedOp:
    if node.domain == "com.microsoft.nchwc":
        return UnsupportedOp(
            f"{_op_name(node)} has the layout of one kind of CPU; let ONNX Runtime save the "
            "model with ORT_ENABLE_EXTENDED, not ORT_ENABLE_ALL"
        )
    if not _is_standard(node):
        return UnsupportedOp(
            f"{_op_name(node)} is not an ONNX standard op; export the model without "
            "runtime-specific fusions or custom ops"
        )
    if not onnx.defs.has(node.op_type):
        return UnsupportedOp(f"ONNX has no op {node.op_type}; check the exporter")
    return UnsupportedOp(
        f"ONNX op {node.op_type} (opset {opset}) has no lowering; rewrite this part of the model "
        "with other ops or cut the model before it"
    )
