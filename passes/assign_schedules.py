"""Give every node the schedule that a lookup function has for it.

linear(x, w)   ->   linear(x, w) [dense_gemm.avx512(mr=6)]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsec.errors import NoSchedule
from sparsec.ir.graph import Graph, Node
from sparsec.ir.schedule import Schedule
from sparsec.passes.base import PassResult

ScheduleLookup = Callable[[Node], Schedule | None]


@dataclass(frozen=True, slots=True)
class AssignSchedules:
    """`schedules` returns None for a node that nothing can compute."""

    schedules: ScheduleLookup
    name: str = "assign_schedules"

    def run(self, graph: Graph) -> PassResult:
        """Raises NoSchedule, naming the node, its op and types."""
        for node in graph.nodes:
            schedule = self.schedules(node)
            if schedule is None:
                operands = ", ".join(str(v.type) if v is not None else "_" for v in node.inputs)
                results = ", ".join(str(v.type) for v in node.outputs)
                raise NoSchedule(
                    f"{node.name}: no kernel computes {node.op}({operands}) -> "
                    f"{results} on this target; choose another target, or rewrite "
                    "this part of the model with ops that are supported"
                )
            graph.set_schedule(node, schedule)
        return PassResult(len(graph.nodes))
