"""How attention walks the queries of a panel: shared by the fp32 and the int8 kernel.

Sequences are packed densely, so a panel may hold several. A block of queries of one sequence is
computed at once; what is left is computed a group at a time, once per sequence that it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.pack8 import Packer
from sparsec.codegen.isa.vector import keep, ramp
from sparsec.codegen.kernels.panels import GROUP, WIDTH, const, div, groups_in_panel, loop, mod

# (head, first token, sequence, groups): computes these queries against that sequence's keys.
Compute = Callable[[Any, Any, Any, int], None]


def over_query_blocks(s: tir.KernelScope, sizes: Sequence[int], compute: Compute) -> None:
    """Calls `compute` for all queries of the kernel's items, which are heads of panels.

    `sizes` are the groups of a block, largest first, all above 1. Reads the parameters `tokens`,
    `seq` and `heads`.
    """
    seq, tokens = s["seq"], s["tokens"]
    with loop(s.begin, s.end) as item:
        panel, head = keep(div(item, s["heads"])), keep(mod(item, s["heads"]))
        groups = keep(groups_in_panel(tokens, panel))
        token = keep(panel * WIDTH)
        after = keep(T.min(token + WIDTH, tokens))
        one_sequence = div(token, seq) == div(after - 1, seq)
        whole = keep(T.Select(one_sequence, groups, const(0)))
        done: Any = const(0)
        for size in sizes:
            blocks = keep(div(whole - done, size))
            with loop(0, blocks) as block:
                first = keep(token + (done + block * size) * GROUP)
                compute(head, first, div(first, seq), size)
            done = keep(done + blocks * size)
        with loop(done, groups) as group:
            first = keep(token + group * GROUP)
            last = keep(T.min(first + (GROUP - 1), tokens - 1))
            with loop(div(first, seq), div(last, seq) + 1) as sequence:
                compute(head, first, sequence, 1)


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
