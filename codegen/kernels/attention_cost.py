"""What the kernels of `attention` and `attention_int8` issue: see there for their steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sparsec.codegen.isa import by_name
from sparsec.codegen.isa.int8 import AVX2_INT8, Int8Isa, int8_isa
from sparsec.codegen.isa.work import EXP_NEGATIVE
from sparsec.codegen.kernels.attention_int8 import BLOCKS
from sparsec.codegen.kernels.attention_int8_block import QUAD
from sparsec.codegen.kernels.counts import LINE_BYTES, Counts, Loop
from sparsec.codegen.kernels.panels import GROUP, WIDTH
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Target

LATENCY_CYCLES = 4.0
STEP_CYCLES = 20.0  # to start and end a register block
RUN_CYCLES = 200.0  # to start and end a run of queries
EXP2_OTHERS = {16: 10, 8: 13}  # difference, fraction, cubic, scale, to integer, shift, or
UNPACKS = 8
# Of a line that no prefetcher expects, with as many on their way as a core has buffers for.
FAR_LINE_CYCLES = {"l1": 0.0, "l2": 3.0, "l3": 16.0, "dram": 40.0}


def counts(workload: Workload, schedule: Schedule, batch: int, seq: int, target: Target) -> Counts:
    """Of a schedule of AttentionFamily."""
    n, heads = by_name(schedule.isa).lanes, workload.size("heads")
    most, rows = schedule.param("groups"), schedule.param("rows")
    runs = query_runs(batch, seq, (most,) if most > 1 else ())
    loops = []
    for groups, times in runs.items():
        together = rows * (most // groups)
        loops += _f32_run(groups * GROUP // n, n, together, workload, seq, target, times * heads)
    loops.append(_far_lines(workload, runs, batch * seq, seq, target))
    return Counts(f"f32.{schedule.isa}", 32 * n, tuple(loops), -(-batch * seq // WIDTH) * heads)


def counts_int8(
    workload: Workload, schedule: Schedule, batch: int, seq: int, target: Target
) -> Counts:
    """Of a schedule of AttentionInt8Family."""
    heads, isa = workload.size("heads"), int8_isa(schedule.isa)
    loops = []
    for groups, times in query_runs(batch, seq, (4, 2)).items():
        loops += _preparation(isa, groups, workload, seq, times * heads)
        loops += _int8_run(isa, groups, workload, seq, target, times * heads)
    items = -(-batch * seq // WIDTH) * heads
    return Counts(f"u8s8.{schedule.isa}", 32 * isa.lanes, tuple(loops), items)


def _far_lines(
    workload: Workload, runs: Counter[int], tokens: int, seq: int, target: Target
) -> Loop:
    """Lines of q, k, v and y that a run is the first to read: a line per row, in no order.

    Rows of a panel of fp32 are 256 bytes apart. Of long sequences the lines are read again.
    """
    heads, size = workload.size("heads"), workload.size("head_size")
    level = target.level_of(4.0 * 4.0 * tokens * heads * size)
    panels = min(sum(runs.values()), -(-tokens // min(seq, WIDTH)))
    lines = 4.0 * size * max(1, min(seq, WIDTH) * 4 // LINE_BYTES) * heads * panels
    return Loop(lines, fixed_cycles=FAR_LINE_CYCLES[level])


def query_runs(batch: int, seq: int, sizes: Sequence[int]) -> Counter[int]:
    """How many runs of so many groups of queries there are per head: as over_query_blocks."""
    found: Counter[int] = Counter()
    tokens = batch * seq
    for start in range(0, tokens, WIDTH):
        end = min(start + WIDTH, tokens)
        groups, done = -(-(end - start) // GROUP), 0
        if start // seq == (end - 1) // seq:
            for size in sizes:
                found[size] += (groups - done) // size
                done += (groups - done) // size * size
        for first in range(start + done * GROUP, end, GROUP):
            last = min(first + GROUP, tokens) - 1
            found[1] += last // seq - first // seq + 1
    return Counter({groups: times for groups, times in found.items() if times})


def _f32_run(
    count: int, n: int, rows: int, workload: Workload, seq: int, target: Target, times: float
) -> list[Loop]:
    """`times` runs of `count` vectors of queries, `rows` keys or channels at once."""
    size, full = workload.size("head_size"), "full" in workload.epilogue
    to_u8 = workload.epilogue.endswith("u8")
    key_steps, channel_steps = -(-seq // rows), -(-size // rows)
    scores_bytes = seq * count * n * 4
    spilled = scores_bytes > target.l1d_bytes // 2
    product = {"macs": rows * count * n, "broadcasts": rows, "loads": count}
    vector_bytes = 4.0 * n
    keys_from_l2 = rows * 4.0 if seq * size * 4 > target.l1d_bytes // 2 else 0.0
    loops = [
        Loop(times * key_steps * size, **product, chain_cycles=LATENCY_CYCLES,
             l2_bytes=keys_from_l2),
        Loop(times * key_steps, others=3 * rows * count, stores=rows * count,
             loads=full * rows * count, fixed_cycles=STEP_CYCLES),
        Loop(times * seq * count, others=EXP_NEGATIVE.others + 2, loads=1, stores=1,
             l2_bytes=vector_bytes * spilled),
        Loop(times * channel_steps * seq, **product, chain_cycles=LATENCY_CYCLES,
             l2_bytes=vector_bytes * count * spilled + keys_from_l2),
        Loop(times * channel_steps, others=rows * count, stores=rows * count,
             shuffles=to_u8 * rows * count, fixed_cycles=STEP_CYCLES),
        Loop(times, fixed_cycles=RUN_CYCLES, divides=count),
    ]  # fmt: skip
    if full:
        loops.append(Loop(times * seq * count, shuffles=n.bit_length() - 1, loads=1, stores=1))
    return loops


def _preparation(
    isa: Int8Isa, groups: int, workload: Workload, seq: int, times: float
) -> list[Loop]:
    """What is made of queries, keys and values for `times` runs of `groups` groups of queries."""
    size, panels = workload.size("head_size"), -(-seq // WIDTH)
    if isa is AVX2_INT8:
        in_pairs = {"shuffles": 6, "others": 2, "loads": 2, "stores": 2}
        return [
            Loop(times * (groups + 4 * panels) * size / 2, **in_pairs),
            Loop(times * 4 * panels * size, shuffles=1, others=1, loads=1, stores=1),
        ]
    return [
        Loop(times * size / QUAD, shuffles=2 * UNPACKS, loads=QUAD, stores=QUAD),
        Loop(times * panels * size, others=1, loads=1, stores=1, l2_bytes=64),
        Loop(times * panels * size / QUAD, macs=4 * 64, shuffles=UNPACKS, others=QUAD, loads=QUAD,
             stores=QUAD, l2_bytes=64 * QUAD, chain_cycles=LATENCY_CYCLES),
    ]  # fmt: skip


def _int8_run(
    isa: Int8Isa, groups: int, workload: Workload, seq: int, target: Target, times: float
) -> list[Loop]:
    """`times` runs of `groups` groups of queries, less the preparation."""
    block, n = BLOCKS[isa], isa.lanes
    unit, together = block.unit, min(groups, block.most)
    rows, count = block.rows[together], together * GROUP // n
    times *= groups // together
    size, to_u8 = workload.size("head_size"), workload.epilogue.endswith("u8")
    units, panels = -(-seq // unit), -(-seq // WIDTH)
    key_steps, channel_steps = -(-seq // rows), -(-size // rows)
    spilled = seq * count * 4 * n > target.l1d_bytes // 2
    product = {"macs": rows * count * n * unit, "broadcasts": rows, "loads": count}
    masked = 1 if "key" in workload.epilogue else 0
    mask = {"others": 3, "shuffles": n.bit_length() - 1, "loads": 1, "stores": 1}
    full = times * seq * count if "full" in workload.epilogue else 0
    return [
        Loop(full, **mask),
        Loop(times * key_steps * size / unit, **product, chain_cycles=LATENCY_CYCLES),
        Loop(times * key_steps, others=3 * rows * count, stores=rows * count, broadcasts=rows,
             fixed_cycles=STEP_CYCLES + (3 + 2 * masked) * rows),
        Loop(times * units * count, macs=n * unit, others=unit * EXP2_OTHERS[n], loads=unit,
             stores=1, l2_bytes=4.0 * n * unit * spilled),
        Loop(times * channel_steps * units, **product, chain_cycles=LATENCY_CYCLES),
        Loop(times * channel_steps, others=(2 + 2 * to_u8) * rows * count,
             shuffles=to_u8 * rows, stores=rows * (1 if to_u8 else count),
             fixed_cycles=STEP_CYCLES * panels),
        Loop(times, fixed_cycles=RUN_CYCLES, divides=count),
    ]  # fmt: skip
