"""The picture of a compression run, and the lines of its progress."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsec.errors import InvalidInput
from sparsec.tools.compress_plot import course_of, plot_run, read_log
from sparsec.tools.compress_progress import Clock, lines


def line(stage: str, step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "stage": stage, "step": step, "steps": 10, "loss": loss, "losses": {"hidden": loss / 2},
        "sparsity": 0.08 * step, "lr": 1e-4, "seconds": 1.0, **more,
    }  # fmt: skip


RUN = [
    line("teacher", 0, 2.0),
    line("teacher", 9, 1.0, dev={"accuracy": 0.8}),
    line("prune", 5, 3.0, losses={}),
    line("prune", 9, 2.5, dev={"accuracy": 0.7}),
]


def test_stages_follow_each_other(tmp_path: Path) -> None:
    course = course_of(RUN)
    assert course.begins == {"teacher": 0, "prune": 10}
    assert course.losses["loss"] == [(0, 2.0), (9, 1.0), (15, 3.0), (19, 2.5)]
    assert course.losses["hidden"] == [(0, 1.0), (9, 0.5), (19, 1.25)]
    assert course.dev == {"accuracy": [(9, 0.8), (19, 0.7)]}
    assert course.sparsity[-1] == (19, pytest.approx(0.72))


def test_the_picture_is_written(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(one) + "\n" for one in RUN) + '{"stage": "pru')
    assert plot_run(log, tmp_path / "log.png") == ()
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_trained_nothing_has_no_picture(tmp_path: Path) -> None:
    assert plot_run(tmp_path / "log.jsonl", tmp_path / "log.png") == ()
    assert not (tmp_path / "log.png").exists()


def test_without_matplotlib_a_note_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps(RUN[0]))
    (note,) = plot_run(log, tmp_path / "log.png")
    assert "sparsec[plot]" in note


@pytest.mark.parametrize("broken", ["{", "[]", "3", '{"stage": "prune"}'])
def test_a_broken_line_is_named(broken: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(f"{json.dumps(RUN[0])}\n{broken}\n{json.dumps(RUN[1])}\n")
    with pytest.raises(InvalidInput, match=r"log\.jsonl:2: not a line"):
        read_log(log)


def test_progress_tells_new_stages_ends_and_the_time_left() -> None:
    now, written = [0.0], []
    tell = lines(written.append, Clock(lambda: now[0]))
    for step in range(1, 101):
        now[0] += 2.0
        tell(f"prune: loss {step}", step, 100)
    tell("compile: link", 0, 0)
    tell("compile: done", 0, 0)
    assert written[0] == "prune: loss 1 (1/100)"
    assert written[1] == "prune: loss 16 (16/100, 3 min left)"
    assert written[2] == "prune: loss 31 (31/100, 2 min left)"
    assert written[-3:-1] == [
        "prune: loss 91 (91/100, 18 s left)",
        "prune: loss 100 (100/100, 0 s left)",
    ]
    assert written[-1] == "compile: link"
    assert len(written) == 9
