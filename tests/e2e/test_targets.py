"""One library for several targets: each computes what a library for it alone does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import sparsec
from sparsec import errors
from sparsec.cli import main
from sparsec.codegen.pack_weights import ALIGNMENT
from sparsec.models.build import Pruning, build_model
from sparsec.models.tiny import tiny_spec
from sparsec.options import Calibration
from sparsec.runtime import describe
from sparsec.target import Isa, Target
from sparsec.tools.inputs import random_inputs

NAMES = ("icelake-server", "skylake-avx512", "avx2")  # best first
SHAPE = (3, 33)
# One number of tokens: a kernel for each product, not one for each of several numbers. Attention
# in fp32 and products in int8 are kernels of every level.
OPTIONS: Mapping[str, Any] = {
    "precision": "int8",
    "calibration": Calibration(random=True),
    "attention": "fp32",
    "shapes": dict.fromkeys(("input_ids", "attention_mask"), SHAPE),
    "keep_padding": True,
}
Libraries = dict[str, Path]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("targets") / "m.onnx"
    model = build_model(tiny_spec("distilbert", layers=1), pruning=Pruning(0.7, 16, 1))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def libraries(onnx_file: Path) -> Libraries:
    """One per target, and under "all" one for all of them; in which order does not count."""
    wanted = {**{name: name for name in NAMES}, "all": ",".join(reversed(NAMES))}
    return {name: compile_for(onnx_file, target, name) for name, target in wanted.items()}


def compile_for(model: Path, target: str, name: str) -> Path:
    library = model.with_name(f"{name}.so")
    report = library.with_suffix(".json")
    sparsec.compile_model(model, library, target=target, report=report, **OPTIONS)
    return library


def report_of(library: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(library.with_suffix(".json").read_text())
    return found


def assert_same_answers(one: sparsec.Model, other: sparsec.Model) -> None:
    for seed in range(3):
        arrays = random_inputs(one, *SHAPE, seed=seed, padding=True)
        wanted, got = one(arrays), other(arrays)
        assert wanted.keys() == got.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.isa(Target.named(n).level.value)) for n in NAMES]
)
def test_each_target_computes_as_if_alone(name: str, libraries: Libraries) -> None:
    alone = sparsec.load(libraries[name], threads=2)
    forced = sparsec.load(libraries["all"], threads=2, isa=Target.named(name).level.value)
    assert forced.target == name
    assert_same_answers(alone, forced)
    assert forced.verify_weights()
    own, steps = forced.description, alone.description["steps"]
    assert own["steps"] == steps
    assert own["layers"] == alone.description["layers"]
    arrays = random_inputs(forced, *SHAPE, seed=0, padding=False)
    assert len(forced.run_timed(arrays)[1]) == len(steps)


def test_the_best_that_the_cpu_has_is_chosen(libraries: Libraries, host: Target) -> None:
    model = sparsec.load(libraries["all"], threads=1)
    levels = {name: Target.named(name).level for name in NAMES}
    assert model.targets == {name: level.value for name, level in levels.items()}
    assert model.target == next(name for name, level in levels.items() if host.has(level))
    assert model.description["target"] == model.target


@pytest.mark.isa("amx")
def test_amx_is_chosen_where_it_is(onnx_file: Path, amx_models: object) -> None:
    alone = compile_for(onnx_file, "sapphirerapids", "amx")
    both = compile_for(onnx_file, "sapphirerapids,avx2", "amx_and_avx2")
    model = sparsec.load(both, threads=2)
    assert (model.target, model.description["isa"]) == ("sapphirerapids", "amx")
    assert_same_answers(sparsec.load(alone, threads=2), model)


def test_equal_constants_are_stored_once(libraries: Libraries) -> None:
    weights = report_of(libraries["all"])["weights"]
    alone = {name: report_of(libraries[name])["weights"] for name in NAMES}
    assert weights["target_bytes"] == {n: w["shared_bytes"] for n, w in alone.items()}
    assert 0 < weights["shared_bytes"] <= min(weights["target_bytes"].values())
    # On top of what all targets share comes at most what each has of its own.
    own = [size - weights["shared_bytes"] for size in weights["target_bytes"].values()]
    count = sum(describe(libraries[name])["weights"]["count"] for name in NAMES)
    assert weights["bytes"] <= weights["shared_bytes"] + sum(own) + count * ALIGNMENT
    # Of each target its code and tables are there, and not more than that.
    code = sum(libraries[n].stat().st_size - w["bytes"] for n, w in alone.items())
    assert libraries["all"].stat().st_size <= weights["bytes"] + code


def test_targets_that_agree_cost_their_tables_only(onnx_file: Path, libraries: Libraries) -> None:
    """int8 for Cooper Lake and Ice Lake uses the same kernels and weights here."""
    both = compile_for(onnx_file, "icelake-server,cooperlake", "both")
    alone = libraries["icelake-server"]
    weights = report_of(both)["weights"]
    assert weights["bytes"] == report_of(alone)["weights"]["bytes"]
    assert set(weights["target_bytes"].values()) == {weights["shared_bytes"]}
    text = len(json.dumps(describe(alone)))
    calls = len(describe(alone)["steps"])
    assert both.stat().st_size - alone.stat().st_size < 2 * text + 512 * calls


def test_avx512_without_vnni(libraries: Libraries) -> None:
    """Products in int8 then use AVX2 kernels, all else AVX-512."""
    report = report_of(libraries["skylake-avx512"])
    schedules = {x["op"]: x["schedule"] for x in report["layers"]}
    assert report["isa"] == "avx512"
    assert schedules["linear_int8"].startswith("int8_gemm.avx2(")
    assert schedules["attention"].startswith("attention.avx512(")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("avx2,pentium", {}, "unknown target 'pentium'; known targets are native, sapphirerapids"),
        ("avx2,", {}, "unknown target ''"),
        ("avx2,avx2", {}, "got avx2 twice, which are both avx2; keep one"),
        ("haswell,avx2", {}, "got haswell and avx2, which are both avx2; keep one"),
        ("native,native", {}, "got native twice"),
        ("znver4,avx2", {"isa": Isa.AVX2}, "--isa avx2 limits one target"),
        ("znver4,avx2", {"precision": "bf16"}, "bf16 needs avx512bf16, which the target avx2"),
    ],
)
def test_targets_that_are_refused(
    target: str, options: Any, message: str, onnx_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(errors.InvalidInput, match=message):
        sparsec.compile_model(onnx_file, tmp_path / "m.so", target=target, **options)
    assert list(tmp_path.iterdir()) == []


def test_compile_says_what_each_target_has(
    onnx_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library, report, ir = tmp_path / "m.so", tmp_path / "r.json", tmp_path / "ir"
    words = ["compile", str(onnx_file), "-o", str(library), "--target", "avx2,skylake-avx512"]
    words += ["--precision", "int8", "--calibration", "random", "--attention", "fp32"]
    words += ["--shape", "input_ids=1x4", "--shape", "attention_mask=1x4", "--keep-padding"]
    assert main([*words, "--report", str(report), "--dump-ir", str(ir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "MB for avx512, avx2" in lines[0]
    assert lines[1].startswith("weights: ")
    note = "int8 products use AVX2 kernels: the target has AVX-512 without VNNI"
    assert lines.index("skylake-avx512:") < lines.index(note) < lines.index("avx2:")
    found = json.loads(report.read_text())
    assert (found["target"], found["isa"]) == ("skylake-avx512", "avx512")
    assert [(o["target"], o["isa"]) for o in found["other_targets"]] == [("avx2", "avx2")]
    dumps = {p.name for p in ir.iterdir()} - {"avx2", "skylake-avx512"}
    own = sorted(p.name for p in (ir / "avx2").iterdir())
    # Numbers go on where those of the common passes end.
    assert own[0].startswith(f"{len(dumps) + 1:02d}_quantize")


def test_tools_take_a_level(libraries: Libraries, capsys: pytest.CaptureFixture[str]) -> None:
    library = str(libraries["all"])
    assert main(["inspect", library, "--isa", "avx2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "skylake-avx512 (avx512), avx2 (avx2); this is avx2" in shown
    shape = ["--batch", str(SHAPE[0]), "--seq", str(SHAPE[1])]
    words = ["profile", library, "--isa", "avx2", "--runs", "2", "--json", *shape]
    assert main(words) == 0
    profiled = json.loads(capsys.readouterr().out)
    assert profiled["target"] == "avx2"
    assert profiled["steps"]
    assert not [s["kernel"] for s in profiled["steps"] if "avx512" in s["kernel"]]
    assert main(["bench", library, "--isa", "amx", "-q", *shape]) == 2
    assert "'amx': " in capsys.readouterr().err
