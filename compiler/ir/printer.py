"""A stable text of a Graph, for golden tests, `--dump-ir` and messages.

graph bert
input %input_ids : i64[batch, seq]
const %weight : f32[64, 64] sha 9f86d081
%scores = matmul(%q, %k) : f32[batch, 4, seq, seq]
return last_hidden_state = %out
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from sparsec.ir.graph import Graph, Node, Value

_HASH_DIGITS = 8
_INLINE_ELEMENTS = 1  # constants up to this size are shown by value


def print_graph(graph: Graph) -> str:
    """The text of `graph`; equal graphs give equal texts."""
    lines = [f"graph {graph.name}"]
    lines += [f"input %{v.name} : {v.type}" for v in graph.inputs]
    lines += [f"limit {x.dim} <= {x.most}" for x in graph.limits]
    lines += [_constant_line(v) for v in graph.constants()]
    lines += [node_line(n) for n in graph.nodes]
    pairs = zip(graph.output_names, graph.outputs, strict=True)
    lines += [f"return {name} = %{value.name}" for name, value in pairs]
    return "\n".join(lines) + "\n"


def node_line(node: Node) -> str:
    """`%y = op(%a, %b) {attr=...} : type [schedule]`"""
    results = ", ".join(f"%{v.name}" for v in node.outputs)
    operands = ", ".join(_name(v) for v in node.inputs)
    types = ", ".join(str(v.type) for v in node.outputs)
    schedule = f" [{'; '.join(map(str, node.schedules))}]" if node.schedules else ""
    return f"{results} = {node.op}({operands}){_attrs(node.attrs)} : {types}{schedule}"


def _name(value: Value | None) -> str:
    return "_" if value is None else f"%{value.name}"


def _attrs(attrs: Mapping[str, Any]) -> str:
    if not attrs:
        return ""
    return " {" + ", ".join(f"{k}={_text(attrs[k])}" for k in sorted(attrs)) + "}"


def _text(item: Any) -> str:
    match item:
        case tuple() | list():
            return "[" + ", ".join(_text(i) for i in item) + "]"
        case str():
            return f'"{item}"'
    return str(item)


def _constant_line(value: Value) -> str:
    data = value.data
    assert data is not None
    head = f"const %{value.name} : {value.type}"
    if data.size <= _INLINE_ELEMENTS:
        return f"{head} = {data.reshape(-1).tolist()}"
    digest = hashlib.sha256(data.tobytes()).hexdigest()
    return f"{head} sha {digest[:_HASH_DIGITS]}"
