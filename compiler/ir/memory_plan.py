"""Where the intermediate values of a graph lie in the arena: plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sparsec.ir.dims import Dim, evaluate

ALIGNMENT = 64  # bytes; a slot starts on a cache line


def total_bytes(slots: Iterable[Dim], env: Mapping[str, int]) -> int:
    """What slots that follow each other take when the symbols have the values in `env`."""
    return sum(-(-evaluate(size, env) // ALIGNMENT) * ALIGNMENT for size in slots)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All but `slots` are keyed by value names.

    A value that is a view has no slot: it lies where the value it is a view of lies. Nor has one
    that a node writes over the operand it reads, `in_place`. `slots` are sizes in bytes; the slots
    follow each other in the arena, each rounded up to ALIGNMENT.
    """

    slot_of: Mapping[str, int]
    slots: tuple[Dim, ...]
    view_of: Mapping[str, str]
    in_place: Mapping[str, str] = field(default_factory=dict)

    def root(self, name: str) -> str:
        """The value that has the memory in which `name` lies: itself, when it has its own."""
        while name in self.view_of or name in self.in_place:
            name = self.view_of.get(name) or self.in_place[name]
        return name

    def content(self, name: str) -> str:
        """The value whose bytes those of `name` are: that it is a view of, or itself."""
        while name in self.view_of:
            name = self.view_of[name]
        return name

    def arena_bytes(self, env: Mapping[str, int]) -> int:
        """The size of all slots when the symbols have the values in `env`."""
        return total_bytes(self.slots, env)
