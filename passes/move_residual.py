"""Let the int8 product, not the normalisation behind it, add the residual.

layer_norm(linear_int8(x), residual=r)   ->   layer_norm(linear_int8(x, residual=r))

The same roundings. The normalisation reads its operand twice, mostly from L2, which binds it;
the product, which multiplication binds, reads the residual once and as it goes along.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.ops_int8 import is_stored
from sparsec.passes.base import PassResult
from sparsec.passes.rewrite import read_once, replace_node

RESIDUAL = {"linear_int8": 4, "layer_norm": 3}  # which operand it is


@dataclass(frozen=True, slots=True)
class MoveResidual:
    """After fold_quantize: a product that is stored in u8 has no residual to add."""

    name: str = "move_residual"

    def run(self, graph: Graph) -> PassResult:
        norms = [n for n in graph.nodes if n.op == "layer_norm"]
        moved = sum(_move(graph, norm) for norm in norms)
        graph.sort()
        return PassResult(moved)


def _move(graph: Graph, norm: Node) -> bool:
    residual, y = norm.optional_input(RESIDUAL["layer_norm"]), norm.input(0)
    product = y.producer
    if residual is None or product is None or product.op != "linear_int8":
        return False
    if product.optional_input(RESIDUAL["linear_int8"]) is not None or is_stored(product.attrs):
        return False
    # The residual can not depend on a product that nothing else reads: no cycle arises.
    if not read_once(y, graph.outputs):
        return False
    operands = _with(product, residual)
    new = replace_node(graph, product, product.op, operands, product.attrs)
    assert norm.input(0) is new.output, norm
    replace_node(graph, norm, norm.op, _with(norm, None), norm.attrs)
    return True


def _with(node: Node, residual: Value | None) -> list[Value | None]:
    """The operands of the node with this residual."""
    place = RESIDUAL[node.op]
    operands = [*node.inputs, *[None] * (place + 1 - len(node.inputs))]
    operands[place] = residual
    while operands[-1] is None:
        operands.pop()
    return operands
