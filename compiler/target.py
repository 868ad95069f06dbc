"""The machine to compile for: instruction sets, cores and caches.

Instruction sets are read from cpuid flags, never from the CPU's name: guests report wrong names.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from sparsec.errors import InvalidInput, UnsupportedCpu
from sparsec.rates import Rates, default_rates


class Isa(enum.Enum):
    """An instruction-set level; the value is its name in options, kernel names and the ABI."""

    AVX2 = "avx2"
    AVX512 = "avx512"
    AVX512_VNNI = "avx512vnni"
    AVX512_VBMI2 = "avx512vbmi2"
    AVX512_BF16 = "avx512bf16"
    AMX = "amx"

    @property
    def rank(self) -> int:
        """A number that is greater the better the level."""
        return LEVELS.index(self.value)

    @staticmethod
    def named(name: str) -> Isa:
        """Raises InvalidInput for what is no level."""
        if name not in LEVELS:
            raise InvalidInput(f"unknown level {name!r}; levels are {', '.join(LEVELS)}")
        return Isa(name)


LEVELS = tuple(isa.value for isa in Isa)

# Flags of /proc/cpuinfo that each level adds to the one before; the runtime's cpu_check.c has the
# same table. A CPU has a level when it has all below it too: levels are a line, so that one name
# says what a library needs. Cooper Lake, alone in having BF16 without VBMI2, is AVX512_VNNI.
_FLAGS: dict[Isa, frozenset[str]] = {
    Isa.AVX2: frozenset({"avx", "f16c", "fma", "movbe", "popcnt", "abm", "bmi1", "bmi2", "avx2"}),
    Isa.AVX512: frozenset({"avx512f", "avx512dq", "avx512bw", "avx512vl"}),
    Isa.AVX512_VNNI: frozenset({"avx512_vnni"}),
    Isa.AVX512_VBMI2: frozenset({"avx512vbmi", "avx512_vbmi2"}),
    Isa.AVX512_BF16: frozenset({"avx512_bf16"}),
    Isa.AMX: frozenset({"amx_tile", "amx_int8", "amx_bf16"}),
}

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_KB = 1024
_MB = 1024 * _KB
# Where the system does not say: the smallest caches of the CPUs in the table below.
_DEFAULT_CACHES = {"1": 32 * _KB, "2": 256 * _KB, "3": 8 * _MB}
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux: arch_prctl(2)


@dataclass(frozen=True, slots=True)
class Target:
    """A machine. `isas` are the levels it has, weakest first; `rates` order its schedules."""

    name: str
    isas: tuple[Isa, ...]
    cores: int
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    rates: Rates = field(default=default_rates(""), repr=False)

    def has(self, isa: Isa) -> bool:
        return isa in self.isas

    def limited(self, isa: Isa | None) -> Target:
        """Without what is better than `isa`."""
        if isa is None:
            return self
        return replace(self, isas=tuple(i for i in self.isas if i.rank <= isa.rank))

    def level_of(self, nbytes: float) -> str:
        """The smallest of `rates.LEVELS` of which half holds so much: other data is there too."""
        sizes = (("l1", self.l1d_bytes), ("l2", self.l2_bytes), ("l3", self.l3_bytes))
        return next((level for level, size in sizes if nbytes <= size / 2), "dram")

    @property
    def level(self) -> Isa:
        """The best of its levels."""
        return self.isas[-1]

    @staticmethod
    def host(cpuinfo: Path = _CPUINFO, caches: Path = _CACHES) -> Target:
        """The machine this runs on; raises UnsupportedCpu when it has no level at all."""
        flags = cpu_flags(cpuinfo)
        isas = _levels(flags)
        if not isas:
            lacking = sorted(_FLAGS[Isa.AVX2] - flags)
            raise UnsupportedCpu(
                f"this CPU lacks {', '.join(lacking)}; name the machine to compile for: "
                f"{', '.join(_NAMED)}"
            )
        sizes = _read_caches(caches)
        cores = len(core_cpus())
        rates = default_rates(_kin(cpu_fields(cpuinfo).get("vendor_id", ""), isas[-1], flags))
        return Target("native", isas, cores, sizes["1"], sizes["2"], sizes["3"], rates)

    @staticmethod
    def named(name: str) -> Target:
        """A target of the table below, or the host for "native"."""
        if name == "native":
            return Target.host()
        if name not in _NAMED:
            known = ", ".join(["native", *_NAMED])
            raise InvalidInput(f"unknown target {name!r}; known targets are {known}")
        return _NAMED[name]

    @staticmethod
    def listed(names: str) -> tuple[Target, ...]:
        """The targets of a list with commas, best first: one library is made for all of them.

        When it is loaded the levels of the machine choose, so no two targets may have the same.
        """
        by_level: dict[Isa, Target] = {}
        for name in (part.strip() for part in names.split(",")):
            target = Target.named(name)
            other = by_level.get(target.level)
            if other is not None:
                twice = f"{name} twice" if other.name == name else f"{other.name} and {name}"
                raise InvalidInput(
                    f"targets {names}: wanted different instruction sets, got {twice}, "
                    f"which are both {target.level.value}; keep one"
                )
            by_level[target.level] = target
        return tuple(by_level[level] for level in reversed(Isa) if level in by_level)


def core_cpus() -> list[int]:
    """One CPU of every core that this process may use, in order."""
    found: dict[int, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        found.setdefault(_first_sibling(cpu), cpu)
    return list(found.values())


def _first_sibling(cpu: int) -> int:
    """The lowest CPU of the same core; `cpu` itself where the system does not say."""
    try:
        text = Path(_SIBLINGS.format(cpu)).read_text()  # "3,67" or "6-7"
    except OSError:
        return cpu
    return int(text.replace("-", ",").split(",")[0])


def may_use_tiles() -> bool:
    """Asks Linux for the tile registers of AMX, for all threads and children of this process;
    False where it refuses. Without it a kernel for AMX ends the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0


def required_flags(isa: Isa) -> frozenset[str]:
    """All flags of /proc/cpuinfo that a level and the ones below it need."""
    return frozenset().union(*(_FLAGS[i] for i in Isa if i.rank <= isa.rank))


def cpu_fields(cpuinfo: Path = _CPUINFO) -> dict[str, str]:
    """What the system says of its first CPU, by the names of /proc/cpuinfo."""
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as file:
            # Up to the first blank line: of a hundred CPUs Linux takes long to write the rest.
            pairs = [line.partition(":") for line in itertools.takewhile(str.strip, file)]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """What the system says that its first CPU can do."""
    return frozenset(cpu_fields(cpuinfo).get("flags", "").split())


def _levels(flags: frozenset[str]) -> tuple[Isa, ...]:
    """All levels up to the first of which a flag is lacking."""
    levels: list[Isa] = []
    for isa, wanted in _FLAGS.items():
        if not wanted <= flags:
            break
        levels.append(isa)
    return tuple(levels)


def _read_caches(folder: Path) -> dict[str, int]:
    """Bytes of the data or unified cache by level."""
    sizes = dict(_DEFAULT_CACHES)
    for index in sorted(folder.glob("index*")):
        try:
            kind, level, size = (
                (index / name).read_text(encoding="ascii").strip()
                for name in ("type", "level", "size")
            )
        except OSError:
            continue
        match = re.fullmatch(r"(\d+)K", size)
        if kind != "Instruction" and level in sizes and match:
            sizes[level] = int(match[1]) * _KB
    return sizes


def _kin(vendor: str, level: Isa, flags: frozenset[str]) -> str:
    """The named target whose instructions take the time that those of such a machine do."""
    if vendor != "AuthenticAMD":
        return _KIN[level]
    if level is Isa.AVX2:
        return "avx2"
    return "znver5" if "avx_vnni" in flags else "znver4"  # the first that has it


def _server(
    name: str, highest: Isa, l1d: int, l2: int, l3: int, *, kin: str | None = None
) -> Target:
    """`kin` is the target whose instructions take the time that those of this one do."""
    isas = tuple(i for i in Isa if i.rank <= highest.rank)
    return Target(name, isas, 8, l1d, l2, l3, default_rates(kin or name))


# Intel's: guests of a Sapphire Rapids may lack AMX.
_KIN = {
    Isa.AVX2: "haswell",
    Isa.AVX512: "skylake-avx512",
    Isa.AVX512_VNNI: "skylake-avx512",
    Isa.AVX512_VBMI2: "icelake-server",
    Isa.AVX512_BF16: "sapphirerapids",
    Isa.AMX: "sapphirerapids",
}

# Caches per core and, for L3, of the smallest part that is common in servers.
_NAMED: dict[str, Target] = {
    t.name: t
    for t in (
        _server("sapphirerapids", Isa.AMX, 48 * _KB, 2 * _MB, 30 * _MB),
        _server("emeraldrapids", Isa.AMX, 48 * _KB, 2 * _MB, 36 * _MB, kin="sapphirerapids"),
        _server("graniterapids", Isa.AMX, 48 * _KB, 2 * _MB, 48 * _MB, kin="sapphirerapids"),
        _server("znver4", Isa.AVX512_BF16, 32 * _KB, 1 * _MB, 32 * _MB),
        _server("znver5", Isa.AVX512_BF16, 48 * _KB, 1 * _MB, 32 * _MB),
        _server("cooperlake", Isa.AVX512_VNNI, 32 * _KB, 1 * _MB, 24 * _MB, kin="skylake-avx512"),
        _server("cascadelake", Isa.AVX512_VNNI, 32 * _KB, 1 * _MB, 16 * _MB, kin="skylake-avx512"),
        _server("icelake-server", Isa.AVX512_VBMI2, 48 * _KB, 1280 * _KB, 24 * _MB),
        _server("skylake-avx512", Isa.AVX512, 32 * _KB, 1 * _MB, 16 * _MB),
        _server("haswell", Isa.AVX2, 32 * _KB, 256 * _KB, 20 * _MB),
        _server("avx2", Isa.AVX2, 32 * _KB, 256 * _KB, 8 * _MB),
    )
}
