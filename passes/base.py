"""What a pass is: a name and a function from a graph to what it changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sparsec.ir.graph import Graph


@dataclass(frozen=True, slots=True)
class PassResult:
    """`changed` counts rewrites; `notes` are printable: near misses and what was refused why."""

    changed: int
    notes: tuple[str, ...] = ()

    def __add__(self, other: PassResult) -> PassResult:
        return PassResult(self.changed + other.changed, self.notes + other.notes)


class Pass(Protocol):
    """One transformation of a graph, in place. Its fields are its options."""

    @property
    def name(self) -> str:
        """The name in dumps, records and errors."""

    def run(self, graph: Graph) -> PassResult:
        """Transforms `graph` and leaves it in execution order."""
