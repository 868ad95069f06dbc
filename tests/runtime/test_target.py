"""Targets by name and from the flags and caches that a system shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparsec import target
from sparsec.errors import InvalidInput, UnsupportedCpu
from sparsec.target import Isa, Target

AVX2 = "fpu sse2 avx f16c fma movbe popcnt abm bmi1 bmi2 avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"
VBMI2 = f"{AVX512} avx512_vnni avx512vbmi avx512_vbmi2"


def _machine(folder: Path, flags: str) -> tuple[Path, Path]:
    cpuinfo, caches = folder / "cpuinfo", folder / "cache"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Any\nflags\t\t: {flags}\n\nprocessor: 1\n")
    rows = [("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 2, "2048K")]
    for index, (kind, level, size) in enumerate(rows):
        entry = caches / f"index{index}"
        entry.mkdir(parents=True)
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (entry / name).write_text(f"{value}\n")
    return cpuinfo, caches


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        (AVX2, 1),
        (AVX512, 2),
        (f"{AVX512} avx512_vnni", 3),
        (f"{AVX512} avx512_vnni avx512_bf16", 3),
        (f"{AVX512} avx512_vnni avx512_vbmi2", 3),
        (VBMI2, 4),
        (f"{VBMI2} avx512_bf16", 5),
        (f"{VBMI2} avx512_bf16 amx_tile amx_int8 amx_bf16", 6),
        (f"{VBMI2} avx512_bf16 amx_tile amx_int8", 5),
        (f"{AVX512} avx512_vnni amx_tile amx_int8 amx_bf16", 3),
        (f"{AVX2} avx512f avx512_vnni amx_tile amx_int8", 1),  # a level needs the one below
    ],
)
def test_levels_come_from_flags(tmp_path: Path, flags: str, levels: int) -> None:
    target = Target.host(*_machine(tmp_path, flags))
    assert target.isas == tuple(Isa)[:levels]


@pytest.mark.parametrize(
    ("vendor", "flags", "name"),
    [
        ("AuthenticAMD", f"{VBMI2} avx512_bf16", "znver4"),
        ("AuthenticAMD", f"{VBMI2} avx512_bf16 avx_vnni", "znver5"),
        ("AuthenticAMD", AVX2, "any server"),
        ("GenuineIntel", f"{VBMI2} avx512_bf16", "sapphirerapids"),
        ("GenuineIntel", VBMI2, "icelake-server"),
        ("GenuineIntel", AVX512, "skylake-avx512"),
        ("", AVX2, "haswell"),
    ],
)
def test_rates_are_those_of_the_nearest_target(
    tmp_path: Path, vendor: str, flags: str, name: str
) -> None:
    cpuinfo, caches = _machine(tmp_path, flags)
    cpuinfo.write_text(f"vendor_id\t: {vendor}\n{cpuinfo.read_text()}")
    assert Target.host(cpuinfo, caches).rates.source == f"defaults of {name}"


def test_caches(tmp_path: Path) -> None:
    target = Target.host(*_machine(tmp_path, AVX2))
    assert (target.l1d_bytes, target.l2_bytes) == (48 << 10, 2 << 20)
    assert target.l3_bytes == 8 << 20  # not shown: the fall-back
    assert target.cores >= 1
    assert Target.host(caches=tmp_path / "none").l1d_bytes == 32 << 10


def test_a_machine_that_can_not_run_kernels(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCpu, match=r"this CPU lacks avx2, fma; .*haswell"):
        Target.host(*_machine(tmp_path, "sse2 movbe popcnt abm bmi1 bmi2 avx f16c"))
    with pytest.raises(UnsupportedCpu):
        Target.host(tmp_path / "none", tmp_path)


def test_named_targets() -> None:
    assert Target.named("native") == Target.host()
    highest = {
        "sapphirerapids": Isa.AMX,
        "emeraldrapids": Isa.AMX,
        "graniterapids": Isa.AMX,
        "znver4": Isa.AVX512_BF16,
        "znver5": Isa.AVX512_BF16,
        "cooperlake": Isa.AVX512_VNNI,
        "cascadelake": Isa.AVX512_VNNI,
        "icelake-server": Isa.AVX512_VBMI2,
        "skylake-avx512": Isa.AVX512,
        "haswell": Isa.AVX2,
        "avx2": Isa.AVX2,
    }
    for name, isa in highest.items():
        target = Target.named(name)
        assert target.name == name
        assert target.isas[-1] is isa
        assert target.isas == tuple(Isa)[: len(target.isas)]
    with pytest.raises(InvalidInput, match=r"unknown target 'x'; known targets are native, sapph"):
        Target.named("x")


def test_a_list_is_best_first() -> None:
    found = Target.listed("avx2, sapphirerapids ,skylake-avx512")
    assert [t.name for t in found] == ["sapphirerapids", "skylake-avx512", "avx2"]
    assert Target.listed("haswell") == (Target.named("haswell"),)


def test_a_core_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs 0 and 4 share a core, as do 6 and 7; of 9 the system does not say."""
    for cpu, siblings in {0: "0,4", 4: "0,4", 6: "6-7", 7: "6-7"}.items():
        (tmp_path / f"cpu{cpu}").write_text(f"{siblings}\n")
    monkeypatch.setattr(target, "_SIBLINGS", f"{tmp_path}/cpu{{}}")
    for allowed, cpus in ({0, 4, 6, 7, 9}, [0, 6, 9]), ({4, 7}, [4, 7]):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed)
        assert target.core_cpus() == cpus
