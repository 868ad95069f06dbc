"""How far a long run is: a bar where standard error is a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Text, steps done, steps in all; 0 of 0 where nothing is counted. A text such as "prune: loss
# 0.5" belongs to the stage "prune".
Tell = Callable[[str, int, int], None]

LINE_SECONDS = 30.0


@dataclass
class Clock:
    """The time left of the present stage, from its pace so far."""

    now: Callable[[], float] = time.monotonic
    _stage: tuple[str, int] = field(default=("", 0), init=False)
    _began: tuple[float, int] = field(default=(0.0, 0), init=False)  # seconds, step

    def is_new(self, text: str, step: int, steps: int) -> bool:
        """Whether another stage has begun than that of the last call."""
        stage = (text.partition(":")[0], steps)
        if stage == self._stage:
            return False
        self._stage, self._began = stage, (self.now(), step)
        return True

    def left(self, step: int, steps: int) -> str:
        """For example "12 min left"; nothing where there is no pace yet."""
        began, first = self._began
        if step <= first:
            return ""
        seconds = (self.now() - began) / (step - first) * (steps - step)
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


@contextlib.contextmanager
def training_progress(quiet: bool) -> Iterator[Tell]:
    """Tells on standard error how far the present stage is."""
    if quiet:
        yield lambda text, step, steps: None
    elif sys.stderr.isatty():
        with _bar() as tell:
            yield tell
    else:
        yield lines(lambda line: print(line, file=sys.stderr, flush=True), Clock())


def lines(write: Callable[[str], None], clock: Clock) -> Tell:
    """Writes a line for a new stage, for its end, and at most every LINE_SECONDS between."""
    last = [0.0]

    def tell(text: str, step: int, steps: int) -> None:
        new, now = clock.is_new(text, step, steps), clock.now()
        ended = 0 < steps == step
        if not new and not ended and now - last[0] < LINE_SECONDS:
            return
        last[0] = now
        left = clock.left(step, steps)
        counted = f" ({step}/{steps}{', ' if left else ''}{left})" if steps else ""
        write(f"{text}{counted}")

    return tell


@contextlib.contextmanager
def _bar() -> Iterator[Tell]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    clock = Clock()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("starting", total=None, left="")

        def tell(text: str, step: int, steps: int) -> None:
            if clock.is_new(text, step, steps):
                progress.reset(bar, total=max(steps, 1))
            progress.update(bar, description=text, completed=step, left=clock.left(step, steps))

        yield tell
