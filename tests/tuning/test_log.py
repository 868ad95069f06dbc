"""The tuning log: what is written is read again, whatever happened to the file in between."""

from __future__ import annotations

import json
import multiprocessing
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from sparsec.errors import InvalidInput
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Target, cpu_fields
from sparsec.tuning.log import BrokenLine, Query, TuningLog, append
from sparsec.tuning.log_files import best, merge, prune, write
from sparsec.tuning.record import Machine, Outcome, TuningRecord, cpu_numbers

VNNI = Machine(
    "GenuineIntel 6-106-6", ("avx2", "avx512", "avx512vnni"), 4, 49152, 1 << 20, 1 << 24
)
AMX = replace(VNNI, cpu="GenuineIntel 6-143-8", isas=(*VNNI.isas, "amx"))
WORKLOAD = Workload("linear_int8", (("m", 768), ("k", 3072)), "u8s8", "bsr16x1", "none u8", 0.2)
QUERY = Query(WORKLOAD, 128, 1, VNNI, "r1")


def record(rows: int = 16, seconds: float = 1e-3, **changes: object) -> TuningRecord:
    schedule = Schedule("int8_gemm", "avx512vnni", (("rows", rows), ("group", 4)))
    base = TuningRecord(
        WORKLOAD, 128, 1, VNNI, schedule, "r1", (("sparsec", "1"),), Outcome.OK,
        (seconds, seconds * 1.1, seconds * 3), (1e-3, 1e-3),
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def append_many(path: Path, rows: int) -> None:
    for _ in range(50):
        append(path, [record(rows), record(rows)])


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"
    records = [record(4), record(8, outcome=Outcome.CRASHED, note='a "quote"')]
    append(path, records[:1])
    append(path, records[1:])
    log = TuningLog.read(path)
    assert log.records == records
    assert not log.broken


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ('{"format": 99}', "format 99, wanted 1"),
        ('{"format": 1}', "no field 'workload'"),
        (record().to_json().replace('"tokens":128', '"tokens":[]'), "a field of a wrong type"),
        (record().to_json().replace('"outcome":"ok"', '"outcome":"x"'), "'x' is not a valid"),
        (record(seconds=0.0).to_json(), "times that are not positive"),
        (record().to_json()[:-40], "no JSON"),
        ("[" * 200_000, "nested too deeply"),
        (record().to_json().replace('"tokens":128', '"tokens":0'), "0 tokens"),
        (record().to_json().replace('"tokens":128', '"tokens":Infinity'), "of a wrong type"),
        (record().to_json().replace('"density":0.2', '"density":NaN'), "a density of nan"),
        (record().to_json().replace('"isa":"avx512vnni"', '"isa":"avx9"'), "set 'avx9', wanted"),
    ],
)  # fmt: skip
def test_a_broken_line_is_skipped_and_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "tuning.jsonl"
    path.write_text(f"{record(4).to_json()}\n{line}\n\n{record(8).to_json()}\n")
    log = TuningLog.read(path)
    assert log.records == [record(4), record(8)]
    assert [(b.number, reason in b.reason) for b in log.broken] == [(2, True)]
    assert str(log.broken[0]).startswith(f"{path}:2: ")


def test_bytes_that_are_no_text_break_one_line_only(tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"
    path.write_bytes(b"\xff\xfe\x00\n" + record(4).to_json().encode() + b"\n")
    log = TuningLog.read(path)
    assert (log.records, len(log.broken)) == ([record(4)], 1)


def test_a_cut_line_does_not_harm_the_next(tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"
    path.write_text(record(4).to_json()[:50])
    append(path, [record(8)])
    log = TuningLog.read(path)
    assert log.records == [record(8)]
    assert isinstance(log.broken[0], BrokenLine)


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=append_many, args=(path, rows)) for rows in (4, 8, 16)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    log = TuningLog.read(path)
    assert not log.broken
    assert len(log.records) == 300
    assert {r: log.records.count(record(r)) for r in (4, 8, 16)} == {4: 100, 8: 100, 16: 100}


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"
    append(path, [record(4)])
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, old[1]))
    try:
        with pytest.raises(InvalidInput, match="cannot be written"):
            append(path, [record(8)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes() == before


def test_what_cannot_be_read_or_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        TuningLog.read(tmp_path / "missing.jsonl")
    with pytest.raises(InvalidInput, match="cannot be written"):
        append(tmp_path / "no" / "log.jsonl", [record()])


def test_the_fastest_exact_record_wins() -> None:
    log = TuningLog([record(4, 3e-3), record(8, 1e-3), record(16, 2e-3)])
    found = log.lookup(QUERY)
    assert found is not None
    assert (found.param("rows"), found.source) == (8, "log exact")


def test_records_compare_by_their_ratio_to_the_heuristic() -> None:
    """A slow day: twice the time, for the heuristic too."""
    slow_day = record(8, 1.6e-3, baseline_seconds=(2e-3, 2e-3))
    found = TuningLog([record(4, 1e-3), slow_day]).lookup(QUERY)
    assert found is not None
    assert found.param("rows") == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"revision": "r0"},
        {"outcome": Outcome.WRONG},
        {"machine": AMX},
        {"workload": replace(WORKLOAD, layout="bsr32x1")},
        {"workload": replace(WORKLOAD, sizes=(("m", 768), ("k", 768)))},
        {"workload": replace(WORKLOAD, density=0.5)},
        {"tokens": 1024},
        {"schedule": Schedule("int8_gemm", "amx", (("rows", 16),))},
    ],
)
def test_what_does_not_apply_is_not_used(changes: dict[str, object]) -> None:
    assert TuningLog([record(**changes)]).lookup(QUERY) is None


@pytest.mark.parametrize(
    ("near", "far", "source"),
    [
        ({"tokens": 64}, {"tokens": 384}, "(64 tokens)"),
        ({"tokens": 256}, {"machine": replace(VNNI, cpu="x"), "tokens": 64}, "(256 tokens)"),
        ({"workload": replace(WORKLOAD, density=0.25)},
         {"workload": replace(WORKLOAD, density=0.28)}, "(density 0.25)"),
        ({"threads": 2}, {"tokens": 64, "threads": 2}, "(2 threads)"),
        ({"workload": replace(WORKLOAD, epilogue="gelu u8")}, {"tokens": 64}, "(gelu u8)"),
        ({"machine": replace(VNNI, cpu="other")}, {"tokens": 384}, "(other)"),
    ],
)  # fmt: skip
def test_the_nearest_record_helps_out(
    near: dict[str, object], far: dict[str, object], source: str
) -> None:
    found = TuningLog([record(4, **far), record(8, 2e-3, **near)]).lookup(QUERY)
    assert found is not None
    assert (found.param("rows"), found.source) == (8, f"log nearest {source}")


def test_bf16_makes_no_difference_to_int8() -> None:
    zen = replace(VNNI, cpu="AuthenticAMD 25-17-1", isas=(*VNNI.isas, "avx512bf16"))
    found = TuningLog([record(8, machine=zen)]).lookup(QUERY)
    assert found is not None
    assert found.source == "log nearest (AuthenticAMD 25-17-1)"
    floats = replace(WORKLOAD, dtype="bf16")
    assert TuningLog([record(8, machine=zen, workload=floats)]).lookup(
        replace(QUERY, workload=floats)
    ) is None  # fmt: skip


def test_a_schedule_that_is_not_allowed_gives_way_to_the_next() -> None:
    log = TuningLog([record(4, 1e-3), record(8, 2e-3)])
    found = log.lookup(QUERY, allowed=lambda schedule: schedule.param("rows") != 4)
    assert found is not None
    assert found.param("rows") == 8


def test_failed_trials_are_known_until_the_kernel_changes() -> None:
    log = TuningLog([record(4, outcome=Outcome.CRASHED), record(8), record(16, revision="r0")])
    assert [r.schedule.param("rows") for r in log.exact(QUERY, failures=True)] == [4, 8]
    assert [r.schedule.param("rows") for r in log.exact(QUERY)] == [8]


def test_one_lucky_trial_is_outvoted() -> None:
    log = TuningLog([record(4, 1e-4), record(4, 3e-3), record(4, 3e-3), record(8, 1e-3)])
    assert log.ranking(QUERY) == [record(8).schedule, record(4).schedule]
    found = log.best(QUERY)
    assert found is not None
    assert found[0].param("rows") == 8


def test_merge_keeps_each_record_once() -> None:
    assert merge([TuningLog([record(4), record(8)]), TuningLog([record(8), record(16)])]) == [
        record(4), record(8), record(16),
    ]  # fmt: skip


def test_prune_keeps_the_fastest_that_are_not_stale(tmp_path: Path) -> None:
    records = [
        record(4, 3e-3), record(8, 1e-3), record(16, 2e-3), record(32, 1e-4, revision="r0"),
        record(64, outcome=Outcome.TIMED_OUT), record(4, 9e-3, tokens=64),
    ]  # fmt: skip
    kept = prune(records, lambda op: "r1", keep=2)
    assert kept == [record(8, 1e-3), record(16, 2e-3), record(4, 9e-3, tokens=64)]
    assert best(records) == [record(32, 1e-4, revision="r0"), record(4, 9e-3, tokens=64)]
    assert write(tmp_path / "log.jsonl", lambda: kept) == 3
    assert TuningLog.read(tmp_path / "log.jsonl").records == kept
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_what_is_appended_while_a_log_is_rewritten_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"
    append(path, [record(4)])
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=append_many, args=(path, rows)) for rows in (8, 16)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        write(path, lambda: TuningLog.read(path).records)
    for writer in writers:
        writer.join()
    log = TuningLog.read(path)
    assert {r: log.records.count(record(r)) for r in (4, 8, 16)} == {4: 1, 8: 100, 16: 100}


def test_a_link_to_a_log_stays_one(tmp_path: Path) -> None:
    path, link = tmp_path / "tuning.jsonl", tmp_path / "link.jsonl"
    append(path, [record(4), record(8)])
    link.symlink_to(path)
    write(link, lambda: [record(8)])
    assert link.is_symlink()
    assert TuningLog.read(path).records == [record(8)]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is a folder"):
        write(tmp_path, list)
    for path in (tmp_path, Path("/dev/full")):
        with pytest.raises(InvalidInput, match="no plain file"):
            TuningLog.read(path)


def test_a_machine_is_named_by_its_numbers(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n"
        "model name\t: Some Name\nstepping\t: 8\n"
    )
    assert cpu_numbers(cpu_fields(cpuinfo)) == "GenuineIntel 6-143-8"
    assert cpu_numbers(cpu_fields(tmp_path / "none")) == "unknown"
    assert Machine.of(Target.named("icelake-server")).cpu == "icelake-server"
    assert json.loads(record().to_json())["machine"]["isas"][-1] == "avx512vnni"
