"""`sparsec log`: what is in tuning logs, and housekeeping."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from sparsec.codegen.kernels.revision import revision
from sparsec.errors import InvalidInput
from sparsec.tools import tuning_plot
from sparsec.tools.console import console, warn
from sparsec.tuning import log_files
from sparsec.tuning.log import TuningLog
from sparsec.tuning.record import Outcome, TuningRecord


def show(paths: Sequence[Path], *, best: bool) -> None:
    """A table of all records, or of the best of each group."""
    log = _read(paths)
    records = log_files.best(log.records) if best else log.records
    table = Table(title=f"{len(records)} records")
    for name in ("workload", "tokens", "threads", "CPU", "schedule", "outcome", "us", "ratio"):
        table.add_column(name, overflow="fold")
    for record in records:
        table.add_row(*_row(record))
    console().print(table)


def merge(paths: Sequence[Path], output: Path) -> int:
    """Write all records of the logs once; returns how many."""
    return log_files.write(output, lambda: log_files.merge([_read([path]) for path in paths]))


def prune(path: Path, keep: int) -> tuple[int, int]:
    """Keep the fastest `keep` schedules of each group that are not stale; numbers before, after.

    The records of a kept schedule stay together.
    """
    if keep < 1:
        raise InvalidInput(f"--keep {keep}: wanted at least 1")
    before = 0

    def kept() -> list[TuningRecord]:
        nonlocal before
        log = _read([path])
        before = len(log.records)
        return log_files.prune(log.records, revision, keep)

    after = log_files.write(path, kept)
    return before, after


def check(paths: Sequence[Path]) -> bool:
    """Tell broken lines, stale records and failures; whether every line is a record."""
    log = _read(paths)
    stale = sum(log_files.is_stale(record, revision) for record in log.records)
    failed = sum(record.outcome is not Outcome.OK for record in log.records)
    print(
        f"{len(log.records)} records, {stale} of kernels that have changed since, "
        f"{failed} failed trials, {len(log.broken)} broken lines"
    )
    return not log.broken


def plot(paths: Sequence[Path], output: Path, rates_folder: Path) -> None:
    """Draw the logs: see tuning_plot."""
    tuning_plot.plot(_read(paths).records, output, rates_folder)


def _read(paths: Sequence[Path]) -> TuningLog:
    log = TuningLog.read(*paths)
    for broken in log.broken:
        warn(broken)
    return log


def _row(record: TuningRecord) -> tuple[str, ...]:
    ok = record.outcome is Outcome.OK
    stale = " (stale)" if log_files.is_stale(record, revision) else ""
    return (
        str(record.workload),
        str(record.tokens),
        str(record.threads),
        record.machine.cpu,
        str(record.schedule),
        record.outcome.value + stale,
        f"{record.trial.microseconds:.1f}" if ok else record.note,
        f"{record.ratio:.3f}" if ok else "",
    )
