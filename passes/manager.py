"""Runs a list of passes and verifies the graph after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from sparsec.errors import CompilerError, InvalidGraph, PassFailed
from sparsec.ir.graph import Graph
from sparsec.ir.verifier import verify
from sparsec.passes.base import Pass

DumpHook = Callable[[str, Graph], None]


class PassRecord(TypedDict):
    """What one pass did: plain data for reports. `nodes` is the size of the graph after it."""

    name: str
    seconds: float
    changed: int
    nodes: int
    notes: list[str]


@dataclass(frozen=True, slots=True)
class PassManager:
    """Runs `passes` in order. `dump` sees the graph after each."""

    passes: Sequence[Pass]
    dump: DumpHook | None = None

    def run(self, graph: Graph) -> list[PassRecord]:
        """Transforms `graph`; PassFailed names the pass that broke it."""
        return [self._run_one(one, graph) for one in self.passes]

    def _run_one(self, one: Pass, graph: Graph) -> PassRecord:
        start = time.perf_counter()
        try:
            result = one.run(graph)
        except CompilerError:
            raise  # the user's to read as it is
        except Exception as error:
            raise PassFailed(
                f"pass {one.name} failed on {graph.name}: {type(error).__name__}: {error}; "
                "this is a defect of the compiler, please report it with the model"
            ) from error
        seconds = time.perf_counter() - start
        if self.dump is not None:
            self.dump(one.name, graph)
        try:
            verify(graph)
        except InvalidGraph as error:
            raise PassFailed(
                f"pass {one.name} left {graph.name} in a wrong state: {error}; "
                "this is a defect of the compiler, please report it with the model"
            ) from error
        return PassRecord(
            name=one.name,
            seconds=seconds,
            changed=result.changed,
            nodes=len(graph.nodes),
            notes=list(result.notes),
        )
