"""Where the tools print: as wide as the terminal, or wide enough for a log."""

from __future__ import annotations

import sys

from rich.console import Console

LOG_COLUMNS = 140  # a table of weights fits


def console() -> Console:
    """A console on standard output."""
    return Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
