"""What a kernel of dense_gemm issues: see there for its loops."""

from __future__ import annotations

from dataclasses import replace

from sparsec.codegen.isa import by_name
from sparsec.codegen.isa.work import activation_work
from sparsec.codegen.kernels.counts import Counts, Loop
from sparsec.codegen.kernels.dense_gemm import PARAMS
from sparsec.codegen.kernels.few_tokens_gemm import ACCUMULATORS
from sparsec.codegen.kernels.panels import GROUP, LEAST_MACS, WIDTH, grain_at
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Target

LATENCY_CYCLES = 4.0  # of a multiply-add
BLOCK_CYCLES = 30.0  # to start and end a register block


def counts(workload: Workload, schedule: Schedule, tokens: int, target: Target) -> Counts:
    """Of a schedule of DenseGemmFamily."""
    m, k = workload.size("m"), workload.size("k")
    mr, strips, nv, kc, group = (schedule.param(n) for n in PARAMS)
    n = by_name(schedule.isa).lanes
    blocks, panels = -(-m // (mr * strips)), -(-tokens // WIDTH)
    whole, left = divmod(tokens, WIDTH)
    loops: list[Loop] = []
    for times, lanes in ((whole, WIDTH), (1, -(-left // GROUP) * GROUP)):
        if times and lanes:
            for vectors, parts in columns(lanes // n, nv):
                most = ACCUMULATORS[n] // (vectors * mr)
                together = max(i for i in range(1, most + 1) if strips % i == 0)
                rounds = times * parts * -(-m // (together * mr))  # none past m
                loops += _register_block(together * mr, vectors, n, (k, kc), target, rounds)
            loops += _epilogue(workload.epilogue, m * times * lanes / n)
    groups = -(-panels // group)
    weights = 4.0 * m * k
    return Counts(
        product=f"f32.{schedule.isa}",
        bits=32 * n,
        loops=tuple(loops),
        items=blocks * panels,
        grain=grain_at(mr * strips * k, tokens, LEAST_MACS["fp32"]),
        streams=((weights * groups, max(weights, target.l2_bytes)),),
    )


def columns(vectors: int, nv: int) -> list[tuple[int, int]]:
    """(vectors of a register block, how many of it) that cover so many vectors of tokens."""
    whole, rest = divmod(vectors, nv)
    return [(v, count) for v, count in ((nv, whole), (rest, 1)) if v and count]


def _register_block(
    rows: int, nv: int, n: int, depths: tuple[int, int], target: Target, rounds: float
) -> list[Loop]:
    """Blocks of `rows` by `nv` vectors over k channels, in parts of kc."""
    k, kc = depths
    in_l1 = kc * WIDTH * 4 <= target.l1d_bytes // 2
    step = Loop(
        rounds * k,
        macs=rows * nv * n,
        loads=nv,
        broadcasts=rows,
        l2_bytes=0 if in_l1 else nv * n * 4,
        chain_cycles=LATENCY_CYCLES,
    )
    ends = Loop(rounds * -(-k // kc), loads=rows * nv, stores=rows * nv, fixed_cycles=BLOCK_CYCLES)
    return [step, ends]


def _epilogue(epilogue: str, vectors: float) -> list[Loop]:
    activation, *residual = epilogue.split()
    if activation == "none" and not residual:
        return []
    work = activation_work(activation)
    body = Loop(1, others=work.others + len(residual), divides=work.divides,
                loads=1 + len(residual), stores=1)  # fmt: skip
    return [replace(body, times=vectors, l2_bytes=4.0 * 16 * len(residual))]
