"""What was measured of this machine, kept in a file.

    rates-<16 hex digits>.json    {"format": 1, "machine": {...}, "rates": {...}}

The digits are a digest of the machine: CPU, instruction sets, caches. A file that is damaged, of
another format or of another machine is not used, and whoever asks is told why.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sparsec.errors import InvalidInput
from sparsec.files import make_folder, replacing
from sparsec.rates import LEVELS, Ports, Rates
from sparsec.target import Target
from sparsec.tuning.record import Machine

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Known:
    """`rates` is None when there are none to use; `note` says why, or where they come from."""

    rates: Rates | None
    note: str
    path: Path


def machine_of(target: Target) -> dict[str, Any]:
    """What tells this machine from others, as JSON has it: what `Rates` depend on."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(Machine.of(target))))
    del found["cores"]  # those that this process may use, which taskset changes
    return found


def rates_file(folder: Path, machine: Mapping[str, Any]) -> Path:
    text = json.dumps(machine, sort_keys=True).encode()
    return folder / f"rates-{hashlib.blake2b(text, digest_size=8).hexdigest()}.json"


def known_rates(folder: Path, target: Target) -> Known:
    """The measured rates of this machine, which is `target`; measures nothing."""
    machine = machine_of(target)
    path = rates_file(folder, machine)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Known(None, "this machine is not calibrated: run `sparsec calibrate`", path)
    except (OSError, ValueError) as error:
        return Known(None, _unusable(path, f"it cannot be read ({error})"), path)
    try:
        if found["format"] != FORMAT:
            return Known(None, _unusable(path, "it is of another version"), path)
        if found["machine"] != machine:
            return Known(None, _unusable(path, "it is of another machine"), path)
        rates = _from_json(found["rates"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Known(None, _unusable(path, f"it is damaged ({error!r})"), path)
    return Known(rates, f"calibrated: {path}", path)


def with_known_rates(target: Target, folder: Path | None) -> tuple[Target, str]:
    """`target` with what was measured on it, and a sentence on what its times are based on."""
    if folder is None or target.name != "native":
        return target, target.rates.source
    found = known_rates(folder, target)
    if found.rates is None:
        return target, f"{target.rates.source}; {found.note}"
    return replace(target, rates=found.rates), found.note


def keep_rates(folder: Path, target: Target, rates: Rates) -> Known:
    """Writes the rates of this machine, which is `target`; see check_folder for what it raises."""
    machine = machine_of(target)
    path = rates_file(folder, machine)
    check_folder(folder)
    text = json.dumps({"format": FORMAT, "machine": machine, "rates": asdict(rates)}, indent=1)
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return Known(rates, f"calibrated: {path}", path)


def check_folder(folder: Path) -> None:
    """Makes the folder if need be; raises InvalidInput when that cannot be, or it is read-only."""
    try:
        make_folder(folder)
    except InvalidInput as error:
        raise InvalidInput(
            f"{error}; what is measured is kept there: set XDG_CACHE_HOME to a folder that can be "
            "written to"
        ) from None


def _from_json(found: Mapping[str, Any]) -> Rates:
    """Raises KeyError, TypeError or ValueError for what are no rates."""
    bandwidth = tuple(_positive(v) for v in found["bandwidth"])
    if len(bandwidth) != len(LEVELS):
        raise ValueError("bandwidth of four levels is wanted")
    return Rates(
        source=str(found["source"]),
        hertz=_positive(found["hertz"]),
        products=tuple((str(name), _positive(v)) for name, v in found["products"]),
        ports=tuple((int(bits), _ports_from_json(p)) for bits, p in found["ports"]),
        bandwidth=(bandwidth[0], bandwidth[1], bandwidth[2], bandwidth[3]),
        barrier_seconds=_not_negative(found["barrier_seconds"]),
        call_seconds=_not_negative(found["call_seconds"]),
        is_measured=True,
    )


def _ports_from_json(found: Mapping[str, Any]) -> Ports:
    return Ports(**{f.name: _not_negative(found[f.name]) for f in fields(Ports)})


def _positive(value: Any) -> float:
    if not 0 < float(value) < float("inf"):
        raise ValueError(f"{value} is not above zero")
    return float(value)


def _not_negative(value: Any) -> float:
    if not 0 <= float(value) < float("inf"):
        raise ValueError(f"{value} is below zero")
    return float(value)


def _unusable(path: Path, why: str) -> str:
    return f"{path} is not used, {why}: run `sparsec calibrate --force`"


def cache_folder() -> Path:
    """Where this user's caches lie: the XDG base directory specification."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(given) if Path(given).is_absolute() else Path("~/.cache").expanduser()
    return home / "sparsec"
