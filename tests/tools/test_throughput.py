"""The search for the best throughput under a latency limit, with engines that are formulas."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsec.errors import InvalidInput
from sparsec.runtime.loader import Port
from sparsec.tools import throughput as tool
from sparsec.tools.inputs import Arrays
from sparsec.tools.instances import (
    EngineFailed,
    Measurement,
    Places,
    Setup,
    Windows,
    measurement,
    places_of,
    run_together,
)
from sparsec.tools.throughput import Space, confirm, print_throughput, search
from sparsec.tools.turns import MIN_CALLS

Pair = tuple[int, int]


class Machine:
    """Calls take 1 ms and `per_sample_ms` for each sample; keeps what was asked of it."""

    def __init__(self, per_sample_ms: float) -> None:
        self.per_sample_ms = per_sample_ms
        self.asked: list[tuple[str, Setup]] = []

    def call_ms(self, setup: Setup) -> float:
        return 1 + self.per_sample_ms * setup.batch / setup.threads

    def trial(self, name: str, setup: Setup) -> Measurement:
        self.asked.append((name, setup))
        ms = self.call_ms(setup)
        return Measurement(setup, setup.instances * setup.batch / ms * 1e3, ms, ms, 100)

    def turn(self, name: str, setup: Setup) -> Windows:
        self.asked.append((name, setup))
        return [[self.call_ms(setup) / 1e3] for _ in range(setup.instances)]

    def batches(self) -> list[int]:
        return [setup.batch for _, setup in self.asked]


def test_percentiles_are_of_nearest_rank() -> None:
    # 1 to 200 ms over two instances: 198 of 200 calls took at most 198 ms.
    windows = [[i / 1e3 for i in range(1, 200, 2)], [i / 1e3 for i in range(2, 201, 2)]]
    found = measurement(Setup(2, 1, 4), windows)
    assert (found.p50_ms, found.p99_ms, found.calls) == (100, 198, 200)
    # 100 calls of 4 samples in 10.0 s and in 10.1 s; an error of adding 100 numbers.
    assert found.samples_per_s == pytest.approx(400 / 10.0 + 400 / 10.1, rel=1e-12)
    assert measurement(Setup(1, 1, 1), [[0.001, 0.009, 0.002]]).p99_ms == 9


@pytest.mark.parametrize(
    ("cores", "pairs"),
    [
        (1, [(1, 1)]),
        (2, [(2, 1), (1, 2)]),
        (7, [(7, 1), (3, 2), (2, 3), (1, 7)]),
        (24, [(24, 1), (12, 2), (8, 3), (6, 4), (4, 6), (3, 8), (2, 12), (1, 24)]),
    ],
)
def test_setups_of_all_cores(cores: int, pairs: list[Pair]) -> None:
    assert Space().grid(cores) == pairs


def test_setups_of_the_given_numbers() -> None:
    assert Space(instances=3).grid(8) == [(3, 2)]
    assert Space(threads=3).grid(8) == [(2, 3)]
    assert Space(instances=2, threads=2).grid(8) == [(2, 2)]


@pytest.mark.parametrize(
    ("space", "setup"),
    [
        (Space(9), "9 instances of 1 threads"),
        (Space(None, 9), "1 instances of 9 threads"),
        (Space(3, 3), "3 instances of 3 threads"),
    ],
)
def test_more_than_there_are_cores(space: Space, setup: str) -> None:
    with pytest.raises(InvalidInput, match=f"{setup} need 9 cores; this process may use 8"):
        space.grid(8)


def test_places_do_not_overlap() -> None:
    assert places_of(Setup(2, 3, 1), [0, 2, 4, 6, 8, 10, 12]) == ((0, 2, 4), (6, 8, 10))


def test_batch_doubles_then_narrows() -> None:
    machine = Machine(per_sample_ms=1)
    tried = search(machine.trial, "ours", (2, 1), None, 12.0)
    assert machine.batches() == [1, 2, 4, 8, 16, 12, 10, 11]
    assert max(m.setup.batch for m in tried if m.p99_ms <= 12) == 11


def test_search_ends_at_the_first_batch_when_that_misses() -> None:
    machine = Machine(per_sample_ms=1)
    assert len(search(machine.trial, "ours", (2, 1), None, 1.5)) == 1


def test_search_ends_past_the_peak() -> None:
    rates = {1: 100.0, 2: 120.0, 4: 95.0}

    def trial(name: str, setup: Setup) -> Measurement:
        return Measurement(setup, rates[setup.batch], 1, 1, 100)

    tried = search(trial, "ours", (1, 1), None, 10.0)
    assert [m.setup.batch for m in tried] == [1, 2, 4]


def test_search_ends_at_the_largest_batch() -> None:
    machine = Machine(per_sample_ms=1)
    search(machine.trial, "ours", (1, 1), None, 1e9)
    assert machine.batches() == [1, 2, 4, 8, 16, 32, 64, 128]


def test_a_given_batch_is_the_only_one() -> None:
    machine = Machine(per_sample_ms=1)
    search(machine.trial, "ours", (1, 1), 5, 1.0)
    assert machine.batches() == [5]


def trials(machine: Machine, batches: list[int]) -> list[Measurement]:
    return [machine.trial("", Setup(1, 1, batch)) for batch in batches]


def test_the_best_of_every_engine_is_measured_again_in_turns() -> None:
    machine = Machine(per_sample_ms=1)
    tried = {"ours": trials(machine, [1, 4, 8]), "peer": trials(machine, [1, 2])}
    machine.asked.clear()
    found = confirm(tried, machine.turn, 6.0)
    assert {name: m.setup.batch for name, m in found.items()} == {"ours": 4, "peer": 2}
    once = [("ours", Setup(1, 1, 4)), ("peer", Setup(1, 1, 2))]
    assert machine.asked == once * tool.TURNS
    assert found["ours"].calls == tool.TURNS


def test_a_setup_that_misses_when_measured_again_gives_way() -> None:
    machine = Machine(per_sample_ms=1)
    tried = {"ours": trials(machine, [1, 2, 4, 7, 8])}
    machine.asked.clear()
    machine.per_sample_ms = 1.6  # the trials were lucky
    found = confirm(tried, machine.turn, 9.0)
    # 8 misses; 7 is more than 3/4 of it and is not tried.
    assert machine.batches() == [8] * tool.TURNS + [4] * tool.TURNS
    assert found["ours"].setup.batch == 4


def test_nothing_meets_the_limit() -> None:
    machine = Machine(per_sample_ms=1)
    tried = {"ours": trials(machine, [4, 2, 3])}
    assert confirm(tried, machine.turn, 0.5)["ours"].setup.batch == 2
    machine.per_sample_ms = 100  # nor when measured again
    found = confirm(tried, machine.turn, 6.0)["ours"]
    assert found.p99_ms > 6.0
    assert found.setup.batch == 2


def engine(met: bool, rate: float, p99: float) -> dict[str, object]:
    best = {
        "instances": 2,
        "threads": 1,
        "batch": 3,
        "setting": "",
        "samples_per_s": rate,
        "samples_per_s_per_core": rate / 2,
        "p50_ms": p99 / 2,
        "p99_ms": p99,
        "calls": 100,
    }
    return {"met": met, "best": best, "tried": []}


def test_table_says_what_missed(capsys: pytest.CaptureFixture[str]) -> None:
    engines = {"sparsec": engine(False, 200, 12.5), "peer 1.0": engine(True, 150, 9)}
    result = {"model": "m.so", "seq": 32, "latency_ms": 10.0, "cores": 2, "load_before": 0.1}
    result["failures"] = []
    print_throughput({**result, "engines": engines, "ratio": None})
    printed = capsys.readouterr().out
    assert (
        "sparsec: nothing keeps the limit of 10 ms; the closest found is "
        "2 x 1 threads, batch 3: p99 12.500 ms, 200 samples/s" in printed
    )
    assert "peer 1.0: nothing" not in printed
    assert "idle machine" not in printed
    print_throughput({**result, "load_before": 6.0, "engines": engines, "ratio": 1.5})
    printed = capsys.readouterr().out
    assert "load of the machine was 6.0" in printed
    assert "1.50x" in printed


def test_instances_run_at_the_same_time() -> None:
    """Each call waits until the other instance is in a call too."""
    both = threading.Barrier(2)
    calls: list[Callable[[], object]] = [lambda: both.wait(timeout=20)] * 2
    windows = run_together(calls, None, 0)
    assert [len(window) for window in windows] == [MIN_CALLS] * 2


def test_an_instance_that_fails_ends_all() -> None:
    def fail() -> None:
        raise InvalidInput("too long")

    with pytest.raises(InvalidInput, match="too long"):
        run_together([fail, lambda: None], None, 3600)


class Formula:
    """Calls take 1 ms and those for each sample, by setting, which fails after `fails_after`."""

    def __init__(
        self, name: str, per_sample_ms: dict[str, float], fails_after: dict[str, int] | None = None
    ) -> None:
        self.name = name
        self.settings = tuple(per_sample_ms)
        self.per_sample_ms = per_sample_ms
        self.windows_left = dict(fails_after or {})

    def windows(self, setting: str, places: Places, arrays: Arrays, seconds: float) -> Windows:
        left = self.windows_left[setting] = self.windows_left.get(setting, 99) - 1
        if left < 0:
            raise EngineFailed(f"{setting} ran out of memory")
        batch = len(arrays["ids"])
        return [[(1 + self.per_sample_ms[setting] * batch) / 1e3] * 10 for _ in places]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Result of `throughput` on one core under 8.5 ms for the peers and ours, which takes 1 ms."""
    model = argparse.Namespace(inputs=[Port("ids", np.dtype(np.int64), ("batch", "seq"))])
    monkeypatch.setattr(tool, "load", lambda library, threads: model)
    monkeypatch.setattr(tool, "core_cpus", lambda: [0])
    monkeypatch.setattr(tool, "sparsec_engine", lambda library: Formula("sparsec", {"": 1.0}))
    monkeypatch.setattr(
        tool, "random_inputs", lambda model, batch, seq, **_: {"ids": np.zeros((batch, seq))}
    )
    return lambda *peers: tool.throughput(
        Path("m.so"),
        limit_ms=8.5,
        seq=8,
        space=Space(),
        peers=peers,
        seconds=1,
        progress=lambda stage: None,
    )


def test_an_engine_is_searched_in_all_its_settings(found: Callable[..., dict[str, Any]]) -> None:
    result = found(Formula("peer", {"dense": 4.0, "4x1": 2.0, "1x4": 3.0}))
    best = result["engines"]["peer"]["best"]
    assert (best["setting"], best["batch"]) == ("4x1", 3)
    assert {t["setting"] for t in result["engines"]["peer"]["tried"]} == {"dense", "4x1", "1x4"}
    # 7 samples in 8 ms, 3 in 7 ms; an error of some sums and quotients.
    assert result["ratio"] == pytest.approx((7 / 8) / (3 / 7), rel=1e-12)
    assert result["failures"] == []


def test_a_setting_that_fails_in_the_search_does_not_count(
    found: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    result = found(
        Formula("peer", {"dense": 4.0, "4x1": 2.0}, {"4x1": 1}), Formula("other", {"": 5})
    )
    assert result["engines"]["peer"]["best"]["setting"] == "dense"
    assert list(result["engines"]) == ["sparsec", "peer", "other"]
    assert result["failures"] == [
        {"engine": "peer", "setting": "4x1", "reason": "4x1 ran out of memory"}
    ]
    print_throughput(result)
    assert "peer, 4x1, does not count: 4x1 ran out of memory" in capsys.readouterr().out


def test_a_setting_that_fails_when_measured_again_gives_way(
    found: Callable[..., dict[str, Any]],
) -> None:
    windows = len(found(Formula("peer", {"4x1": 2.0}))["engines"]["peer"]["tried"])
    result = found(Formula("peer", {"dense": 4.0, "4x1": 2.0}, {"4x1": windows + 2}))
    assert result["engines"]["peer"]["best"]["setting"] == "dense"
    assert [f["setting"] for f in result["failures"]] == ["4x1"]


def test_an_engine_without_a_setting_that_works_costs_its_own_figures(
    found: Callable[..., dict[str, Any]],
) -> None:
    windows = len(found(Formula("peer", {"4x1": 2.0}))["engines"]["peer"]["tried"])
    for fails_after in (0, windows):
        result = found(Formula("peer", {"4x1": 2.0}, {"4x1": fails_after}))
        assert list(result["engines"]) == ["sparsec"]
        assert result["engines"]["sparsec"]["best"]["batch"] == 7
        assert result["ratio"] is None
        assert [f["engine"] for f in result["failures"]] == ["peer"]
