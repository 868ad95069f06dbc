"""What a kernel of layer_norm issues: two passes over the channels of some tokens."""

from __future__ import annotations

from sparsec.codegen.isa import by_name
from sparsec.codegen.kernels.counts import Counts, Loop
from sparsec.codegen.kernels.panels import GROUP, WIDTH
from sparsec.ir.schedule import Schedule, Workload
from sparsec.rates import product_of
from sparsec.target import Target

STATISTICS = 4  # sum, difference, square, sum of squares
PACK = 4  # scale, to integer, and a share of the packs
ITEM_CYCLES = 100.0


def counts(workload: Workload, schedule: Schedule, tokens: int, target: Target) -> Counts:
    """Of a schedule of LayerNormFamily."""
    n, channels, words = by_name(schedule.isa).lanes, workload.size("c"), workload.epilogue.split()
    residual, beta, factor = (word in words for word in ("residual", "beta", "factor"))
    result = words[-1] if "to" in words else "f32"
    floats, to_bytes = result.startswith("f32"), result.endswith("u8")
    to_pairs = result.endswith("bf16")
    kept = residual and not to_bytes
    vectors = -(-tokens // GROUP) * GROUP / n
    sources = 1 + residual
    # Of a whole panel only what was read last is still in L1 for the second pass.
    tensor = -(-tokens // WIDTH) * WIDTH * channels * 4.0
    again = 4.0 * n * (1 if kept else sources)
    first = Loop(
        vectors * channels,
        others=STATISTICS + residual,
        loads=sources,
        stores=1 if kept else 0,
        l2_bytes=4.0 * n * (sources + kept),
    )
    second = Loop(
        vectors * channels,
        others=2 + beta + factor + (residual and not kept) + PACK * to_bytes + to_pairs,
        loads=1 if kept else sources,
        broadcasts=1 + beta + factor,
        stores=floats + to_bytes / 4 + to_pairs / 2,
        l2_bytes=again if channels * 64 > target.l1d_bytes // 2 else 0.0,
    )
    each = WIDTH if to_bytes else GROUP
    moved = tensor * (sources + floats + to_bytes / 4 + to_pairs / 2)
    return Counts(
        product=product_of(workload.op, schedule.isa),
        bits=32 * n,
        loops=(first, second, Loop(vectors, divides=1, fixed_cycles=ITEM_CYCLES)),
        items=-(-tokens // each),
        grain=1 if to_bytes else 2,
        streams=((moved, moved),),
    )
