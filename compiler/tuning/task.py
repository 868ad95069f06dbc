"""What is tuned: one node of a model, cut out of its graph, for one number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparsec.errors import InvalidInput
from sparsec.ir.dims import Dim, evaluate, symbols
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.layouts import Panels
from sparsec.ir.op_spec import Array
from sparsec.ir.schedule import EVERY, Bucket, Workload
from sparsec.ir.types import TensorType

LAST_BUCKET_FACTOR = 4  # the bucket without an end is tuned for so many times its start


@dataclass(frozen=True, slots=True)
class Operand:
    """A value that the node reads; `data` is a constant's."""

    name: str
    type: TensorType
    data: Array | None


@dataclass(frozen=True, slots=True)
class CutNode:
    """A node without its graph: plain data that another process, or machine, can be given.

    `results` are types; kernels may leave out those that are not `is_read`.
    """

    name: str
    op: str
    attrs: Mapping[str, Any]
    operands: tuple[Operand | None, ...]
    results: tuple[TensorType, ...]
    is_read: tuple[bool, ...]

    @staticmethod
    def of(node: Node) -> CutNode:
        operands = tuple(None if v is None else Operand(v.name, v.type, v.data)
                         for v in node.inputs)  # fmt: skip
        results = tuple(v.type for v in node.outputs)
        alone = len(node.outputs) == 1
        is_read = tuple(alone or bool(v.uses) for v in node.outputs)
        return CutNode(node.name, node.op, dict(node.attrs), operands, results, is_read)

    def node(self) -> Node:
        """The node in a new graph, with a reader for each result that has one.

        An operand that comes twice is one value.
        """
        graph = Graph(self.name)
        values: dict[str, Value] = {}
        for operand in self.operands:
            if operand is not None and operand.name not in values:
                values[operand.name] = _add(graph, operand)
        inputs = [None if o is None else values[o.name] for o in self.operands]
        node = graph.add_node(self.op, inputs, self.attrs, name=self.name)
        for value, type, is_read in zip(node.outputs, self.results, self.is_read, strict=True):
            graph.set_type(value, type)
            if is_read and isinstance(type.layout, Panels):
                graph.add("from_panels", [value])
        return node


def _add(graph: Graph, operand: Operand) -> Value:
    if operand.data is None:
        value = graph.add_input(operand.name, operand.type.dtype, operand.type.shape)
    else:
        value = graph.add_constant(operand.data, operand.name)
    graph.set_type(value, operand.type)
    return value


@dataclass(frozen=True, slots=True)
class Task:
    """A node to find a schedule for, with `bucket.most` tokens, on `threads` threads.

    `workload` is without the bucket. `sizes` are the symbols' values, for `tokens` tokens.
    """

    cut: CutNode
    workload: Workload
    bucket: Bucket
    tokens: int
    threads: int
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        return f"{self.workload}, {self.tokens} tokens, {self.threads} threads"


def tokens_of(bucket: Bucket) -> int:
    """What a bucket is tuned for: its largest number of tokens."""
    return bucket.above * LAST_BUCKET_FACTOR if bucket.most is None else bucket.most


def task_of(
    node: Node, workload: Workload, bucket: Bucket, threads: int, fixed: Mapping[str, int]
) -> Task | None:
    """The task of a node; None when its shapes are fixed to token counts outside the bucket.

    The last symbol of the number of tokens that is not in `fixed` takes the bucket's size, all
    others are 1. Raises InvalidInput when the tokens are not a multiple of that.
    """
    wanted = tokens_of(bucket)
    names = sorted({s for v in (*node.inputs, *node.outputs) if v is not None and v.data is None
                    for d in v.type.shape for s in symbols(d)})  # fmt: skip
    sizes = {name: fixed.get(name, 1) for name in names}
    free = [name for name in sorted(symbols(node.tokens)) if name not in fixed]
    if free:
        sizes[free[-1]] = max(1, wanted // _evaluated(node.tokens, sizes))
    tokens = _evaluated(node.tokens, sizes)
    if tokens not in bucket:
        return None
    plain = replace(workload, bucket=EVERY)
    return Task(CutNode.of(node), plain, bucket, tokens, threads, sizes)


def _evaluated(dim: Dim, sizes: Mapping[str, int]) -> int:
    tokens = evaluate(dim, sizes)
    if tokens < 1:
        raise InvalidInput(f"{dim} tokens are {tokens} for {dict(sizes)}")
    return tokens
