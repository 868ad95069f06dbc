"""Kernels that do one thing over and over: what `sparsec calibrate` measures a machine with.

Each item of a probe is one round of independent chains, as many as hide the latency, or one pass
over a buffer. A chain is carried from item to item, so that nothing can be left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import AVX512_BF16, FEATURES, VECTOR_ISAS, amx, bf16
from sparsec.codegen.isa.int8 import AVX2_INT8, AVX512_VNNI, Int8Isa
from sparsec.codegen.isa.vector import VectorIsa, keep, ramp, splat
from sparsec.codegen.kernels.panels import loop, mod
from sparsec.codegen.program import Kernel, Kind, Parameter
from sparsec.target import Isa

CHAINS = 12
SMALL = 32  # vectors that loads and stores go round: they stay in L1
XORSHIFT_CYCLES = 6  # three shifts and three exclusive ors, each waiting for the one before
TILE_SUMS = amx.TILE_REGISTERS - 2

Body = Callable[["Probe", tir.KernelScope], None]


@dataclass(frozen=True, slots=True)
class Probe:
    """`work` is what an item does: instructions, multiply-accumulates or cycles."""

    kind: str
    isa: str
    lanes: int
    work: float
    body: Body
    extra: tuple[str, ...] = ()  # LLVM features beyond those of the level

    @property
    def name(self) -> str:
        return f"probe_{self.kind}_{self.isa}".replace(".", "_")

    @property
    def features(self) -> tuple[str, ...]:
        return (*FEATURES[Isa(self.isa)], *self.extra)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """`x` is memory to read, `y` to write; `count` vectors are read in a pass."""
        return (Parameter("x"), Parameter("y"), Parameter("count", Kind.INT))

    @property
    def has_scratch(self) -> bool:
        return False

    def build(self) -> Any:
        return tir.kernel_function(self.name, self.parameters, lambda s: self.body(self, s))


def _chains(
    p: Probe, s: tir.KernelScope, step: Callable[[int, Any], Any], dtype: str = "float32"
) -> None:
    """`step(i, value)` is the next value of chain i."""
    n, at = p.lanes, ramp(0, p.lanes)
    parts = [tir.registers(dtype, n) for _ in range(CHAINS)]
    for i, part in enumerate(parts):
        T.buffer_store(part, _as(dtype, n, s["x"][ramp(i * n, n)]), [at])
    with loop(s.begin, s.end):
        for i, part in enumerate(parts):
            T.buffer_store(part, step(i, part[at]), [at])
    for i, part in enumerate(parts):
        T.buffer_store(s["y"], _as("float32", n, part[at]), [ramp(i * n, n)])


def _as(dtype: str, lanes: int, value: Any) -> Any:
    return T.reinterpret(f"{dtype}x{lanes}", value)


def _constant(p: Probe, s: tir.KernelScope) -> Any:
    return keep(splat(s["x"][0], p.lanes))


def _multiply(p: Probe, s: tir.KernelScope) -> None:
    factor = _constant(p, s)
    _chains(p, s, lambda i, value: value * factor + factor)


def _other(p: Probe, s: tir.KernelScope) -> None:
    term = _constant(p, s)
    _chains(p, s, lambda i, value: value + term)


def _divide(p: Probe, s: tir.KernelScope) -> None:
    term = _constant(p, s)
    _chains(p, s, lambda i, value: term / value)


def _shuffled(p: Probe, value: Any, mask: Any) -> Any:
    name = {8: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.avx512.pshuf.b.512"}[p.lanes]
    type = f"uint8x{4 * p.lanes}"
    found = T.call_llvm_pure_intrin(type, name, T.reinterpret(type, value), mask)
    return _as("float32", p.lanes, found)


def _mask(p: Probe, s: tir.KernelScope) -> Any:
    """Of bytes, from memory: a constant shuffle after another would be folded into one."""
    return keep(T.reinterpret(f"uint8x{4 * p.lanes}", s["x"][ramp(0, p.lanes)]))


def _shuffle(p: Probe, s: tir.KernelScope) -> None:
    mask = _mask(p, s)
    _chains(p, s, lambda i, value: _shuffled(p, value, mask))


def _shuffle_beside(p: Probe, s: tir.KernelScope) -> None:
    factor, mask = _constant(p, s), _mask(p, s)
    _chains(
        p, s,
        lambda i, value: _shuffled(p, value, mask) if i % 4 == 3 else value * factor + factor,
    )  # fmt: skip


def _other_beside(p: Probe, s: tir.KernelScope) -> None:
    factor = _constant(p, s)
    _chains(p, s, lambda i, value: value + factor if i % 4 == 3 else value * factor + factor)


def _load(p: Probe, s: tir.KernelScope) -> None:
    n = p.lanes

    def step(i: int, value: Any) -> Any:
        return value + s["x"][ramp(start[0] + i * n, n)]

    start = [T.int64(0)]
    _round_trip(p, s, step, start)


def _broadcast(p: Probe, s: tir.KernelScope) -> None:
    start = [T.int64(0)]
    _round_trip(p, s, lambda i, value: value + splat(s["x"][start[0] + i], p.lanes), start)


def _round_trip(
    p: Probe, s: tir.KernelScope, step: Callable[[int, Any], Any], start: list[Any]
) -> None:
    """Chains whose operands come from a place in memory that moves with the items."""
    n, at = p.lanes, ramp(0, p.lanes)
    parts = [tir.registers("float32", n) for _ in range(CHAINS)]
    for part in parts:
        T.buffer_store(part, splat(0.0, n), [at])
    with loop(s.begin, s.end) as item:
        start[0] = keep(mod(item, SMALL) * n)
        for i, part in enumerate(parts):
            T.buffer_store(part, step(i, part[at]), [at])
    for i, part in enumerate(parts):
        T.buffer_store(s["y"], part[at], [ramp(i * n, n)])


def _store(p: Probe, s: tir.KernelScope) -> None:
    n, value = p.lanes, _constant(p, s)
    with loop(s.begin, s.end) as item:
        start = keep(mod(item, SMALL) * n)
        for i in range(CHAINS):
            T.buffer_store(s["y"], value, [ramp(start + i * n, n)])


def _read(p: Probe, s: tir.KernelScope) -> None:
    """Every item reads `count` vectors in a row, a multiple of CHAINS."""
    n, at = p.lanes, ramp(0, p.lanes)
    parts = [tir.registers("float32", n) for _ in range(CHAINS)]
    for part in parts:
        T.buffer_store(part, splat(0.0, n), [at])
    with loop(s.begin, s.end), loop(0, s["count"] // CHAINS) as i:
        for j, part in enumerate(parts):
            where = ramp((i * CHAINS + j) * n, n)
            T.buffer_store(part, part[at] + s["x"][where], [at])
    for i, part in enumerate(parts):
        T.buffer_store(s["y"], part[at], [ramp(i * n, n)])


def _cycles(p: Probe, s: tir.KernelScope) -> None:
    """xorshift64: six instructions of one cycle, each waiting for the one before."""
    state = tir.registers("uint64", 1)
    T.buffer_store(state, tirx.const(88172645463325252, "uint64"), [0])
    with loop(s.begin, s.end):
        for left, bits in ((True, 13), (False, 7), (True, 17)):
            shift = T.shift_left if left else T.shift_right
            moved = shift(state[0], tirx.const(bits, "uint64"))
            T.buffer_store(state, T.bitwise_xor(state[0], moved), [0])
    T.buffer_store(s["y"], T.cast(state[0], "float32"), [0])


def _dots(hooks: Int8Isa) -> Body:
    def body(p: Probe, s: tir.KernelScope) -> None:
        n, count = p.lanes, hooks.words_per_quad
        words = tuple(
            keep(T.broadcast(T.reinterpret("int32", s["x"][i]), n)) for i in range(count)
        )

        def step(i: int, value: Any) -> Any:
            own = (T.reinterpret(f"uint8x{4 * n}", value),) * count
            return hooks.dot(value, own, words)

        _chains(p, s, step, "int32")

    return body


def _tiles(product: amx.Product) -> Body:
    """Six independent sums of tiles; `x` starts with the tile configuration."""

    def body(p: Probe, s: tir.KernelScope) -> None:
        amx.configure(s["x"])
        with loop(s.begin, s.end):
            for i in range(TILE_SUMS):
                amx.multiply(i, TILE_SUMS, TILE_SUMS + 1, product)
        amx.release()

    return body


def _pairs(p: Probe, s: tir.KernelScope) -> None:
    words = keep(T.reinterpret(f"int32x{p.lanes}", s["x"][ramp(0, p.lanes)]))
    _chains(p, s, lambda i, value: bf16.dot(value, words, words))


_PORT_PROBES: tuple[tuple[str, Body], ...] = (
    ("multiply", _multiply),
    ("shuffle", _shuffle),
    ("shuffle_beside", _shuffle_beside),
    ("other", _other),
    ("other_beside", _other_beside),
    ("divide", _divide),
    ("load", _load),
    ("broadcast", _broadcast),
    ("store", _store),
    ("read", _read),
)


def port_probes(vector: VectorIsa) -> list[Probe]:
    """One per kind of instruction; the work of an item is CHAINS instructions."""
    return [Probe(kind, vector.name, vector.lanes, CHAINS, body) for kind, body in _PORT_PROBES]


def product_probes(flags: frozenset[str]) -> dict[str, Probe]:
    """By the names of `Rates.products`; work is in multiply-accumulates. `flags` of the CPU."""
    found = {f"f32.{v.name}": Probe("f32", v.name, v.lanes, CHAINS * v.lanes, _multiply)
             for v in VECTOR_ISAS}  # fmt: skip
    for h in (AVX2_INT8, AVX512_VNNI):
        found[f"u8s8.{h.name}"] = Probe("u8s8", h.name, h.lanes, CHAINS * 4 * h.lanes, _dots(h))
    lanes = AVX512_BF16.lanes
    probe = Probe("bf16", AVX512_BF16.name, lanes, CHAINS * 2 * lanes, _pairs)
    found["bf16.avx512bf16"] = probe
    tile_macs = TILE_SUMS * amx.ROWS * amx.ROWS  # per byte or pair of bytes of a row
    if {"amx_tile", "amx_int8"} <= flags:
        found["u8s8.amx"] = _tile_probe("u8s8_amx", tile_macs * 64, amx.Product.S8_U8)
    if {"amx_tile", "amx_bf16"} <= flags:
        found["bf16.amx"] = _tile_probe("bf16_amx", tile_macs * 32, amx.Product.BF16)
    return found


def _tile_probe(kind: str, work: float, product: amx.Product) -> Probe:
    return Probe(kind, "avx512", 16, work, _tiles(product), amx.AMX_FEATURES)


def cycle_probe() -> Probe:
    """Its work is in cycles."""
    return Probe("cycles", "avx2", 8, XORSHIFT_CYCLES, _cycles)


@dataclass(frozen=True, slots=True)
class Nothing:
    """A kernel that does nothing: what a call and a barrier cost."""

    name: str = "probe_nothing_avx2"
    isa: str = Isa.AVX2.value
    has_scratch: bool = False

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("y"),)

    def build(self) -> Any:
        return tir.kernel_function(self.name, self.parameters, lambda s: None)


NOTHING: Kernel = Nothing()
