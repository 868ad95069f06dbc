"""Runs a Graph in NumPy through OpSpec.evaluate: the oracle of every pass and kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparsec.errors import CompilerError, InvalidGraph, InvalidInput
from sparsec.ir import dims
from sparsec.ir.dims import Dim, Symbol
from sparsec.ir.graph import Graph, Node, Value, bound_symbol
from sparsec.ir.ops import OPS

Array = np.ndarray[Any, Any]
Observer = Callable[[Value, Array], None]
Compute = Callable[[Node, list[Array | None], dict[str, int]], list[Array]]


def run(
    graph: Graph,
    inputs: Mapping[str, Array],
    observe: Observer | None = None,
    compute: Compute | None = None,
) -> dict[str, Array]:
    """The outputs of `graph` by name. `observe` sees the inputs and every result of a node.

    `compute` gives the results of a node in place of `run_node`.

    Raises InvalidInput when names, ranks, dtypes or sizes are not what the graph wants.
    """
    env = bind(graph, inputs)
    values: dict[Value, Array] = {v: np.asarray(inputs[v.name]) for v in graph.inputs}
    if observe is not None:
        for given in values.items():
            observe(*given)
    made = [v for n in graph.nodes for v in n.outputs]
    left: dict[Value | None, int] = {v: len(v.uses) + graph.outputs.count(v) for v in made}
    for node in graph.nodes:
        operands = [None if v is None else _data(v, values) for v in node.inputs]
        results = (compute or run_node)(node, operands, env)
        values.update(zip(node.outputs, results, strict=True))
        if observe is not None:
            for pair in zip(node.outputs, results, strict=True):
                observe(*pair)
        for operand in node.inputs:
            if operand in left:
                left[operand] -= 1
        for value in (*node.inputs, *node.outputs):
            if value is not None and left.get(value) == 0:
                values.pop(value, None)
    pairs = zip(graph.output_names, graph.outputs, strict=True)
    return {name: np.array(_data(value, values)) for name, value in pairs}


def run_node(node: Node, operands: list[Array | None], env: dict[str, int]) -> list[Array]:
    """The results of one node; checks that they have the types that the node declares.

    A symbol whose value the node finds is added to `env`.
    """
    try:
        results = OPS[node.op].evaluate(operands, node.attrs, env)
    except IndexError as error:
        raise InvalidInput(f"{node.name} ({node.op}): {error}") from error
    except (ValueError, FloatingPointError, TypeError) as error:
        raise InvalidGraph(f"{node.name} ({node.op}): {error}") from error
    if (symbol := bound_symbol(node)) is not None:
        env[symbol] = int(results[0])
    for value, result in zip(node.outputs, results, strict=True):
        shape = tuple(dims.evaluate(d, env) for d in value.type.shape)
        if result.shape != shape or result.dtype != value.type.dtype.numpy:
            raise InvalidGraph(
                f"{node.name} ({node.op}): made {result.dtype}{list(result.shape)}, "
                f"but its type {value.type} is {list(shape)} here"
            )
    return results


def bind(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, int]:
    """The value of every symbol in the input shapes.

    Raises InvalidInput for wrong names, dtypes or ranks, and for sizes that contradict the shape
    or each other.
    """
    wanted = [v.name for v in graph.inputs]
    missing = [n for n in wanted if n not in inputs]
    unknown = [n for n in inputs if n not in wanted]
    if missing or unknown:
        raise InvalidInput(
            f"{graph.name} wants the inputs {wanted}: missing {missing}, unknown {unknown}"
        )
    env: dict[str, int] = {}
    source: dict[str, str] = {}
    for value in graph.inputs:
        data = np.asarray(inputs[value.name])
        _check_type(value, data)
        for axis, dim in enumerate(value.type.shape):
            _bind_dim(dim, data.shape[axis], f"{value.name} axis {axis}", env, source)
    for value in graph.inputs:
        _check_shape(value, np.asarray(inputs[value.name]), env)
    for limit in graph.limits:
        size = dims.evaluate(limit.dim, env)
        if size > limit.most:
            raise InvalidInput(f"{limit.dim} is {size}, at most {limit.most}: {limit.reason}")
    return env


def _check_type(value: Value, data: Array) -> None:
    if data.dtype != value.type.dtype.numpy:
        raise InvalidInput(
            f"input {value.name} must be {value.type.dtype.numpy}, got {data.dtype}; "
            f"convert it with .astype({value.type.dtype.value!r})"
        )
    if data.ndim != value.type.rank:
        raise InvalidInput(
            f"input {value.name} must have {value.type.rank} axes, {value.type}, "
            f"got shape {list(data.shape)}"
        )


def _bind_dim(
    dim: Dim, size: int, place: str, env: dict[str, int], source: dict[str, str]
) -> None:
    atom = dims.only_atom(dim)
    if not isinstance(atom, Symbol):
        return
    name = atom.name
    if size < 1:
        raise InvalidInput(f"{place} ({name}) is {size}; it must be at least 1")
    if env.setdefault(name, size) != size:
        raise InvalidInput(
            f"{place} is {size}, but {name} is {env[name]} by {source[name]}; they must be equal"
        )
    source.setdefault(name, place)


def _check_shape(value: Value, data: Array, env: Mapping[str, int]) -> None:
    for axis, dim in enumerate(value.type.shape):
        try:
            size = dims.evaluate(dim, env)
        except KeyError as error:
            raise InvalidGraph(f"no input has {error} as a dim of its own") from None
        if size != data.shape[axis]:
            raise InvalidInput(
                f"input {value.name} axis {axis} must be {dim} = {size}, got {data.shape[axis]}"
            )


def _data(value: Value, values: Mapping[Value, Array]) -> Array:
    if value.data is not None:
        return value.data
    try:
        return values[value]
    except KeyError:
        raise CompilerError(f"%{value.name} is read before it is produced") from None
