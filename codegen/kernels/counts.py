"""The cost model: what a kernel issues and moves, and the time that takes on a machine.

A kernel is a list of loops, one after the other. Within a loop everything overlaps, so that it
takes what its busiest part takes: the ports for arithmetic, for loads, for stores, the bytes from
L2, or a chain of instructions that wait for one another. Bytes that come in order from L3 or from
memory (weights, mostly) are fetched ahead: they overlap with all loops together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsec.rates import Rates
from sparsec.target import Target

LINE_BYTES = 64  # of the caches
# Latency of loads, products and stores of AMX tiles around a loop over steps.
PASS_CYCLES = 150.0


def strip_cycles(cycles: float, rows: int) -> float:
    """What a strip of `rows` takes to start and end, where one of 4 rows or more takes `cycles`.

    With fewer rows more of it overlaps with the next strip.
    """
    return cycles * min(1.0, rows / 4)


@dataclass(frozen=True, slots=True)
class Loop:
    """What one of `times` rounds issues, in instructions on whole vectors but for `macs`.

    `l2_bytes` are read from L2, `chain_cycles` what its longest chain of dependences takes, and
    `fixed_cycles` are added: starts, ends and mispredicted branches.
    """

    times: float
    macs: float = 0.0
    shuffles: float = 0.0
    others: float = 0.0
    divides: float = 0.0
    loads: float = 0.0
    broadcasts: float = 0.0
    stores: float = 0.0
    l2_bytes: float = 0.0
    chain_cycles: float = 0.0
    fixed_cycles: float = 0.0


@dataclass(frozen=True, slots=True)
class Counts:
    """All that a kernel call does for all of its items.

    `product` is the name of its multiply-accumulate in `Rates.products`, `bits` its vectors'
    length. `stream_bytes` are read in order and once, by the bytes that hold them all: these say
    which cache they are in. With `has_own_unit` multiply-accumulates take no port of the vectors'.
    """

    product: str
    bits: int
    loops: tuple[Loop, ...]
    items: int
    grain: int = 1
    streams: tuple[tuple[float, float], ...] = field(default=())
    has_own_unit: bool = False


def cycles(loop: Loop, counts: Counts, target: Target) -> float:
    """Of all rounds of a loop on one core."""
    rates = target.rates
    ports, macs = rates.of_bits(counts.bits), loop.macs / rates.product(counts.product)
    shuffles, others = loop.shuffles * ports.shuffle, loop.others * ports.other
    beside = loop.shuffles * ports.shuffle_beside + loop.others * ports.other_beside
    arithmetic = max(macs + (0.0 if counts.has_own_unit else beside), shuffles, others)
    busiest = max(
        arithmetic,
        loop.divides * ports.divide,
        loop.loads * ports.load + loop.broadcasts * ports.broadcast,
        loop.stores * ports.store,
        loop.l2_bytes / rates.level_bandwidth("l2") * rates.hertz,
        loop.chain_cycles,
    )
    return loop.times * (busiest + loop.fixed_cycles)


def total_cycles(counts: Counts, target: Target) -> float:
    """Of the loops alone on one core: what candidates are ordered by."""
    return sum(cycles(loop, counts, target) for loop in counts.loops)


def seconds(counts: Counts, target: Target, threads: int = 1) -> float:
    """Of a call on `threads` cores: the one with most items, what it streams, and the barrier."""
    rates = target.rates
    parts = max(1, min(threads, counts.items // max(1, counts.grain)))
    share = -(-counts.items // parts) / max(1, counts.items)
    compute = total_cycles(counts, target) / rates.hertz * share
    # Every worker reads all of a stream at worst, and shares the bandwidth at best.
    streams = sum(
        nbytes / rates.level_bandwidth(target.level_of(within))
        for nbytes, within in counts.streams
    )
    return rates.call_seconds + max(compute, streams * share) + barrier(rates, parts)


def barrier(rates: Rates, parts: int) -> float:
    """What it takes to wake `parts` - 1 workers and to wait for them."""
    return rates.barrier_seconds if parts > 1 else 0.0


def streaming_seconds(
    nbytes: float, target: Target, items: int, grain: int = 1, threads: int = 1,
    *, least_seconds: float = 0.0,
) -> float:  # fmt: skip
    """Of a call that moves memory, as elementwise ops do, and computes for `least_seconds`."""
    rates = target.rates
    parts = max(1, min(threads, items // max(1, grain)))
    bandwidth = rates.level_bandwidth(target.level_of(nbytes))
    busy = max(nbytes / bandwidth, least_seconds)
    return rates.call_seconds + busy / parts + barrier(rates, parts)
