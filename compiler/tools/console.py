"""Where the tools print: as wide as the terminal, or wide enough for a log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console

LOG_COLUMNS = 140  # a table of weights fits


def console() -> Console:
    """A console on standard output."""
    return Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Tells the present stage on standard error; a spinner where that is a terminal."""
    if quiet:
        yield lambda stage: None
        return
    console = Console(stderr=True)
    with console.status("starting") as status:
        yield lambda stage: status.update(stage)
