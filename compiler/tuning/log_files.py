"""What `sparsec log` does with tuning logs: best, merge, prune, check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from sparsec.files import check_writable, replacing
from sparsec.tuning.log import TuningLog, density_class, locked, ranking
from sparsec.tuning.record import Outcome, TuningRecord, middle

Group = tuple[object, ...]
Revisions = Callable[
    [str], str | None
]  # the revision today of the kernels of an op; None if unknown


def group_of(record: TuningRecord) -> Group:
    """Records of one group compete with each other."""
    w = record.workload
    where = (record.machine, record.tokens, record.threads)
    return (w.op, w.sizes, w.dtype, w.layout, w.epilogue, density_class(w.density), *where)


def best(records: Iterable[TuningRecord]) -> list[TuningRecord]:
    """A record of the fastest schedule of each group, in the order of first appearance."""
    groups: dict[Group, list[TuningRecord]] = {}
    for record in records:
        if record.outcome is Outcome.OK:
            groups.setdefault(group_of(record), []).append(record)
    found = []
    for group in groups.values():
        fastest, _ = ranking(group)[0]
        found.append(min((r for r in group if r.schedule == fastest), key=lambda r: r.ratio))
    return found


def condensed(record: TuningRecord) -> TuningRecord:
    """With one time of each schedule, in whole nanoseconds: a tenth of the bytes, to ship."""
    return replace(
        record,
        seconds=(round(middle(record.seconds), 9),),
        baseline_seconds=(round(middle(record.baseline_seconds), 9),),
    )


def merge(logs: Iterable[TuningLog]) -> list[TuningRecord]:
    """All records once."""
    return list(dict.fromkeys(record for log in logs for record in log.records))


def is_stale(record: TuningRecord, revisions: Revisions) -> bool:
    """Whether the code of its kernels has changed since."""
    return record.revision != revisions(record.workload.op)


def prune(records: Iterable[TuningRecord], revisions: Revisions, keep: int) -> list[TuningRecord]:
    """Without stale records and failures, those of the `keep` fastest schedules of each group."""
    groups: dict[Group, list[TuningRecord]] = {}
    for record in records:
        if record.outcome is Outcome.OK and not is_stale(record, revisions):
            groups.setdefault(group_of(record), []).append(record)
    kept: list[TuningRecord] = []
    for group in groups.values():
        fastest = {schedule for schedule, _ in ranking(group)[:keep]}
        kept += [record for record in group if record.schedule in fastest]
    return kept


def write(path: Path, make: Callable[[], Sequence[TuningRecord]]) -> int:
    """Replace a log in one step by the records that are made, or not at all; returns how many.

    Nobody appends to it between reading and writing.
    """
    check_writable(path)
    with locked(path) if path.exists() else nullcontext():
        records = make()
        with replacing(path) as temporary:
            temporary.write_text("".join(record.to_json() + "\n" for record in records))
    return len(records)
