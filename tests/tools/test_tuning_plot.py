"""`sparsec log plot`: the numbers that are drawn, and the file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sparsec.cli import main
from sparsec.ir.schedule import Schedule, Workload
from sparsec.rates import default_rates
from sparsec.tools.tuning_plot import courses, roofline_seconds
from sparsec.tuning.log import append
from sparsec.tuning.record import Machine, Outcome, TuningRecord

MACHINE = Machine("GenuineIntel 6-106-6", ("avx2", "avx512", "avx512vnni"), 4, 49152, 1 << 20,
                  1 << 24)  # fmt: skip
WORK = Workload("linear_int8", (("m", 768), ("k", 3072)), "u8s8", "bsr16x1", "none u8", 0.25)
RATES = default_rates("")


def record(rows: int, seconds: float, **changes: object) -> TuningRecord:
    schedule = Schedule("int8_gemm", "avx512vnni", (("rows", rows),))
    base = TuningRecord(WORK, 128, 1, MACHINE, schedule, "r", (), seconds=(seconds,),
                        baseline_seconds=(1e-3,))  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def test_the_best_so_far_starts_at_the_heuristic_and_never_rises() -> None:
    other = replace(WORK, layout="dense", density=1.0)
    crash = replace(record(3, 1.0), outcome=Outcome.CRASHED)
    found = courses([record(1, 2e-3), record(2, 5e-4), record(9, 8e-4, workload=other), crash,
                     record(4, 6e-4)])  # fmt: skip
    assert list(found.values()) == [[1.0, 1.0, 0.5, 0.5, 0.5], [1.0, 0.8]]


def test_the_roofline_of_arithmetic_and_of_bytes() -> None:
    macs = 768 * 3072 * 0.25
    many = roofline_seconds(record(1, 1e-3), RATES)
    assert many == pytest.approx(128 * macs / RATES.peak("u8s8.avx512vnni"))
    one = record(1, 1e-3, tokens=1, threads=2)
    assert roofline_seconds(one, RATES) == pytest.approx(macs / RATES.level_bandwidth("l3") / 2)
    small = replace(one, machine=replace(MACHINE, l3_bytes=1 << 18))
    assert roofline_seconds(small, RATES) == pytest.approx(
        macs / RATES.level_bandwidth("dram") / 2
    )
    norm = replace(one, workload=Workload("layer_norm", (("c", 768),), "f32"))
    assert roofline_seconds(norm, RATES) is None


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (the extra `plot`) is not installed")
    log, output = tmp_path / "t.jsonl", tmp_path / f"plot{suffix}"
    norm = Workload("layer_norm", (("c", 768),), "f32")
    append(log, [record(1, 8e-4), record(2, 5e-4), record(3, 7e-4, workload=norm)])
    assert main(["log", "plot", str(log), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    start = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml"}[suffix]
    assert output.read_bytes().startswith(start)
    assert output.stat().st_size > 5000


def test_what_cannot_be_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "t.jsonl"
    log.touch()
    picture = tmp_path / "p.png"
    assert main(["log", "plot", str(log), "-o", str(tmp_path / "p.bmp")]) == 2
    assert "p.bmp: wanted a name that ends in .png" in capsys.readouterr().err
    assert main(["log", "plot", str(log), "-o", str(picture)]) == 2
    assert "no successful trial" in capsys.readouterr().err
    append(log, [record(1, 8e-4)])
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["log", "plot", str(log), "-o", str(picture)]) == 2
    assert "pip install 'sparsec[plot]'" in capsys.readouterr().err
    assert not picture.exists()
