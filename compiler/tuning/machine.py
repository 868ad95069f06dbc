"""What this machine can do, measured by small kernels: `sparsec calibrate`."""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.codegen import probes, tir
from sparsec.codegen.isa import amx, vector_isas
from sparsec.codegen.probes import NOTHING, Probe
from sparsec.codegen.program import BufferRef, KernelCall, Port, Program, Region
from sparsec.codegen.toolchain import build_library, link_kernels
from sparsec.ir.dims import symbol
from sparsec.ir.types import DType, TensorType
from sparsec.rates import Ports, Rates, default_rates
from sparsec.runtime import load
from sparsec.target import Isa, Target, cpu_flags, may_use_tiles
from sparsec.tuning.rates_file import Known, check_folder, keep_rates, known_rates

Progress = Callable[[str], None]
REPEATS = 9
TARGET_SECONDS = 3e-3  # of one timed call
MAX_BUFFER_BYTES = 256 << 20
BARRIER_STEPS = 64
BARRIER_RUNS = 50


def calibrate(folder: Path, *, force: bool = False, progress: Progress) -> Known:
    """Measures this machine, unless it was, and keeps the result in `folder`.

    Takes some seconds of one core. Raises InvalidInput when the folder cannot be written to, and
    UnsupportedCpu on a machine for which there are no kernels.
    """
    target = Target.host()
    known = known_rates(folder, target)
    if known.rates is not None and not force:
        return known
    check_folder(folder)  # before the measurement, not after it
    return keep_rates(folder, target, measure(target, progress))


def measure(target: Target, progress: Progress) -> Rates:
    """The rates of this machine."""
    vectors = vector_isas(target)[::-1]
    assert vectors, target
    ports = {v: probes.port_probes(v) for v in vectors}
    products = {n: p for n, p in probes.product_probes(cpu_flags()).items() if _runs(p, target)}
    cycle = probes.cycle_probe()
    progress("building probes")
    with _Bench([cycle, *(p for group in ports.values() for p in group), *products.values()]) as b:
        progress("measuring the clock and the ports")
        hertz = b.rate(cycle)
        found_ports = tuple((32 * v.lanes, _ports(b, ports[v], hertz)) for v in vectors)
        found_products = tuple(
            (n, b.rate(p, tiles="amx" in n) / hertz) for n, p in products.items()
        )
        hertz = max(hertz, b.rate(cycle))
        progress("measuring the caches and memory")
        (read,) = (p for p in ports[vectors[-1]] if p.kind == "read")
        bandwidth = tuple(b.bandwidth(read, size) for size in _buffer_sizes(target))
    progress("measuring calls and barriers")
    call_seconds, barrier_seconds = _call_and_barrier(target)
    return Rates(
        source="this machine, measured",
        hertz=hertz,
        products=found_products,
        ports=found_ports,
        bandwidth=(bandwidth[0], bandwidth[1], bandwidth[2], bandwidth[3]),
        barrier_seconds=barrier_seconds,
        call_seconds=call_seconds,
        is_measured=True,
    )


def _runs(probe: Probe, target: Target) -> bool:
    if "amx" in probe.kind and not may_use_tiles():
        return False
    return target.has(Isa(probe.isa))


def _ports(bench: _Bench, group: list[Probe], hertz: float) -> Ports:
    """Cycles per instruction, from the probes of one vector length."""
    each = {p.kind: hertz / bench.rate(p) for p in group if p.kind != "read"}

    def beside(kind: str) -> float:
        """What each of a quarter of the chains adds to the multiply-adds of the others."""
        chains, others = probes.CHAINS, probes.CHAINS // 4
        added = each[f"{kind}_beside"] * chains - each["multiply"] * (chains - others)
        return max(0.0, added / others)

    plain = {f.name: each[f.name] for f in fields(Ports) if f.name in each}
    plain |= {f"{kind}_beside": beside(kind) for kind in ("shuffle", "other")}
    return Ports(**plain)


def _buffer_sizes(target: Target) -> tuple[int, int, int, int]:
    """Bytes to read from so that they come from each of LEVELS."""
    l3 = min(target.l3_bytes // 2, 4 * target.l2_bytes)
    memory = min(MAX_BUFFER_BYTES, max(4 * target.l3_bytes, 8 * target.l2_bytes))
    return target.l1d_bytes // 2, target.l2_bytes // 2, max(l3, 2 * target.l2_bytes), memory


class _Bench:
    """Probes in one library, and the memory that they read and write."""

    def __init__(self, all_probes: Iterable[Probe]):
        self._folder = tempfile.TemporaryDirectory(prefix="sparsec-")
        by_features: dict[tuple[str, ...], dict[str, Any]] = {}
        for probe in all_probes:
            by_features.setdefault(probe.features, {})[probe.name] = probe
        objects = [
            tir.build_object([p.build() for p in group.values()], features)
            for features, group in by_features.items()
        ]
        path = Path(self._folder.name) / "probes.so"
        link_kernels(objects, path)
        self._library = ctypes.CDLL(str(path))
        self._x, self._y = _aligned(1 << 20), _aligned(1 << 16)
        self._x[...] = 1.25

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self._folder.cleanup()

    def rate(self, probe: Probe, *, tiles: bool = False) -> float:
        """Work per second, of the fastest call."""
        x = self._x
        if tiles:
            x = _aligned(1 << 12)
            x[: amx.CONFIG_BYTES] = amx.ALL_FULL
        return probe.work / self._seconds_per_item(probe, x, 0)

    def bandwidth(self, probe: Probe, nbytes: int) -> float:
        """Bytes per second of reading a buffer of about `nbytes` over and over."""
        vector = 4 * probe.lanes
        count = nbytes // vector // probes.CHAINS * probes.CHAINS
        buffer = _aligned(count * vector)
        return count * vector / self._seconds_per_item(probe, buffer, count)

    def _seconds_per_item(self, probe: Probe, x: Any, count: int) -> float:
        function = getattr(self._library, probe.name)
        function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3

        def call(items: int) -> float:
            start = time.thread_time()  # not the time in which another process had the core
            function(x.ctypes.data, self._y.ctypes.data, count, 0, items)
            return time.thread_time() - start

        items = 1
        while call(items) < TARGET_SECONDS:
            items *= 2
        return min(call(items) for _ in range(REPEATS)) / items


def _aligned(nbytes: int) -> Any:
    """Bytes of zeros at a multiple of 64, touched so that each page is a page of its own."""
    raw = np.ones(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start : start + nbytes]
    array[...] = 0
    return array


def _call_and_barrier(target: Target) -> tuple[float, float]:
    """Seconds of a kernel call that does nothing, and what a second thread adds to it."""
    with tempfile.TemporaryDirectory(prefix="sparsec-") as name:
        path = Path(name) / "nothing.so"
        build_library(
            _nothing_program(),
            {"kernels": tir.build_object([NOTHING.build()], probes.cycle_probe().features)},
            path,
            isa=Isa.AVX2,
            metadata={},
        )
        call = _step_seconds(path, threads=1)
        if target.cores < 2:  # a second thread would wait for the first one to be descheduled
            return call, default_rates("").barrier_seconds
        return call, max(0.0, _step_seconds(path, threads=2) - call)


def _nothing_program() -> Program:
    count = symbol("count")
    type = TensorType(DType.F32, (count,))
    y = BufferRef(Region.OUTPUT, 0, type, "y")
    return Program(
        name="nothing",
        inputs=(Port("x", type),),
        outputs=(Port("y", type),),
        symbols=("count",),
        weights=(),
        slots=(),
        calls=(KernelCall(NOTHING, (y,), 2, "nothing"),) * BARRIER_STEPS,
    )


def _step_seconds(path: Path, *, threads: int) -> float:
    model = load(path, threads=threads)
    try:
        inputs = {"x": np.zeros(16, np.float32)}
        runs = [np.median(model.run_timed(inputs)[1]) for _ in range(BARRIER_RUNS)]
    finally:
        model.close()
    return float(min(runs))
