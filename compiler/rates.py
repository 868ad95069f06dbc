"""How fast a machine is at what kernels are made of: measured once, or a default per target.

The cost model (codegen/kernels/counts.py) turns counts of instructions and bytes into time with
these. `tuning/machine.py` measures them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

LEVELS = ("l1", "l2", "l3", "dram")


@dataclass(frozen=True, slots=True)
class Ports:
    """Cycles that one instruction of a vector length takes when nothing waits for its result.

    `*_beside` is what it adds to a stream of multiply-adds: less than alone where other ports
    take it. `other` is any arithmetic that is not a multiply-accumulate, a shuffle or a division.
    """

    load: float
    broadcast: float
    store: float
    shuffle: float
    shuffle_beside: float
    other: float
    other_beside: float
    divide: float


@dataclass(frozen=True, slots=True)
class Rates:
    """One core of a machine.

    `products` are multiply-accumulates per cycle by type and instruction set (`u8s8.avx512vnni`),
    `ports` are by the bits of a vector. `bandwidth` is what one core reads per second from L1, L2,
    L3 and memory. `barrier_seconds` is what a kernel call takes in addition when a second thread
    takes part, `call_seconds` what every kernel call takes.
    """

    source: str
    hertz: float
    products: tuple[tuple[str, float], ...]
    ports: tuple[tuple[int, Ports], ...]
    bandwidth: tuple[float, float, float, float]
    barrier_seconds: float
    call_seconds: float = 1e-7
    is_measured: bool = False

    def product(self, name: str) -> float:
        """Multiply-accumulates per cycle; of one that was not measured, the default."""
        return {**dict(_PRODUCTS), **dict(self.products)}[name]

    def of_bits(self, bits: int) -> Ports:
        return {**dict(_PORTS), **dict(self.ports)}[bits]

    def level_bandwidth(self, level: str) -> float:
        """Bytes per second of one of LEVELS."""
        return self.bandwidth[LEVELS.index(level)]

    def peak(self, name: str) -> float:
        """Multiply-accumulates per second of one core."""
        return self.product(name) * self.hertz


# Intel's server cores: multiply-adds and other arithmetic of 512 bits on two ports, shuffles on
# one of them, two loads and one store a cycle. Of 256 bits on three, two of them multiply.
_PORTS = (
    (256, Ports(0.5, 0.5, 1.0, 1.0, 0.0, 0.5, 0.33, 5.0)),
    (512, Ports(0.5, 0.5, 1.0, 1.0, 0.5, 0.5, 0.5, 10.0)),
)
_PRODUCTS = (
    ("f32.avx2", 16.0),
    ("f32.avx512", 32.0),
    ("u8s8.avx2", 24.0),  # vpmaddwd and vpaddd on three ports, 16 products to a pair
    ("u8s8.avx512vnni", 128.0),
    ("bf16.avx512bf16", 32.0),
    ("u8s8.amx", 1024.0),  # a tile of 16 rows by 16 columns by 64 bytes in 16 cycles
    ("bf16.amx", 512.0),
)
_GB = 1e9
_SERVER = Rates(
    "defaults of any server", 2.6 * _GB, _PRODUCTS, _PORTS, (280 * _GB, 110 * _GB, 25 * _GB,
    12 * _GB), 2e-6,
)  # fmt: skip
# AMD's Zen 4 does 512 bits as twice 256: multiply-adds on two pipes, shuffles on one of those and
# another, other arithmetic on all four. From `sparsec calibrate`, rounded.
_ZEN4 = Rates(
    "defaults of znver4",
    3.5 * _GB,
    (
        ("f32.avx2", 16.0),
        ("f32.avx512", 16.0),
        ("u8s8.avx2", 24.0),
        ("u8s8.avx512vnni", 64.0),
        ("bf16.avx512bf16", 32.0),
    ),
    (
        (256, Ports(0.5, 0.5, 1.0, 0.5, 0.2, 0.5, 0.2, 3.0)),
        (512, Ports(1.0, 1.0, 2.0, 1.0, 0.0, 1.0, 0.0, 6.0)),
    ),
    (220 * _GB, 110 * _GB, 80 * _GB, 22 * _GB),
    2e-6,
)
# Zen 5 (of servers) does 512 bits at once, two multiply-adds and two loads a cycle; other
# arithmetic has pipes of its own, and so has half of the shuffles. Likewise.
_ZEN5 = Rates(
    "defaults of znver5",
    4.1 * _GB,
    (
        ("f32.avx2", 16.0),
        ("f32.avx512", 32.0),
        ("u8s8.avx2", 28.0),
        ("u8s8.avx512vnni", 128.0),
        ("bf16.avx512bf16", 60.0),
    ),
    (
        (256, Ports(0.5, 0.5, 0.5, 0.5, 0.27, 0.5, 0.17, 2.5)),
        (512, Ports(0.5, 0.5, 1.0, 0.5, 0.23, 0.5, 0.15, 2.5)),
    ),
    (520 * _GB, 250 * _GB, 115 * _GB, 39 * _GB),
    3e-6,
)
# Intel's: clocks under sustained vector work, and read bandwidth of one core.
_INTEL = {
    name: replace(
        _SERVER,
        source=f"defaults of {name}",
        hertz=ghz * _GB,
        bandwidth=(bytes_l1 * ghz * _GB, bytes_l2 * ghz * _GB, l3 * _GB, dram * _GB),
    )
    for name, ghz, bytes_l1, bytes_l2, l3, dram in (
        ("sapphirerapids", 2.8, 128, 48, 29, 13),
        ("icelake-server", 2.6, 128, 48, 25, 12),
        ("skylake-avx512", 2.4, 128, 40, 20, 12),
        ("haswell", 2.6, 64, 25, 20, 10),
    )
}
_BY_TARGET: Mapping[str, Rates] = {"znver4": _ZEN4, "znver5": _ZEN5, **_INTEL}


_SAME_PRODUCTS = {"avx512vbmi2": "avx512vnni"}  # levels that multiply bytes as another does


def product_of(op: str, isa: str) -> str:
    """The name in `Rates.products` of what kernels of this op and instruction set multiply by."""
    if op in ("linear_int8", "attention_int8"):
        return f"u8s8.{_SAME_PRODUCTS.get(isa, isa)}"
    if isa == "amx" or "bf16" in isa:
        return f"bf16.{isa}"
    return "f32.avx2" if isa == "avx2" else "f32.avx512"


def default_rates(target: str) -> Rates:
    """Of the named target, or of any server: from the makers' manuals and measurements of peers.

    The order of candidates matters more than the seconds.
    """
    return _BY_TARGET.get(target, _SERVER)
