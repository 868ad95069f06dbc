"""Bring a graph into normal form: constants computed, identities and repetitions removed.

add(x, 0)                       ->  x
reshape(reshape(x, a), b)       ->  reshape(x, b)
exp(constant)                   ->  constant
y = sub(a, b); z = sub(a, b)    ->  y alone
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsec.ir.dims import Expr
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.op_spec import Array
from sparsec.ir.ops import OPS
from sparsec.ir.ops_int8 import moved_quant
from sparsec.passes.base import PassResult
from sparsec.passes.identities import IDENTITIES
from sparsec.passes.identities_index import INDEX_IDENTITIES
from sparsec.passes.identities_shape import SHAPE_IDENTITIES
from sparsec.passes.identities_slice import SLICE_IDENTITIES
from sparsec.passes.rewrite import apply_rules

# A folded constant may be this much larger than the constants it is made from: a table that
# is broadcast stays a broadcast, small index arithmetic becomes data.
GROWTH_BYTES = 1 << 16

RULES = (*IDENTITIES, *SHAPE_IDENTITIES, *INDEX_IDENTITIES, *SLICE_IDENTITIES)


@dataclass(frozen=True, slots=True)
class Canonicalize:
    """Repeats until nothing changes: what one step leaves the next can simplify."""

    name: str = "canonicalize"

    def run(self, graph: Graph) -> PassResult:
        total = PassResult(graph.drop_dead_nodes())
        while True:
            step = PassResult(fold_constants(graph) + share_repeated(graph))
            step += PassResult(apply_rules(graph, RULES).changed)
            total += step
            if not step.changed:
                return total


def fold_constants(graph: Graph) -> int:
    """Computes the nodes that depend on constants alone; returns how many."""
    folded = 0
    for node in list(graph.nodes):
        data = _evaluate(node)
        if data is None:
            continue
        for value, array in zip(node.outputs, data, strict=True):
            constant = graph.add_constant(array, graph.base_name(value.name))
            quant = moved_quant(node.op, node.input(0).type, node.attrs) if node.inputs else None
            graph.set_type(constant, replace(constant.type, quant=quant))
            graph.replace_uses(value, constant)
        folded += 1
    graph.drop_dead_nodes()
    return folded


def share_repeated(graph: Graph) -> int:
    """Merges nodes that compute the same, and constants that hold the same; returns how many."""
    shared = _share_constants(graph)
    first: dict[Hashable, Node] = {}
    for node in graph.nodes:
        # By repr: it tells 0.0 from -0.0 and True from 1, and attributes may be lists.
        key = (node.op, node.inputs, repr(sorted(node.attrs.items(), key=lambda item: item[0])))
        same = first.setdefault(key, node)
        if same is node:
            continue
        for old, new in zip(node.outputs, same.outputs, strict=True):
            graph.replace_uses(old, new)
        shared += 1
    graph.drop_dead_nodes()
    return shared


def _evaluate(node: Node) -> list[Array] | None:
    """The results of a node, or None when they depend on an input or are too large."""
    if not all(v is None or v.is_constant for v in node.inputs):
        return None
    if _has_symbol(node.attrs.values()) or any(_has_symbol(v.type.shape) for v in node.outputs):
        return None
    known = sum(v.data.nbytes for v in node.inputs if v is not None and v.data is not None)
    wanted = sum(_nbytes(v) for v in node.outputs)
    if wanted > known + GROWTH_BYTES:
        return None
    arrays = [None if v is None else v.data for v in node.inputs]
    try:
        return OPS[node.op].evaluate(arrays, node.attrs, {})
    except IndexError:  # an index out of range: an error when the model runs, if it gets there
        return None


def _nbytes(value: Value) -> int:
    size = value.type.elements
    assert isinstance(size, int), value
    return size * value.type.dtype.bytes


def _has_symbol(items: Any) -> bool:
    return any(
        isinstance(i, Expr) or (isinstance(i, tuple | list) and _has_symbol(i)) for i in items
    )


def _share_constants(graph: Graph) -> int:
    """Constants are compared in full only when a sample of them is equal."""
    groups: dict[Hashable, list[Value]] = {}
    shared = 0
    for value in graph.constants():
        data = value.data
        assert data is not None
        flat = data.reshape(-1)
        sample = flat[:: max(1, flat.size // 64)].tobytes()
        group = groups.setdefault((value.type, sample), [])
        same = next((v for v in group if v.data is data or _same_bits(v.data, data)), None)
        if same is None:
            group.append(value)
            continue
        graph.replace_uses(value, same)
        shared += 1
    return shared


def _same_bits(a: Array | None, b: Array) -> bool:
    """Equal to the bit: 0.0 and -0.0 differ, a NaN equals itself."""
    return a is not None and bool(np.array_equal(_bits(a), _bits(b)))


def _bits(data: Array) -> Array:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
