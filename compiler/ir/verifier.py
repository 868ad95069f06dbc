"""Checks that a Graph is well formed: the pass manager calls it after every pass."""

from __future__ import annotations

from sparsec.errors import InvalidGraph
from sparsec.ir.graph import Graph, Node, Value, infer_node
from sparsec.ir.layouts import Bsr, Panels
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType


def verify(graph: Graph) -> None:
    """Raise InvalidGraph at the first fault, naming the node or value and the rule it breaks."""
    _verify_names(graph)
    _verify_order(graph)
    for node in graph.nodes:
        _verify_op(graph, node)
        _verify_types(graph, node)
    _verify_uses(graph)
    _verify_outputs(graph)


def _values(graph: Graph) -> list[Value]:
    made = [v for n in graph.nodes for v in n.outputs]
    return [*graph.inputs, *graph.constants(), *made]


def _verify_names(graph: Graph) -> None:
    seen: dict[str, Value] = {}
    for value in _values(graph):
        if seen.setdefault(value.name, value) is not value:
            raise InvalidGraph(f"{graph.name}: two values have the name %{value.name}")
    names = [n.name for n in graph.nodes]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InvalidGraph(f"{graph.name}: two nodes have the name {twice}")


def _verify_order(graph: Graph) -> None:
    defined: set[Value] = set(graph.inputs)
    for node in graph.nodes:
        for value in node.inputs:
            if value is not None and not value.is_constant and value not in defined:
                raise InvalidGraph(
                    f"{graph.name}: {node.name} ({node.op}) reads %{value.name} before a node "
                    "of this graph produces it; call Graph.sort or keep its producer"
                )
        for value in node.outputs:
            if value.producer is not node:
                raise InvalidGraph(f"{graph.name}: %{value.name} does not know {node.name}")
        defined.update(node.outputs)
    for value in graph.outputs:
        if not value.is_constant and value not in defined:
            raise InvalidGraph(f"{graph.name}: no node produces the output %{value.name}")


def _verify_op(graph: Graph, node: Node) -> None:
    spec = OPS.get(node.op)
    if spec is None:
        raise InvalidGraph(f"{graph.name}: {node.name}: there is no op {node.op!r} in OPS")
    unknown = sorted(set(node.attrs) - {*spec.attrs, *spec.optional_attrs})
    missing = sorted(set(spec.attrs) - set(node.attrs))
    if unknown or missing:
        raise InvalidGraph(
            f"{graph.name}: {node.name} ({node.op}): the attributes are {sorted(spec.attrs)}; "
            f"missing {missing}, unknown {unknown}"
        )


def _verify_types(graph: Graph, node: Node) -> None:
    inferred = list(infer_node(node))
    if len(inferred) != len(node.outputs):
        raise InvalidGraph(f"{graph.name}: {node.name} ({node.op}) makes {len(inferred)} values")
    for value, type in zip(node.outputs, inferred, strict=True):
        # The layout of a result is a pass's choice; shape, dtype and what its node says of its
        # quantisation are not.
        found = value.type
        is_other = (found.dtype, found.shape) != (type.dtype, type.shape)
        if is_other or type.quant not in (None, found.quant):
            raise InvalidGraph(
                f"{graph.name}: {node.name} ({node.op}): %{value.name} has the type "
                f"{value.type}, but its operands make it {type}"
            )


def _verify_uses(graph: Graph) -> None:
    expected: dict[Value, list[tuple[Node, int]]] = {v: [] for v in _values(graph)}
    for node in graph.nodes:
        for index, value in enumerate(node.inputs):
            if value is not None:
                expected[value].append((node, index))
    for value, uses in expected.items():
        if sorted(map(_key, value.uses)) != sorted(map(_key, uses)):
            raise InvalidGraph(
                f"{graph.name}: the uses of %{value.name} are wrong: "
                f"recorded {[n.name for n, _ in value.uses]}, real {[n.name for n, _ in uses]}"
            )
        if value.data is not None:
            _verify_constant(graph, value)


def _key(use: tuple[Node, int]) -> tuple[int, int]:
    return id(use[0]), use[1]


def _verify_constant(graph: Graph, value: Value) -> None:
    assert value.data is not None
    if (DType.of(value.data.dtype), value.data.shape) != (value.type.dtype, value.type.shape):
        raise InvalidGraph(
            f"{graph.name}: the constant %{value.name} has the type {value.type}, "
            f"but its data is {value.data.dtype}{list(value.data.shape)}"
        )
    if isinstance(value.type.layout, Panels):
        raise InvalidGraph(f"{graph.name}: the constant %{value.name} is in panels: {value.type}")
    if isinstance(value.type.layout, Bsr) and value.type.rank != 2:
        raise InvalidGraph(f"{graph.name}: %{value.name} is no matrix of blocks: {value.type}")
    quant = value.type.quant
    if quant is None:
        return
    count = 1 if quant.axis is None else value.data.shape[quant.axis]
    if not len(quant.scale) == len(quant.zero_point) == count:
        raise InvalidGraph(
            f"{graph.name}: the constant %{value.name} needs {count} scales and zero points, "
            f"it has {len(quant.scale)} and {len(quant.zero_point)}"
        )


def _verify_outputs(graph: Graph) -> None:
    if not graph.outputs:
        raise InvalidGraph(f"{graph.name}: the graph has no output")
    if len(graph.outputs) != len(graph.output_names):
        raise InvalidGraph(f"{graph.name}: {len(graph.outputs)} outputs have other names")
    if len(set(graph.output_names)) != len(graph.output_names):
        raise InvalidGraph(f"{graph.name}: output names repeat: {graph.output_names}")
