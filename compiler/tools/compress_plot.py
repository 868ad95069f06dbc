"""The course of a compression run: loss, sparsity and dev metrics against the steps of stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsec.errors import InvalidInput
from sparsec.files import replacing

SIZE_INCHES = (12.0, 9.0)

Line = Mapping[str, Any]
Points = list[tuple[int, float]]


@dataclass
class Course:
    """Numbers against steps, counted through all stages; `begins` is where each stage starts."""

    begins: dict[str, int] = field(default_factory=dict)
    losses: dict[str, Points] = field(default_factory=dict)  # "loss" is the sum
    sparsity: Points = field(default_factory=list)
    dev: dict[str, Points] = field(default_factory=dict)
    steps: int = 0


def plot_run(log: Path, output: Path) -> tuple[str, ...]:
    """Draw the log; returns notes, for example that there is nothing to draw it with."""
    if not log.is_file():
        return ()  # nothing was trained
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return (f"no {output.name}: matplotlib is missing, pip install 'sparsec[plot]'",)
    course = course_of(read_log(log))
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    _draw(axes[0], course.losses, "loss")
    axes[0].set_yscale("log")
    _draw(axes[1], {"sparsity": course.sparsity}, "share of zero blocks")
    _draw(axes[2], course.dev, "dev", marker="o")
    for stage, begin in course.begins.items():
        axes[0].annotate(stage, (begin, 1.01), xycoords=("data", "axes fraction"))
        for one in axes:
            one.axvline(begin, color="grey", linewidth=1)
    axes[2].set_xlabel("steps")
    with replacing(output) as path:
        figure.savefig(path, format=output.suffix[1:], dpi=120)
    return ()


def read_log(path: Path) -> list[Line]:
    """All lines of a run log. A last line that a kill cut off is left out.

    Raises InvalidInput naming any other line that is not one of a run.
    """
    found: list[Line] = []
    texts = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            complete = {"stage", "step", "steps", "loss", "sparsity"} <= line.keys()
        except (ValueError, AttributeError):
            complete = False
        if complete:
            found.append(line)
        elif number < len(texts):
            raise InvalidInput(f"{path}:{number}: not a line of a run log")
    return found


def course_of(lines: Sequence[Line]) -> Course:
    """The lines as curves, one stage behind the other."""
    course = Course()
    for line in lines:
        if line["stage"] not in course.begins:
            course.begins[line["stage"]] = course.steps
            course.steps += line["steps"]
        at = course.begins[line["stage"]] + line["step"]
        course.sparsity.append((at, line["sparsity"]))
        for name, value in {"loss": line["loss"], **line.get("losses", {})}.items():
            course.losses.setdefault(name, []).append((at, value))
        for name, value in line.get("dev", {}).items():
            course.dev.setdefault(name, []).append((at, value))
    return course


def _draw(axes: Any, curves: Mapping[str, Points], label: str, marker: str = "") -> None:
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker=marker, linewidth=1)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(fontsize="x-small")
