"""One measurement of the tuner, as data and as a line of JSON.

A record stands alone: it says what was computed, on which machine, by which schedule of which
generator, and all times. Beside the times of its schedule it holds those of the heuristic's
schedule, taken in turns with them: the ratio of the two is what records of different days, and
of days with a different load on the machine, are compared by.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import LEVELS, Target, cpu_fields

FORMAT = 1
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "stepping")


class Outcome(Enum):
    """How a trial ended; only records that are OK have times."""

    OK = "ok"
    WRONG = "wrong"  # not the oracle's result
    CRASHED = "crashed"
    TIMED_OUT = "timed out"
    REFUSED = "refused"  # code generation found no way


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a trial ran. `cpu` is of the identification numbers: names lie in guests."""

    cpu: str
    isas: tuple[str, ...]
    cores: int
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int

    @staticmethod
    def of(target: Target) -> Machine:
        """The target as a record holds it; the CPU's numbers are read when it is this machine."""
        cpu = cpu_numbers(cpu_fields()) if target.name == "native" else target.name
        isas = tuple(isa.value for isa in target.isas)
        return Machine(cpu, isas, target.cores, target.l1d_bytes, target.l2_bytes, target.l3_bytes)


def cpu_numbers(fields: Mapping[str, str]) -> str:
    """`GenuineIntel 6-143-8`: vendor, family, model and stepping; "unknown" without any field."""
    if not fields:
        return "unknown"
    vendor, *numbers = (fields.get(name, "?") for name in _CPU_FIELDS)
    return f"{vendor} {'-'.join(numbers)}"


@dataclass(frozen=True, slots=True)
class Trial:
    """How one schedule did, and in turns with it the heuristic's; a failure has a note instead."""

    schedule: Schedule
    outcome: Outcome
    seconds: tuple[float, ...] = ()
    baseline_seconds: tuple[float, ...] = ()
    note: str = ""

    @property
    def ratio(self) -> float:
        """Time as a multiple of the heuristic's; infinite when it failed."""
        if self.outcome is not Outcome.OK:
            return math.inf
        return middle(self.seconds) / middle(self.baseline_seconds)

    @property
    def microseconds(self) -> float:
        """Of one call, when it did not fail."""
        return 1e6 * middle(self.seconds)


def middle(seconds: Sequence[float]) -> float:
    """The median of the faster half: what interrupts a run only makes it slower."""
    faster = sorted(seconds)[: (len(seconds) + 1) // 2]
    return faster[len(faster) // 2]


@dataclass(frozen=True, slots=True)
class TuningRecord:
    """One trial: `schedule` on `workload` with `tokens` tokens and `threads` threads.

    `revision` identifies the code of the kernel family, `versions` what else made the code.
    `seconds` and `baseline_seconds` are single calls of the schedule and of the heuristic's.
    """

    workload: Workload
    tokens: int
    threads: int
    machine: Machine
    schedule: Schedule
    revision: str
    versions: tuple[tuple[str, str], ...]
    outcome: Outcome = Outcome.OK
    seconds: tuple[float, ...] = ()
    baseline_seconds: tuple[float, ...] = ()
    note: str = ""  # of a trial that failed: why

    @property
    def ratio(self) -> float:
        """Time as a multiple of the heuristic's in the same turns; infinite when it failed."""
        return self.trial.ratio

    @property
    def trial(self) -> Trial:
        return Trial(self.schedule, self.outcome, self.seconds, self.baseline_seconds, self.note)

    def to_json(self) -> str:
        """One line without its end."""
        data = {"format": FORMAT, **asdict(self), "outcome": self.outcome.value}
        data["workload"]["sizes"] = dict(self.workload.sizes)
        data["schedule"]["params"] = dict(self.schedule.params)
        del data["schedule"]["source"]
        data["versions"] = dict(self.versions)
        return json.dumps(data, separators=(",", ":"))

    @staticmethod
    def from_json(line: str) -> TuningRecord:
        """Raises ValueError, saying what is wrong with the line."""
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"no JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise ValueError("no record: it is nested too deeply") from None
        if not isinstance(data, Mapping):
            raise ValueError("no JSON object")
        if data.get("format") != FORMAT:
            raise ValueError(f"format {data.get('format')!r}, wanted {FORMAT}")
        try:
            return _record(data)
        except KeyError as error:
            raise ValueError(f"no field {error.args[0]!r}") from None
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a field of a wrong type: {error}") from None


def _record(data: Mapping[str, Any]) -> TuningRecord:
    workload, schedule, machine = data["workload"], data["schedule"], data["machine"]
    outcome = Outcome(data["outcome"])
    seconds, baseline = _times(data["seconds"]), _times(data["baseline_seconds"])
    if outcome is Outcome.OK and not (seconds and baseline):
        raise ValueError("no times")
    if schedule["isa"] not in LEVELS:
        raise ValueError(f"instruction set {schedule['isa']!r}, wanted one of {', '.join(LEVELS)}")
    return TuningRecord(
        workload=Workload(
            op=str(workload["op"]),
            sizes=_integers(workload["sizes"]),
            dtype=str(workload["dtype"]),
            layout=str(workload["layout"]),
            epilogue=str(workload["epilogue"]),
            density=_share(workload["density"]),
        ),
        tokens=_count(data["tokens"]),
        threads=_count(data["threads"]),
        machine=Machine(
            cpu=str(machine["cpu"]),
            isas=tuple(str(isa) for isa in machine["isas"]),
            cores=int(machine["cores"]),
            l1d_bytes=int(machine["l1d_bytes"]),
            l2_bytes=int(machine["l2_bytes"]),
            l3_bytes=int(machine["l3_bytes"]),
        ),
        schedule=Schedule(
            str(schedule["family"]), str(schedule["isa"]), _integers(schedule["params"])
        ),
        revision=str(data["revision"]),
        versions=tuple((str(n), str(v)) for n, v in data["versions"].items()),
        outcome=outcome,
        seconds=seconds,
        baseline_seconds=baseline,
        note=str(data["note"]),
    )


def _integers(data: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    return tuple((str(name), int(value)) for name, value in data.items())


def _count(value: Any) -> int:
    if int(value) < 1:
        raise ValueError(f"{value} tokens or threads")
    return int(value)


def _share(value: Any) -> float:
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"a density of {value}")
    return float(value)


def _times(values: Any) -> tuple[float, ...]:
    times = tuple(float(v) for v in values)
    if not all(0.0 < t < float("inf") for t in times):
        raise ValueError("times that are not positive")
    return times
