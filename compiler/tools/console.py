"""Where the tools print: as wide as the terminal, or wide enough for a log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

LOG_COLUMNS = 140  # a table of weights fits


class _Output(Console):
    def on_broken_pipe(self) -> None:
        """The command's to tell: here it would end with the status of a failed check."""
        raise BrokenPipeError


def console() -> Console:
    """A console on standard output. Names and types come as they are: `[batch]` is no markup."""
    width = None if sys.stdout.isatty() else LOG_COLUMNS
    return _Output(width=width, markup=False, emoji=False)


def warn(what: object) -> None:
    """A line on standard output that says so."""
    out = console()
    out.print("warning:", style="yellow", end=" ")
    out.print(str(what), highlight=False)


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Tells the present stage on standard error; a spinner where that is a terminal."""
    if quiet:
        yield lambda stage: None
        return
    console = Console(stderr=True, markup=False, emoji=False)
    with console.status("starting") as status:
        yield lambda stage: status.update(Text(stage))
