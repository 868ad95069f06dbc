"""The search: in the heuristic's order, then around the best, within its budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from sparsec.ir.schedule import Schedule
from sparsec.tuning.record import Outcome, Trial, middle
from sparsec.tuning.search import FIRST, Budget, are_neighbours, search


def schedule(rows: int, group: int, isa: str = "avx512vnni") -> Schedule:
    return Schedule("int8_gemm", isa, (("rows", rows), ("group", group)))


SPACE = [
    schedule(rows, group) for rows, group in itertools.product((4, 8, 16, 32, 64), (1, 2, 4, 8))
]


def cost(s: Schedule) -> float:
    """Smooth in both parameters, best at rows 32 and group 4."""
    return 1.0 + abs(s.param("rows") - 32) / 16 + abs(s.param("group") - 4) / 4


def measure(s: Schedule) -> Trial:
    return Trial(s, Outcome.OK, (cost(s) * 1e-3,) * 3, (4e-3,) * 3)


def run(space: Sequence[Schedule] = SPACE, **options: object) -> list[Trial]:
    budget = options.pop("budget", Budget())
    return list(search(space, measure, budget, **options))  # type: ignore[arg-type]


def test_it_finds_the_best_of_a_smooth_space_without_trying_all() -> None:
    trials = run(patience=6)
    assert min(trials, key=lambda t: t.ratio).schedule == schedule(32, 4)
    assert len(trials) < len(SPACE)


def test_the_first_trials_are_in_the_heuristics_order() -> None:
    assert [t.schedule for t in run()][:FIRST] == SPACE[:FIRST]


def test_nothing_is_tried_twice() -> None:
    tried = [t.schedule for t in run(patience=1000)]
    assert sorted(map(str, tried)) == sorted(map(str, SPACE))


def test_what_is_known_is_not_repeated_and_leads_the_way() -> None:
    known = [measure(schedule(32, 8)), *map(measure, SPACE[:3])]
    tried = [t.schedule for t in run(known=known, patience=4)]
    assert not {t.schedule for t in known} & set(tried)
    assert are_neighbours(tried[0], schedule(32, 8))
    assert schedule(32, 4) in tried[:6]


@pytest.mark.parametrize("stopped_after", [0, 1, 5, 9, 11])
def test_a_search_that_was_stopped_ends_as_one_that_was_not(stopped_after: int) -> None:
    whole = run(patience=4)
    assert len(whole) > 9
    known = whole[:stopped_after]
    confirmed = [*known, *known[-1:]]  # a second trial of a schedule is no step
    assert known + run(known=confirmed, patience=4) == whole


@pytest.mark.parametrize("trials", [0, 1, 7])
def test_the_budget_of_trials_is_kept(trials: int) -> None:
    assert len(run(budget=Budget(trials=trials))) == trials


def test_the_budget_of_time_is_kept() -> None:
    assert run(budget=Budget(minutes=0.0)) == []


def test_a_part_of_a_budget_is_of_what_is_left() -> None:
    budget = Budget(trials=10)
    budget.spend(4)
    assert budget.part(3).trials == 2
    assert budget.share_used == pytest.approx(0.4)
    assert Budget().part(3).trials is None
    one, two = (Budget(minutes=9.0).part(3, at_once=n).minutes for n in (1, 2))
    assert (one, two) == (pytest.approx(3.0, rel=1e-3), pytest.approx(6.0, rel=1e-3))
    assert Budget().share_used == 0.0


def test_failures_do_not_stop_it() -> None:
    def fragile(s: Schedule) -> Trial:
        return Trial(s, Outcome.CRASHED, note="SIGSEGV") if s.param("rows") < 16 else measure(s)

    trials = list(search(SPACE, fragile, Budget(), patience=12))
    assert min(trials, key=lambda t: t.ratio).schedule == schedule(32, 4)


def test_neighbours_differ_in_one_thing() -> None:
    assert are_neighbours(schedule(4, 1), schedule(4, 2))
    assert are_neighbours(schedule(4, 1), schedule(4, 1, isa="avx2"))
    assert not are_neighbours(schedule(4, 1), schedule(8, 2))
    assert not are_neighbours(schedule(4, 1), schedule(4, 1))
    assert not are_neighbours(schedule(4, 1), Schedule("dense_gemm", "avx512vnni"))


@pytest.mark.parametrize(
    ("seconds", "wanted"), [((3.0,), 3.0), ((1.0, 9.0), 1.0), ((2.0, 1.0, 90.0, 3.0, 80.0), 2.0)]
)
def test_interruptions_do_not_count(seconds: tuple[float, ...], wanted: float) -> None:
    assert middle(seconds) == wanted
