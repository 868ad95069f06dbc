"""What was measured of a machine, kept in a file: found again, and never trusted when wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparsec.errors import InvalidInput
from sparsec.rates import default_rates
from sparsec.target import Isa, Target
from sparsec.tuning.rates_file import keep_rates, known_rates, with_known_rates

TARGET = Target("native", (Isa.AVX2,), 2, 32768, 1 << 20, 1 << 25)
RATES = replace(default_rates("haswell"), source="this machine, measured", is_measured=True)


def test_kept_rates_are_found_again(tmp_path: Path) -> None:
    kept = keep_rates(tmp_path / "new", TARGET, RATES)
    found = known_rates(tmp_path / "new", TARGET)
    assert found.rates == RATES == kept.rates
    assert [p.name for p in (tmp_path / "new").iterdir()] == [kept.path.name]  # no temporaries


def test_a_machine_that_was_not_measured(tmp_path: Path) -> None:
    found = known_rates(tmp_path, TARGET)
    assert found.rates is None
    assert "run `sparsec calibrate`" in found.note


@pytest.mark.parametrize(
    "changed",
    [{"isas": (Isa.AVX2, Isa.AVX512)}, {"l2_bytes": 1 << 21}],
    ids=["isas", "caches"],
)
def test_another_machine_has_a_file_of_its_own(tmp_path: Path, changed: dict[str, object]) -> None:
    keep_rates(tmp_path, TARGET, RATES)
    assert known_rates(tmp_path, replace(TARGET, **changed)).rates is None


def test_the_cores_that_a_process_may_use_change_nothing(tmp_path: Path) -> None:
    keep_rates(tmp_path, TARGET, RATES)
    assert known_rates(tmp_path, replace(TARGET, cores=1)).rates == RATES


def broken(text: str, path: tuple[object, ...], value: object) -> str:
    found = json.loads(text)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(found)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("format",), 0, "another version"),
        (("machine", "l2_bytes"), 64, "another machine"),
        (("rates", "hertz"), -1.0, "damaged"),
        (("rates", "hertz"), "fast", "damaged"),
        (("rates", "hertz"), float("nan"), "damaged"),
        (("rates", "bandwidth"), [1.0], "damaged"),
        (("rates", "ports"), [[512, {}]], "damaged"),
        (("rates",), None, "damaged"),
    ],
)
def test_a_file_that_is_wrong_is_not_used(
    tmp_path: Path, path: tuple[object, ...], value: object, why: str
) -> None:
    file = keep_rates(tmp_path, TARGET, RATES).path
    file.write_text(broken(file.read_text(), path, value))
    found = known_rates(tmp_path, TARGET)
    assert found.rates is None
    assert why in found.note
    assert "calibrate --force" in found.note
    target, note = with_known_rates(TARGET, tmp_path)
    assert target == TARGET
    assert why in note


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    file = keep_rates(tmp_path, TARGET, RATES).path
    file.write_text(text, encoding="latin-1")
    assert known_rates(tmp_path, TARGET).rates is None
    assert keep_rates(tmp_path, TARGET, RATES).rates == known_rates(tmp_path, TARGET).rates


def test_rates_are_of_this_machine_only(tmp_path: Path) -> None:
    keep_rates(tmp_path, TARGET, RATES)
    assert with_known_rates(TARGET, tmp_path)[0].rates == RATES
    named = Target.named("icelake-server")
    assert with_known_rates(named, tmp_path) == (named, "defaults of icelake-server")
    assert with_known_rates(TARGET, None) == (TARGET, TARGET.rates.source)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="XDG_CACHE_HOME"):
        keep_rates(tmp_path / "file" / "folder", TARGET, RATES)
