"""This machine is measured, once; no test says how fast it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsec.codegen import probes, tir
from sparsec.codegen.isa import vector_isas
from sparsec.codegen.isa.amx import ALL_FULL
from sparsec.errors import InvalidInput
from sparsec.target import Target
from sparsec.tuning import machine
from sparsec.tuning.machine import calibrate


def ignore(stage: str) -> None:
    pass


def test_a_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MAX_BUFFER_BYTES", 16 << 20)
    monkeypatch.setattr(machine, "TARGET_SECONDS", 3e-4)
    first = calibrate(tmp_path, progress=ignore)
    assert first.rates is not None
    assert first.rates.is_measured
    names = {name for name, _ in first.rates.products}
    assert {f"f32.{v.name}" for v in vector_isas(Target.host())} <= names
    assert all(rate > 0 for _, rate in first.rates.products)
    monkeypatch.setattr(machine, "measure", lambda target, progress: pytest.fail("measured again"))
    assert calibrate(tmp_path, progress=ignore) == first
    again = first.rates
    monkeypatch.setattr(machine, "measure", lambda target, progress: again)
    assert calibrate(tmp_path, force=True, progress=ignore) == first
    first.path.write_text("{")
    assert calibrate(tmp_path, progress=ignore) == first


def test_nothing_is_measured_that_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(machine, "measure", lambda target, progress: pytest.fail("measured"))
    with pytest.raises(InvalidInput, match="XDG_CACHE_HOME"):
        calibrate(tmp_path / "file" / "sparsec", progress=ignore)


def test_probes_of_tiles_and_pairs_are_compiled_on_any_machine() -> None:
    found = probes.product_probes(frozenset({"amx_tile", "amx_int8", "amx_bf16"}))
    for name in ("u8s8.amx", "bf16.amx", "bf16.avx512bf16"):
        data = tir.build_object([found[name].build()], found[name].features)
        assert found[name].name.encode() in data
    assert not {"u8s8.amx", "bf16.amx"} & probes.product_probes(frozenset()).keys()


def test_configuration_of_full_tiles() -> None:
    data = bytes(ALL_FULL)
    assert len(data) == 64
    assert data[0] == 1  # palette
    assert data[16:32] == bytes([64, 0]) * 8  # bytes of a row, per tile
    assert data[48:56] == bytes([16]) * 8  # rows
