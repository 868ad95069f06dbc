"""Reads an ONNX file and checks its structure: the errors a damaged model gives come from here."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from sparsec.errors import InvalidModel, UnsupportedOp

OLDEST_OPSET = 11
STANDARD = ("", "ai.onnx")  # names of the domain of the standard's operators
PROTOBUF_LIMIT = 2**31


def load(model: str | Path | ModelProto) -> tuple[ModelProto, Path | None]:
    """The model and the folder of its external data (None for a model without a file)."""
    if isinstance(model, ModelProto):
        _check_model(model, "the model")
        return model, None
    path = Path(model)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) >= PROTOBUF_LIMIT:
        raise InvalidModel(
            f"{path} has {len(raw)} bytes, but a protobuf holds less than 2 GiB; "
            "export the model with its weights as external data"
        )
    result = ModelProto()
    try:
        result.ParseFromString(raw)
    except DecodeError as error:
        raise InvalidModel(
            f"{path} is not an ONNX model, or it is truncated ({len(raw)} bytes): "
            "the protobuf does not parse; export or copy it again"
        ) from error
    _check_model(result, str(path))
    return result, path.parent


def _check_model(model: ModelProto, place: str) -> None:
    if not model.HasField("graph") or not model.opset_import:
        raise InvalidModel(
            f"{place} is not an ONNX model, or it is truncated: it has no graph or no opset; "
            "export or copy it again"
        )
    if not all(isinstance(name, str) for name in _names(model.graph)):
        raise InvalidModel(
            f"{place} is damaged: a name in it is not text; export or copy it again"
        )
    if not model.graph.output:
        raise InvalidModel(f"{place} has no outputs; export it with at least one")
    opset = standard_opset({i.domain: i.version for i in model.opset_import})
    newest = onnx.defs.onnx_opset_version()
    if opset and not OLDEST_OPSET <= opset <= newest:
        raise UnsupportedOp(
            f"{place} uses opset {opset}; opsets {OLDEST_OPSET} to {newest} are supported: "
            "export it again or convert it with onnx.version_converter"
        )


def _names(graph: GraphProto) -> Iterable[object]:
    """All names; protobuf gives one that is not UTF-8 as bytes."""
    yield graph.name
    for item in (*graph.input, *graph.output, *graph.initializer):
        yield item.name
    for node in graph.node:
        yield node.name
        yield from node.input
        yield from node.output


def standard_opset(versions: Mapping[str, int]) -> int:
    """The version of the standard's operators among those of domains; 0 without one."""
    return max(versions.get(domain, 0) for domain in STANDARD)


def title(node: NodeProto) -> str:
    """The node's name; its first output where it has none."""
    return node.name or next((o for o in node.output if o), "") or node.op_type


def ordered_nodes(graph: GraphProto, outer: Iterable[str] = ()) -> list[NodeProto]:
    """The nodes that outputs depend on, in execution order.

    `outer` are the names that an enclosing graph provides. Raises InvalidModel for duplicate
    names, reads of a name that nothing produces, and cycles.
    """
    available = {*outer, *(i.name for i in graph.input)}
    available.update(t.name for t in graph.initializer)
    available.update(t.values.name for t in graph.sparse_initializer)
    producer = _producers(graph)
    reads = [reads_of(node) for node in graph.node]
    for node, names in zip(graph.node, reads, strict=True):
        for name in names:
            if name not in available and name not in producer:
                raise InvalidModel(
                    f"node {title(node)!r} ({node.op_type}) reads {name!r}, "
                    "which no node, input or initialiser produces; the model is incomplete"
                )
    for output in graph.output:
        if output.name not in available and output.name not in producer:
            raise InvalidModel(f"nothing produces the output {output.name!r}")
    needs = [sorted({producer[n] for n in names if n in producer}) for names in reads]
    order = _sorted(graph, needs)
    live = _live([producer[o.name] for o in graph.output if o.name in producer], needs)
    return [graph.node[i] for i in order if i in live]


def reads_of(node: NodeProto) -> list[str]:
    """All names a node reads, those its subgraphs take from outside included."""
    names = [n for n in node.input if n]
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            names += captures(attribute.g)
        for graph in attribute.graphs:
            names += captures(graph)
    return list(dict.fromkeys(names))


def captures(graph: GraphProto) -> list[str]:
    """The names that a subgraph takes from the graphs around it."""
    own = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    own |= {o for n in graph.node for o in n.output}
    used = [r for n in graph.node for r in reads_of(n)] + [o.name for o in graph.output]
    return [name for name in dict.fromkeys(used) if name not in own]


def _producers(graph: GraphProto) -> dict[str, int]:
    taken = {i.name: "an input" for i in graph.input}
    count: dict[str, int] = {}
    for tensor in graph.initializer:
        count[tensor.name] = count.get(tensor.name, 0) + 1
    twice = [name for name, n in count.items() if n > 1]
    if twice:
        raise InvalidModel(f"two initialisers have the name {twice[0]!r}")
    taken.update({name: "an initialiser" for name in count})
    producer: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in producer or name in taken:
                first = taken.get(name) or f"node {title(graph.node[producer[name]])!r}"
                raise InvalidModel(
                    f"node {title(node)!r} ({node.op_type}) produces {name!r}, "
                    f"which {first} produces already; names must be unique"
                )
            producer[name] = index
    _check_unique([i.name for i in graph.input], "inputs")
    _check_unique([o.name for o in graph.output], "outputs")
    return producer


def _check_unique(names: list[str], what: str) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InvalidModel(f"two {what} have the name {twice[0]!r}")


def _sorted(graph: GraphProto, needs: list[list[int]]) -> list[int]:
    """Indices of nodes, producers first, otherwise in file order."""
    users: list[list[int]] = [[] for _ in needs]
    for index, producers in enumerate(needs):
        for producer in producers:
            users[producer].append(index)
    missing = [len(producers) for producers in needs]
    ready = [i for i, count in enumerate(missing) if count == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for user in users[index]:
            missing[user] -= 1
            if missing[user] == 0:
                heapq.heappush(ready, user)
    if len(order) < len(needs):
        node = graph.node[_on_cycle(missing, needs)]
        raise InvalidModel(
            f"node {title(node)!r} ({node.op_type}) is part of a cycle: "
            "it depends on its own result"
        )
    return order


def _on_cycle(missing: list[int], needs: list[list[int]]) -> int:
    """A node on a cycle: walk from a stuck node to stuck producers until one comes again."""
    stuck = {i for i, count in enumerate(missing) if count}
    seen: set[int] = set()
    node = min(stuck)
    while node not in seen:
        seen.add(node)
        node = next(p for p in needs[node] if p in stuck)
    return node


def _live(roots: list[int], needs: list[list[int]]) -> set[int]:
    live: set[int] = set()
    stack = list(roots)
    while stack:
        index = stack.pop()
        if index not in live:
            live.add(index)
            stack += needs[index]
    return live
