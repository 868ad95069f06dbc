"""The tuning log: JSON lines that are only ever appended to, and the lookup in them.

Several writers may append at once: a record is one write under a lock. A line that a crash or a
full disk has cut short stays alone, since the next writer starts a new line; readers skip what is
no record and say so.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from sparsec.errors import InvalidInput
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Isa
from sparsec.tuning.record import Machine, Outcome, TuningRecord

# A record of another size of input still tells which schedule is good, up to these factors.
MOST_TOKENS_RATIO = 4.0
MOST_DENSITY_RATIO = 1.5
# What a difference costs in the choice of the nearest record, in doublings of the tokens.
DENSITY_WEIGHT = 4.0
OTHER_CPU = 1.0
OTHER_THREADS = 0.5
OTHER_EPILOGUE = 0.5

Key = tuple[str, tuple[tuple[str, int], ...], str, str]


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A line that is no record."""

    path: Path
    number: int  # from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}: {self.reason}; the line is skipped"


@dataclass(frozen=True, slots=True)
class Query:
    """What a schedule is wanted for. `revision` is that of the kernel family today."""

    workload: Workload
    tokens: int
    threads: int
    machine: Machine
    revision: str


class LogNotWritten(InvalidInput):
    """What was measured can not be kept: there is no sense in going on."""


class TuningLog:
    """Records in the order in which they were read; `name` is what reports call the log."""

    def __init__(
        self,
        records: Iterable[TuningRecord] = (),
        broken: Iterable[BrokenLine] = (),
        name: str = "log",
    ):
        self.name = name
        self.records = list(records)
        self.broken = list(broken)
        self._by_key: dict[Key, list[TuningRecord]] = {}
        for record in self.records:
            self._by_key.setdefault(_key(record.workload), []).append(record)

    @staticmethod
    def read(*paths: str | os.PathLike[str], name: str = "log") -> TuningLog:
        """Raises InvalidInput when a file cannot be read; broken lines are only reported."""
        records: list[TuningRecord] = []
        broken: list[BrokenLine] = []
        for path in map(Path, paths):
            for number, line in _lines(path):
                try:
                    records.append(TuningRecord.from_json(line))
                except ValueError as error:
                    broken.append(BrokenLine(path, number, str(error)))
        return TuningLog(records, broken, name)

    def add(self, record: TuningRecord) -> None:
        self.records.append(record)
        self._by_key.setdefault(_key(record.workload), []).append(record)

    def exact(self, query: Query, *, failures: bool = False) -> list[TuningRecord]:
        """The valid records of this very workload, bucket, thread count and CPU."""
        found = self._by_key.get(_key(query.workload), [])
        return [
            r for r in found
            if _is_valid(r, query) and _is_exact(r, query)
            and (failures or r.outcome is Outcome.OK)
        ]  # fmt: skip

    def ranking(self, query: Query) -> list[Schedule]:
        """The schedules that were measured for the query, fastest first."""
        return [schedule for schedule, _ in ranking(self.exact(query))]

    def best(self, query: Query) -> tuple[Schedule, float] | None:
        """The fastest one, and its time as a multiple of the heuristic's."""
        return next(iter(ranking(self.exact(query))), None)

    def lookup(
        self,
        query: Query,
        allowed: Callable[[Schedule], bool] = lambda schedule: True,
        comparable: Callable[[int], bool] = lambda tokens: True,
    ) -> Schedule | None:
        """The best schedule recorded for the query, or for what is nearest to it; else None.

        Records of another revision of the kernel, of an instruction set that the machine lacks,
        or whose schedule is not `allowed` do not count; nor do those of token counts that are
        not `comparable`, at which what is best for the query could not be measured. `source` says
        where it comes from.
        """
        for schedule in self.ranking(query):
            if allowed(schedule):
                return replace(schedule, source=f"{self.name} exact")
        groups: dict[tuple[float, str], list[TuningRecord]] = {}
        for record in self._by_key.get(_key(query.workload), []):
            distance = _distance(record, query)
            usable = _is_valid(record, query) and record.outcome is Outcome.OK
            if distance < math.inf and usable and comparable(record.tokens):
                groups.setdefault((distance, _difference(record, query)), []).append(record)
        for (_, difference), records in sorted(groups.items(), key=lambda item: item[0]):
            for schedule, _ in ranking(records):
                if allowed(schedule):
                    return replace(schedule, source=f"{self.name} nearest {difference}")
        return None


def append(path: str | os.PathLike[str], records: Iterable[TuningRecord]) -> None:
    """Add records to a log, which is made when it is not there.

    Raises LogNotWritten when that fails; what was there before stays as it was.
    """
    text = "".join(record.to_json() + "\n" for record in records).encode()
    try:
        with locked(Path(path)) as file:
            end = os.lseek(file, 0, os.SEEK_END)
            if end and os.pread(file, 1, end - 1) != b"\n":
                text = b"\n" + text
            try:
                _write_all(file, text)
            except OSError:
                os.ftruncate(file, end)
                raise
    except OSError as error:
        raise LogNotWritten(
            f"{path}: the tuning log cannot be written ({error.strerror}); "
            "make room or name another file"
        ) from None


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """The log's file for this writer alone; it is made when it is not there. Raises OSError."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):  # who had the lock may have put another file in its place
                yield file
                return
        finally:
            os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _write_all(file: int, text: bytes) -> None:
    """A disk that is nearly full takes a part first, and then fails."""
    while text:
        text = text[os.write(file, text) :]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is no plain file")
        text = path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"{path}: the tuning log cannot be read ({error.strerror}); "
            "name a file that `sparsec tune` wrote"
        ) from None
    for number, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            yield number, line.decode("utf-8", errors="replace")


def _key(workload: Workload) -> Key:
    """What must be the same for a record to say anything."""
    return workload.op, workload.sizes, workload.dtype, workload.layout


def ranking(records: Iterable[TuningRecord]) -> list[tuple[Schedule, float]]:
    """Schedules with the medians of their ratios, fastest first."""
    ratios: dict[Schedule, list[float]] = {}
    for record in records:
        ratios.setdefault(record.schedule, []).append(record.ratio)
    found = [(schedule, median(values)) for schedule, values in ratios.items()]
    return sorted(found, key=lambda item: item[1])


def _is_valid(record: TuningRecord, query: Query) -> bool:
    """Whether the record's kernel is today's, and its schedule one that the machine would use."""
    return (
        record.revision == query.revision
        and record.schedule.isa in query.machine.isas
        # A machine with a better instruction set would not use what was best without it.
        and _level(record.machine, query.workload) == _level(query.machine, query.workload)
    )


def _level(machine: Machine, workload: Workload) -> str | None:
    """The best instruction set that is of use for the workload."""
    special = set()
    if "bf16" not in f"{workload.op} {workload.dtype} {workload.epilogue}":
        special.add(Isa.AVX512_BF16.value)
    if workload.layout != "bsr1x1":  # bitmaps are for unstructured zeros
        special.add(Isa.AVX512_VBMI2.value)
    useful = [isa for isa in machine.isas if isa not in special]
    return useful[-1] if useful else None


def _is_exact(record: TuningRecord, query: Query) -> bool:
    return (
        record.tokens == query.tokens
        and record.threads == query.threads
        and record.machine.cpu == query.machine.cpu
        and record.workload.epilogue == query.workload.epilogue
        and density_class(record.workload.density) == density_class(query.workload.density)
    )


def density_class(density: float) -> int:
    """Densities within about 10 % of each other share a class."""
    return round(math.log(max(density, 1e-3)) / math.log(1.2))


def _distance(record: TuningRecord, query: Query) -> float:
    """In doublings of the tokens; infinite when the record is too far off."""
    tokens = abs(math.log2(record.tokens / query.tokens))
    densities = max(record.workload.density, 1e-3), max(query.workload.density, 1e-3)
    density = abs(math.log2(densities[0] / densities[1]))
    if tokens > math.log2(MOST_TOKENS_RATIO) or density > math.log2(MOST_DENSITY_RATIO):
        return math.inf
    return (
        tokens
        + DENSITY_WEIGHT * density
        + OTHER_CPU * (record.machine.cpu != query.machine.cpu)
        + OTHER_THREADS * (record.threads != query.threads)
        + OTHER_EPILOGUE * (record.workload.epilogue != query.workload.epilogue)
    )


def _difference(record: TuningRecord, query: Query) -> str:
    """`(64 tokens, density 0.2)`: in what the record differs."""
    pairs = [
        (record.tokens != query.tokens, f"{record.tokens} tokens"),
        (
            density_class(record.workload.density) != density_class(query.workload.density),
            f"density {record.workload.density:g}",
        ),
        (record.threads != query.threads, f"{record.threads} threads"),
        (record.machine.cpu != query.machine.cpu, record.machine.cpu),
        (record.workload.epilogue != query.workload.epilogue, record.workload.epilogue),
    ]
    return f"({', '.join(text for differs, text in pairs if differs)})"
