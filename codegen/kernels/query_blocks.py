"""How attention walks the queries of a panel: shared by the fp32 and the int8 kernel.

Sequences are packed densely, so a panel may hold several. A block of queries of one sequence is
computed at once; what is left is computed a group at a time, once per sequence that it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.pack8 import Packer
from sparsec.codegen.isa.vector import keep, ramp
from sparsec.codegen.kernels.panels import (
    GROUP,
    WIDTH,
    const,
    div,
    groups_in_panel,
    item_rectangles,
    loop,
)

PACKED = "packed"  # the kind of mask of packed tokens: one value per token


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where the sequences of a batch lie among its tokens.

    They are all `seq` long or, where tokens are packed, listed: `sequence_of` each token, and
    `starts` of the sequences with the end of the last one. None is empty.
    """

    scope: tir.KernelScope
    packed: bool

    def of(self, token: Any) -> Any:
        """The sequence of a token."""
        if self.packed:
            return self.scope["sequence_of"][token]
        return div(token, self.scope["seq"])

    def start(self, sequence: Any) -> Any:
        """The first token of a sequence."""
        return self.scope["starts"][sequence] if self.packed else sequence * self.scope["seq"]

    def stop(self, sequence: Any) -> Any:
        """The token past the last one of a sequence."""
        return self.start(sequence + 1)


# (head, first token, sequence, groups): computes these queries against that sequence's keys.
Compute = Callable[[Any, Any, Any, int], None]


def over_query_blocks(
    s: tir.KernelScope, sequences: Sequences, sizes: Sequence[int], compute: Compute,
    panels: int = 1,
) -> None:  # fmt: skip
    """Calls `compute` for all queries of the kernel's items, which are heads of panels.

    `sizes` are the groups of a block, largest first, all above 1, each a multiple of the next.
    Of at most so many `panels` all queries of a head come before the next head. Reads the
    parameters `tokens` and `heads`.
    """
    tokens = s["tokens"]

    def cover(first: Any, count: Any, head: Any, sizes: Sequence[int]) -> None:
        """`count` groups from token `first` on."""
        if not sizes:
            with loop(0, count) as group:
                each_sequence(keep(first + group * GROUP), head)
            return
        size = sizes[0]
        with loop(0, div(count + (size - 1), size)) as block:
            token = keep(first + block * (size * GROUP))
            groups = keep(T.min(count - block * size, const(size)))
            last = keep(T.min(token + size * GROUP, tokens) - 1)
            own = keep(sequences.of(token))
            with T.If(T.And(groups == size, own == sequences.of(last))):
                with T.Then():
                    compute(head, token, own, size)
                with T.Else():
                    cover(token, groups, head, sizes[1:])

    def each_sequence(token: Any, head: Any) -> None:
        last = keep(T.min(token + (GROUP - 1), tokens - 1))
        with loop(keep(sequences.of(token)), keep(sequences.of(last) + 1)) as sequence:
            compute(head, token, sequence, 1)

    with (
        item_rectangles(s, s["heads"], const(panels)) as (first_head, last_head, origin, end),
        loop(first_head, last_head) as head,
        loop(origin, end) as panel,
    ):
        cover(keep(panel * WIDTH), keep(groups_in_panel(tokens, panel)), head, sizes)


def queries_before(start: Any, token: Any) -> Any:
    """How many queries from `token` on lie before the sequence that starts at `start`."""
    return T.cast(T.max(start - token, const(0)), "int32")


def store_context(
    y: Any, row: Any, results: list[Any], lanes: int, *, packer: Packer | None, before: Any | None
) -> None:
    """Vectors of results to `y` from `row` on, as bytes with a packer.

    Only the lanes of this sequence and past it change, where `before` lanes are of an earlier one:
    a later sequence overwrites the others. None: all lanes are of one sequence.
    """
    if packer is not None:
        results, lanes = [packer.bytes_of(results)], len(results) * lanes
    for i, result in enumerate(results):
        where = ramp(row + i * lanes, lanes)
        if before is not None:
            index = T.ramp(T.int32(0), 1, lanes)
            own = index >= T.broadcast(before - i * lanes, lanes)
            result = T.Select(own, result, y[where])
        T.buffer_store(y, result, [where])
