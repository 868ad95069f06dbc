"""What a kernel of float_gemm issues, per step of a register block of `rows` by `nv` vectors:

    multiply-adds   vectors of x    broadcasts          blends
    rows * nv       nv              rows                -       dense
    rows * nv       nv * indices    rows and indices    nv      sparse; blends in bf16 alone

A step of a sparse weight reads one index in fp32, two in bf16.

AMX multiplies 16 pairs in a step (float_tiles), at a cycle per row of weights and tile of tokens.
Counted per step of `rows` by `nv` tiles:

    rows of tiles loaded      rows loaded and blended    stores
    rows + 16 * nv            -                          -          dense
    rows + 16 * nv            2 * 16 * nv                16 * nv    sparse
"""

from __future__ import annotations

import math

from sparsec.codegen.isa.bf16 import AMX_BF16
from sparsec.codegen.isa.numbers import Numbers, numbers_of
from sparsec.codegen.isa.work import activation_work
from sparsec.codegen.kernels.counts import (
    LINE_BYTES,
    PASS_CYCLES,
    Counts,
    Loop,
    strip_cycles,
    total_cycles,
)
from sparsec.codegen.kernels.dense_cost import BLOCK_CYCLES, LATENCY_CYCLES, columns
from sparsec.codegen.kernels.float_gemm import ACCUMULATORS, CHAINS
from sparsec.codegen.kernels.float_pack import DEPTH
from sparsec.codegen.kernels.panels import GROUP, LEAST_MACS, WIDTH, grain_at
from sparsec.codegen.kernels.weight_blocks import block_of
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.rates import product_of
from sparsec.target import Target

INDEX_CYCLES = 1.0  # of an index, beside the multiply-adds: its row's address
WORD_BYTES, INDEX_BYTES = 4, 2
BLENDS = 1.0  # instructions that join two rows of pairs
FETCH_CYCLES = 4.0  # of a step of tiles: branches of the loop that fetches


def cycles(workload: Workload, schedule: Schedule, target: Target) -> float:
    """Of a panel."""
    return total_cycles(counts(workload, schedule, WIDTH, target), target)


def counts(workload: Workload, schedule: Schedule, tokens: int, target: Target) -> Counts:
    """Of a schedule of FloatGemmFamily that is not one of DenseGemmFamily."""
    m, k = workload.size("m"), workload.size("k")
    bf16 = workload.dtype == str(DType.BF16)
    numbers = numbers_of("bf16" if bf16 else "f32", schedule.isa)
    strip, strips, group = (schedule.param(p) for p in ("strip", "strips", "group"))
    n, steps = numbers.vector.lanes, _steps(workload, schedule, numbers)
    blocks, panels = -(-m // (strip * strips)), -(-tokens // WIDTH)
    apart = (block_of(workload.layout) or (1, 1))[1] == 1
    whole, left = divmod(tokens, WIDTH)
    loops: list[Loop] = []
    for times, lanes in ((whole, WIDTH), (1, -(-left // GROUP) * GROUP)):
        if times and lanes:
            for nv, parts in columns(lanes // n, schedule.param("nv")):
                rounds = times * parts * blocks * strips
                block = _tile_block if numbers.vector is AMX_BF16 else _register_block
                loops += block(schedule, numbers, nv, (k, steps, apart), target, rounds)
            loops.append(_epilogue(workload.epilogue, m * times * lanes / n))
    indices = INDEX_BYTES * numbers.indices_per_step if schedule.param("sparse") else 0
    weights = blocks * strips * steps * (WORD_BYTES * strip + indices)
    groups = -(-panels // group)
    return Counts(
        product=product_of(workload.op, schedule.isa),
        bits=32 * n,
        loops=tuple(loops),
        items=blocks * groups,
        grain=grain_at(
            round(strip * strips * steps * numbers.per_lane), tokens, LEAST_MACS["fp32"]
        ),
        streams=((weights * groups, max(weights, target.l2_bytes)),),
        has_own_unit=numbers.vector is AMX_BF16,
    )


def _steps(workload: Workload, schedule: Schedule, numbers: Numbers) -> float:
    """Of a strip of rows, in channels or in pairs."""
    steps = _all_steps(workload, schedule, numbers)
    return -(-steps // DEPTH) * DEPTH if numbers.vector is AMX_BF16 else steps


def _all_steps(workload: Workload, schedule: Schedule, numbers: Numbers) -> float:
    k, block = workload.size("k"), block_of(workload.layout) or (1, 1)
    if not schedule.param("sparse"):
        return k / numbers.per_lane
    covered = max(1, schedule.param("strip") // block[0])
    channels = k * (1.0 - (1.0 - workload.density) ** covered)
    if numbers.per_lane == 1:
        return channels
    # A step for each even or odd channel, whichever there are more of.
    return channels / 2 + (0.4 * math.sqrt(channels) if block[1] == 1 else 0.0)


def _register_block(
    schedule: Schedule, numbers: Numbers, nv: int, depths: tuple[int, float, bool], target: Target,
    strips: float,
) -> list[Loop]:  # fmt: skip
    """`strips` strips by `nv` vectors. `depths` are the channels of x, the steps of a strip, and
    whether the two channels of a pair lie apart: in blocks of several they are neighbours."""
    k, steps, apart = depths
    n, rows = numbers.vector.lanes, schedule.param("strip")
    indices = numbers.indices_per_step if schedule.param("sparse") else 0
    if not indices:  # all strips have the same steps: a block may take several at once
        most = ACCUMULATORS[n] // (nv * rows)
        together = max(i for i in range(1, most + 1) if schedule.param("strips") % i == 0)
        rows, strips = rows * together, strips / together
    in_l1 = k / numbers.per_lane * WIDTH * WORD_BYTES <= target.l1d_bytes // 2
    loads = nv * max(1, indices)
    step = Loop(
        strips * steps,
        macs=rows * nv * n * numbers.per_lane,
        others=nv if indices > 1 else 0,
        loads=loads,
        broadcasts=rows + indices,
        l2_bytes=0 if in_l1 else (loads if apart else nv) * n * WORD_BYTES,
        chain_cycles=LATENCY_CYCLES / (1 if rows * nv >= CHAINS else 2),
        fixed_cycles=INDEX_CYCLES * indices,
    )
    ends = strip_cycles(BLOCK_CYCLES, rows)
    return [step, Loop(strips, loads=rows * nv, stores=rows * nv, fixed_cycles=ends)]


def _tile_block(
    schedule: Schedule, numbers: Numbers, nv: int, depths: tuple[int, float, bool], target: Target,
    strips: float,
) -> list[Loop]:  # fmt: skip
    """As `_register_block`; the steps are pairs, DEPTH at a time."""
    k, pairs, _ = depths
    n, rows, sparse = numbers.vector.lanes, schedule.param("strip"), schedule.param("sparse")
    # Weights of a strip, and the panel: all strips read it.
    weights = pairs * WORD_BYTES * rows
    in_l1 = k / numbers.per_lane * WIDTH * WORD_BYTES + weights <= target.l1d_bytes
    fetched = DEPTH * nv if sparse else 0
    step = Loop(
        strips * pairs / DEPTH,
        macs=rows * nv * n * DEPTH * numbers.per_lane,
        others=fetched * BLENDS,
        loads=rows + DEPTH * nv + 2 * fetched,
        broadcasts=2 * DEPTH if sparse else 0,
        stores=fetched,
        l2_bytes=0 if in_l1 else LINE_BYTES * (rows + (2 * fetched or DEPTH * nv)),
        fixed_cycles=FETCH_CYCLES if sparse else 0.0,
    )
    return [step, Loop(strips, loads=rows * nv, stores=rows * (1 + nv), fixed_cycles=PASS_CYCLES)]


def _epilogue(epilogue: str, vectors: float) -> Loop:
    activation, *others = epilogue.split()
    residual, to_pairs = "residual" in others, "bf16" in others
    work = activation_work(activation)
    return Loop(
        vectors,
        others=work.others + residual + to_pairs,
        divides=work.divides,
        loads=1 + residual,
        stores=0.5 if to_pairs else 1,
        l2_bytes=4.0 * 16 * residual,
    )
