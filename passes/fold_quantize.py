"""Let the kernel that makes a value store it quantised, or in bf16.

quantize(linear_int8(x))   ->   linear_int8(x) stored as u8
quantize(attention(q))     ->   attention(q) stored as u8
quantize(layer_norm(x))    ->   the second result of layer_norm(x), a u8 copy of the first
quantize(layer_norm(x) * c)   ->   the same copy of layer_norm(x) times c, a factor per channel
quantize(reshape(x))       ->   reshape(quantize(x))
to_bf16(linear_bf16(x))    ->   linear_bf16(x) stored in bf16; attention_bf16, layer_norm likewise
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.ops_int8 import is_stored
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult
from sparsec.passes.rewrite import read_once, replace_node


@dataclass(frozen=True, slots=True)
class FoldQuantize:
    """After the pass that adds nodes of `op`, "quantize" or "to_bf16".

    Rounds as before; only plain products that are stored in u8 join their scales (rows_of).
    """

    op: str = "quantize"

    @property
    def name(self) -> str:
        return f"fold_{self.op}"

    def run(self, graph: Graph) -> PassResult:
        folded, notes = 0, []
        for node in [n for n in graph.nodes if n.op == self.op]:
            refusal = _fold(graph, _behind_reshapes(graph, node))
            folded += refusal is None
            notes += [] if refusal is None else [f"{node.name} is a step of its own: {refusal}"]
        graph.sort()
        graph.drop_dead_nodes()
        return PassResult(folded, tuple(notes))


def _behind_reshapes(graph: Graph, node: Node) -> Node:
    """The node moved before all reshapes that keep the channels together."""
    source = node.input(0).producer
    while source is not None and source.op == "reshape":
        x = source.input(0)
        if x.type.rank == 0 or x.type.shape[-1] != node.output.type.shape[-1]:
            break
        moved = graph.add_node(node.op, [x], node.attrs, name=node.name)
        replace_node(graph, node, "reshape", moved.outputs, source.attrs)
        if not source.output.uses and source.output not in graph.outputs:
            graph.erase(source)  # it would count as a reader of x
        node, source = moved, x.producer
    return node


def _fold(graph: Graph, node: Node) -> str | None:
    """Folds the node into its producer, or says why not."""
    source = node.input(0).producer
    if source is None:
        return f"%{node.input(0).name} is an input"
    if node.op == "quantize" and source.op == "mul":
        return _with_factor(graph, source, node)
    fold = _FOLDS[node.op].get(source.op)
    if fold is None:
        return f"{source.op} does not store {node.output.type.dtype}"
    if node.op == "quantize" and node.attrs["dtype"] is not DType.U8:
        return f"kernels store u8, not {node.attrs['dtype']}"
    return fold(graph, source, node)


def _into_only_result(graph: Graph, source: Node, node: Node) -> str | None:
    if is_stored(source.attrs):
        return f"{source.name} stores {source.output.type.dtype} already"
    if source.op == "linear_int8" and source.optional_input(5) is not None:
        return f"{source.name} reads a scale per token: its kernels store fp32"
    if node.op == "to_bf16" and source.op == "linear_bf16" and source.optional_input(3):
        return f"{source.name} adds a residual, which stays fp32"
    if not read_once(node.input(0), graph.outputs):
        return f"%{node.input(0).name} is read elsewhere"
    new = replace_node(graph, source, source.op, source.inputs, {**source.attrs, **_stored(node)})
    graph.replace_uses(node.output, new.output)
    graph.erase(node)
    return None


def _with_factor(graph: Graph, product: Node, node: Node) -> str | None:
    """A quantize of a layer_norm times a constant per channel."""
    y, factor = product.input(0), product.input(1)
    if y.producer is None or y.producer.op != "layer_norm" or y != y.producer.outputs[0]:
        return f"{product.name} does not store {node.output.type.dtype}"
    if factor.data is None or factor.type.shape != y.type.shape[-1:]:
        return f"{product.name} is not by one constant per channel"
    if not read_once(product.output, graph.outputs):
        return f"%{product.output.name} is read elsewhere"
    return _into_second_result(graph, y.producer, node, factor)


def _into_second_result(
    graph: Graph, source: Node, node: Node, factor: Value | None = None
) -> str | None:
    stored = _stored(node)
    if not is_stored(source.attrs):
        operands = [source.optional_input(i) for i in range(4)]
        inputs = source.inputs if factor is None else [*operands, factor]
        source = replace_node(graph, source, source.op, inputs, {**source.attrs, **stored})
    elif source.optional_input(4) != factor or any(
        source.attrs.get(name) != wanted for name, wanted in stored.items()
    ):
        return f"{source.name} stores {source.outputs[1].type} already"
    graph.replace_uses(node.output, source.outputs[1])
    graph.erase(node)
    return None


def _stored(node: Node) -> dict[str, float | int]:
    if node.op == "to_bf16":
        return {"out_bf16": True}
    return {"out_scale": node.attrs["scale"], "out_zero_point": node.attrs["zero_point"]}


_FOLDS: Mapping[str, Mapping[str, Callable[[Graph, Node, Node], str | None]]] = {
    "quantize": {
        "linear_int8": _into_only_result,
        "attention": _into_only_result,
        "layer_norm": _into_second_result,
    },
    "to_bf16": {
        "linear_bf16": _into_only_result,
        "attention_bf16": _into_only_result,
        "layer_norm": _into_second_result,
    },
}
