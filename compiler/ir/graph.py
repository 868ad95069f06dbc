"""The SSA graph. Every edit goes through a method of `Graph`, which keeps uses right."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.dims import Dim, symbols
from sparsec.ir.op_spec import Attrs
from sparsec.ir.ops import OPS
from sparsec.ir.schedule import Choice
from sparsec.ir.types import DType, TensorType


class Value:
    """One tensor: a graph input, a constant (`data` is set) or an output of a node."""

    __slots__ = ("data", "name", "producer", "type", "uses")

    def __init__(self, name: str, type: TensorType, data: np.ndarray[Any, Any] | None = None):
        self.name = name
        self.type = type
        self.data = data
        self.producer: Node | None = None
        self.uses: list[tuple[Node, int]] = []

    @property
    def is_constant(self) -> bool:
        return self.data is not None

    @property
    def users(self) -> list[Node]:
        """The nodes that read this value, each once, in order of use."""
        return list(dict.fromkeys(node for node, _ in self.uses))

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


class Node:
    """One application of an op. An optional operand that is absent is None."""

    __slots__ = ("attrs", "inputs", "name", "op", "outputs", "schedules")

    def __init__(self, name: str, op: str, inputs: tuple[Value | None, ...], attrs: Attrs):
        self.name = name
        self.op = op
        self.inputs = inputs
        self.outputs: tuple[Value, ...] = ()
        self.attrs: Attrs = MappingProxyType(dict(attrs))
        self.schedules: tuple[Choice, ...] = ()  # their buckets: every token count once

    @property
    def output(self) -> Value:
        """The only output."""
        (value,) = self.outputs
        return value

    @property
    def tokens(self) -> Dim:
        """Of its result: all but the last axis."""
        return self.outputs[0].type.tokens

    def input(self, index: int) -> Value:
        """The operand at `index`, which must be present."""
        value = self.inputs[index]
        assert value is not None, f"{self.name}: operand {index} is absent"
        return value

    def optional_input(self, index: int) -> Value | None:
        """The operand at `index`, or None when it is absent or past the end."""
        return self.inputs[index] if index < len(self.inputs) else None

    def __repr__(self) -> str:
        return f"{self.name} = {self.op}({', '.join(v.name if v else '_' for v in self.inputs)})"


@dataclass(frozen=True, slots=True)
class Limit:
    """`dim` may not exceed `most` when the model runs; `reason` is for the message."""

    dim: Dim
    most: int
    reason: str

    def __str__(self) -> str:
        return f"{self.dim} <= {self.most}: {self.reason}"


class Graph:
    """A function from named inputs to named outputs; `nodes` is in execution order."""

    def __init__(self, name: str):
        self.name = name
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.output_names: list[str] = []
        self.nodes: list[Node] = []
        self.limits: list[Limit] = []
        self._names: set[str] = set()
        self._next: dict[str, int] = {}

    # building

    def unique_name(self, wanted: str) -> str:
        """`wanted`, or `wanted.N` with the least free N; the name is then taken."""
        name = wanted
        while name in self._names:
            count = self._next.get(wanted, 0) + 1
            self._next[wanted] = count
            name = f"{wanted}.{count}"
        self._names.add(name)
        return name

    def base_name(self, name: str) -> str:
        """`name` without the `.N` that `unique_name` gave it."""
        base, dot, count = name.rpartition(".")
        return base if dot and count.isdigit() and base in self._names else name

    def add_input(self, name: str, dtype: DType, shape: Sequence[Dim]) -> Value:
        value = Value(self.unique_name(name), TensorType(dtype, tuple(shape)))
        self.inputs.append(value)
        return value

    def add_constant(self, data: np.ndarray[Any, Any], name: str = "const") -> Value:
        """A constant; its dtype must be one that DType has."""
        data = np.ascontiguousarray(data).reshape(np.shape(data))
        return Value(self.unique_name(name), TensorType(DType.of(data.dtype), data.shape), data)

    def add_output(self, name: str, value: Value) -> None:
        self.outputs.append(value)
        self.output_names.append(name)

    def add_node(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
    ) -> Node:
        """Append a node; its output types are inferred.

        Raises InvalidGraph, naming the node, when operands do not fit the op.
        """
        node = Node(self.unique_name(name or op), op, tuple(inputs), attrs or {})
        for count, type in enumerate(infer_node(node)):
            value = Value(node.name if count == 0 else self.unique_name(node.name), type)
            value.producer = node
            node.outputs += (value,)
        self._link(node)
        self.nodes.append(node)
        return node

    def add(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
    ) -> Value:
        """`add_node` for an op with one output: returns that output."""
        return self.add_node(op, inputs, attrs, name=name).output

    def copy(self) -> Graph:
        """The same graph, to be changed by itself. Constants share their arrays."""
        twin = Graph(self.name)
        twin.output_names, twin.limits = list(self.output_names), list(self.limits)
        twin._names, twin._next = set(self._names), dict(self._next)
        values: dict[Value, Value] = {}

        def of(value: Value) -> Value:
            return values.setdefault(value, Value(value.name, value.type, value.data))

        nodes: dict[Node, Node] = {}
        for node in self.nodes:
            operands = tuple(None if v is None else of(v) for v in node.inputs)
            copy = nodes[node] = Node(node.name, node.op, operands, node.attrs)
            copy.outputs = tuple(of(v) for v in node.outputs)
            copy.schedules = node.schedules
            for value in copy.outputs:
                value.producer = copy
        twin.nodes = list(nodes.values())
        twin.inputs, twin.outputs = [of(v) for v in self.inputs], [of(v) for v in self.outputs]
        for value, copied in values.items():  # in the same order: rewrites see it
            copied.uses = [(nodes[user], index) for user, index in value.uses]
        return twin

    # editing

    def replace_input(self, node: Node, index: int, value: Value | None) -> None:
        old = node.inputs[index]
        if old is not None:
            old.uses.remove((node, index))
        node.inputs = (*node.inputs[:index], value, *node.inputs[index + 1 :])
        if value is not None:
            value.uses.append((node, index))

    def replace_uses(self, old: Value, new: Value) -> None:
        """Every reader of `old`, and every graph output that is `old`, becomes `new`."""
        for node, index in list(old.uses):
            self.replace_input(node, index, new)
        self.outputs = [new if v is old else v for v in self.outputs]

    def erase(self, node: Node) -> None:
        """Remove a node that nothing reads."""
        assert not any(v.uses or v in self.outputs for v in node.outputs), node
        self._unlink(node)
        self.nodes.remove(node)

    def rename(self, node: Node, name: str) -> None:
        """Gives a node and its outputs another name, made unique if it is taken."""
        self._names -= {node.name, *(v.name for v in node.outputs)}
        node.name = self.unique_name(name)
        for count, value in enumerate(node.outputs):
            value.name = node.name if count == 0 else self.unique_name(node.name)

    def set_attrs(self, node: Node, **changes: Any) -> None:
        node.attrs = MappingProxyType({**node.attrs, **changes})

    def set_schedules(self, node: Node, choices: Iterable[Choice]) -> None:
        node.schedules = tuple(choices)

    def set_type(self, value: Value, type: TensorType) -> None:
        value.type = type

    def add_limit(self, dim: Dim, most: int, reason: str) -> None:
        """Require `dim <= most` of every run; whoever binds the symbols checks it."""
        if all((old.dim, old.most) != (dim, most) for old in self.limits):
            self.limits.append(Limit(dim, most, reason))

    def replace_limits(self, limits: Iterable[Limit]) -> None:
        self.limits = []
        for limit in limits:
            self.add_limit(limit.dim, limit.most, limit.reason)

    def drop_dead_nodes(self) -> int:
        """Remove all nodes that no output depends on; returns how many."""
        live: set[Node] = set()
        stack = [v.producer for v in self.outputs if v.producer]
        while stack:
            node = stack.pop()
            if node not in live:
                live.add(node)
                stack += [v.producer for v in node.inputs if v is not None and v.producer]
        dead = [n for n in self.nodes if n not in live]
        for node in dead:
            self._unlink(node)
        self.nodes = [n for n in self.nodes if n in live]
        return len(dead)

    def sort(self) -> None:
        """Put nodes in execution order, keeping the present order where it is free.

        Raises InvalidGraph when the graph has a cycle.
        """
        position = {node: i for i, node in enumerate(self.nodes)}
        missing = {node: len(self._producers(node, position)) for node in self.nodes}
        ready = [position[n] for n, count in missing.items() if count == 0]
        heapq.heapify(ready)
        order: list[Node] = []
        while ready:
            node = self.nodes[heapq.heappop(ready)]
            order.append(node)
            for user in {u for v in node.outputs for u in v.users}:
                missing[user] -= 1
                if missing[user] == 0:
                    heapq.heappush(ready, position[user])
        if len(order) != len(self.nodes):
            stuck = next(n for n, count in missing.items() if count)
            raise InvalidGraph(f"{self.name}: node {stuck.name} ({stuck.op}) is part of a cycle")
        self.nodes = order

    # looking

    def constants(self) -> list[Value]:
        """All constants that a node or an output reads, in order of first use."""
        values = [v for n in self.nodes for v in n.inputs if v is not None] + self.outputs
        return list(dict.fromkeys(v for v in values if v.is_constant))

    def _producers(self, node: Node, known: Mapping[Node, int]) -> set[Node]:
        producers = (v.producer for v in node.inputs if v is not None)
        return {p for p in producers if p is not None and p in known}

    def _link(self, node: Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None:
                value.uses.append((node, index))

    def _unlink(self, node: Node) -> None:
        """Takes the node out of its operands' uses; its names are free again."""
        self._names -= {node.name, *(v.name for v in node.outputs)}
        for index, value in enumerate(node.inputs):
            if value is not None:
                value.uses.remove((node, index))


def bound_symbol(node: Node) -> str | None:
    """The symbol that gets its value from the node when the model runs."""
    attribute = OPS[node.op].binds
    if attribute is None:
        return None
    (name,) = symbols(node.attrs[attribute])
    return name


def run_time_bounds(graph: Graph) -> dict[str, Dim]:
    """The most that each symbol can be whose value a node finds when the model runs."""
    pairs = ((bound_symbol(node), node) for node in graph.nodes)
    return {name: node.attrs["most"] for name, node in pairs if name is not None}


def infer_node(node: Node) -> Iterable[TensorType]:
    """Output types of a node from its operands; InvalidGraph names the node."""
    spec = OPS.get(node.op)
    if spec is None:
        raise InvalidGraph(f"{node.name}: there is no op {node.op!r} in OPS")
    types = [None if v is None else v.type for v in node.inputs]
    try:
        return spec.infer(types, node.attrs)
    except InvalidGraph as error:
        raise InvalidGraph(f"{node.name} ({node.op}): {error}") from None
