"""Give every node the schedules that a lookup function has for it, per bucket of token counts.

linear(x, w)   ->   linear(x, w) [dense_gemm.avx512(mr=6)]
linear(x, w)   ->   linear(x, w) [few.avx512() 1 to 8 tokens; dense.avx512(mr=6) over 8 tokens]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsec.errors import NoSchedule
from sparsec.ir.graph import Graph, Node
from sparsec.ir.schedule import Bucket, Choice, Schedule, buckets
from sparsec.passes.base import PassResult

ScheduleLookup = Callable[[Node, Bucket], Schedule | None]


@dataclass(frozen=True, slots=True)
class AssignSchedules:
    """`schedules` returns None for a node that nothing can compute.

    It is asked for every bucket that the node's tokens can be in; neighbours that get the same
    schedule become one.
    """

    schedules: ScheduleLookup
    name: str = "assign_schedules"

    def run(self, graph: Graph) -> PassResult:
        """Raises NoSchedule, naming the node, its op and types."""
        for node in graph.nodes:
            graph.set_schedules(node, self._choices(node))
        return PassResult(len(graph.nodes))

    def _choices(self, node: Node) -> list[Choice]:
        found: list[Choice] = []
        for bucket in buckets_of(node):
            schedule = self.schedules(node, bucket)
            if schedule is None:
                raise _no_schedule(node)
            if found and found[-1].schedule == schedule:
                bucket = Bucket(found.pop().bucket.above, bucket.most)
            found.append(Choice(schedule, bucket))
        return found if len(found) > 1 else [Choice(found[0].schedule)]


def buckets_of(node: Node) -> list[Bucket]:
    """The buckets that the node's number of tokens can be in; none at all counts as one."""
    tokens = node.tokens
    if isinstance(tokens, int):
        return [b for b in buckets() if max(tokens, 1) in b]
    return list(buckets())


def _no_schedule(node: Node) -> NoSchedule:
    operands = ", ".join(str(v.type) if v is not None else "_" for v in node.inputs)
    results = ", ".join(str(v.type) for v in node.outputs)
    return NoSchedule(
        f"{node.name}: no kernel computes {node.op}({operands}) -> "
        f"{results} on this target; choose another target, or rewrite "
        "this part of the model with ops that are supported"
    )
