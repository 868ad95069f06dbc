"""The command `compress` around the training, which a double stands for here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

torch = pytest.importorskip("torch", reason="compress needs the extra compress")

from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

import sparsec  # noqa: E402
from sparsec.cli import main  # noqa: E402
from sparsec.cli_compress import FIELDS  # noqa: E402
from sparsec.errors import InvalidInput  # noqa: E402
from sparsec.models.compress.data import load_tokenizer  # noqa: E402
from sparsec.models.compress.recipe import Recipe  # noqa: E402
from sparsec.models.compress.tasks import TASKS, evaluate  # noqa: E402
from sparsec.models.evaluate import evaluator  # noqa: E402
from sparsec.models.tiny import tiny_model  # noqa: E402
from sparsec.tools import compress  # noqa: E402

POSITIONS = 64  # of the tiny model
LAYERS = {"encoder.layer.0.attention.query": 0.75, "encoder.layer.1.ffn": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as far as the command itself reads it, and data."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{k}" for k in range(96))]
    made = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.save(str(model / "tokenizer.json"))
    rows = [f"{' '.join(f'w{(7 * k + j) % 96}' for j in range(1 + k % 20))}" for k in range(60)]
    tsv = "".join(f"{row}\t{k % 2}\n" for k, row in enumerate(rows))
    (tmp_path / "x.tsv").write_text("sentence\tlabel\n" + tsv)
    pairs = itertools.pairwise(rows)
    csv = "".join(f"{a},{b},{k % 6}\n" for k, (a, b) in enumerate(pairs))
    (tmp_path / "x.csv").write_text(csv)
    return tmp_path


def double(head: Any = "classify") -> tuple[SimpleNamespace, list[Any]]:
    """What stands for the pipeline, and the recipes that it was given."""
    seen: list[Any] = []

    def run(recipe: Any, *, targets: Any, tell: Callable[..., None]) -> SimpleNamespace:
        seen.append(recipe)
        recipe.output.mkdir(exist_ok=True)
        (recipe.output / "recipe.json").write_text(recipe.to_json())
        log = {"stage": "prune", "step": 0, "steps": 1, "loss": 1.0, "sparsity": 0.8}
        (recipe.output / "log.jsonl").write_text(json.dumps(log) + "\n")
        tell("prune: loss 1.0000", 1, 1)
        onnx.save(tiny_model(head=head), recipe.output / "model.onnx")
        stages = ("teacher", "prune", "tune", "quantise")
        dev = {stage: {"accuracy": 0.1 * k} for k, stage in enumerate(stages, start=1)}
        onnx_file = recipe.output / "model.onnx"
        return SimpleNamespace(onnx=onnx_file, dev=dev, layers=LAYERS, positions=POSITIONS)

    return SimpleNamespace(compress=run), seen


def reference(model: onnx.ModelProto, task: Any, encoded: Any) -> dict[str, float]:
    """The score of the ONNX file."""
    names, run = [value.name for value in model.graph.input], evaluator(model)
    return evaluate(lambda arrays: run({n: arrays[n] for n in names}), task, encoded)


def arguments(folder: Path, *more: str) -> list[str]:
    data = str(folder / "x.tsv")
    return [
        "compress", str(folder / "model"), "--task", "sst2", "--train", data, "--dev", data,
        "-o", str(folder / "out"), *more,
    ]  # fmt: skip


def test_the_command_measures_the_compiled_library(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline, seen = double()
    monkeypatch.setattr(compress, "_pipeline", lambda: pipeline)
    monkeypatch.setattr(compress, "BENCH_SECONDS", 0.01)
    options = ("--block", "4x1", "--sparsity", "0.7", "--epochs", "prune=4,quantise=0.5",
               "--distillation", "logits=3", "--text", str(folder / "x.csv"), "--no-permute",
               "--max-length", "32", "--threads", "1")  # fmt: skip
    assert main(arguments(folder, *options)) == 0
    recipe = seen[0]
    assert (recipe.block, recipe.sparsity, recipe.permute) == ("4x1", 0.7, False)
    assert (recipe.epochs.prune, recipe.epochs.quantise) == (4.0, 0.5)
    assert recipe.distillation.logits == 3.0
    assert recipe.distillation.labels > 0  # the default of the task's head
    assert recipe.text == (folder / "x.csv",)

    result = json.loads((folder / "out" / "result.json").read_text())
    task = TASKS["sst2"]
    encoded = task.read(folder / "x.tsv", load_tokenizer(folder / "model"), 32)
    expected = reference(tiny_model(head="classify"), task, encoded)
    assert result["dev"]["library"] == pytest.approx(expected)
    assert list(result["latency_ms"]) == ["32"]  # the model has no 128 positions
    assert result["latency_ms"]["32"]["median_ms"] > 0
    assert result["layers"] == LAYERS
    assert result["recipe"]["block"] == "4x1"
    assert (folder / "out" / "log.png").is_file()
    assert not list((folder / "out").glob("*.part"))

    printed = capsys.readouterr()
    assert "prune: loss 1.0000 (1/1)" in printed.err
    rows = {line.split("│")[1].strip(): line for line in printed.out.splitlines() if "│" in line}
    assert "0.1000" in rows["dense teacher, fp32 (torch)"]
    assert "0.3000" in rows["sparse, fp32 (torch)"]  # tuned, not only pruned
    assert "0.4000" in rows["sparse, int8 (simulated in torch)"]
    assert f"{expected['accuracy']:.4f}" in rows["sparse, model.so"]
    assert "0.750" in rows["encoder.layer.0.attention.query"]

    assert main(arguments(folder, *options)) == 2
    assert "holds this run already; add --resume" in capsys.readouterr().err
    assert main(arguments(folder, *options, "--seed", "3", "--resume")) == 2
    assert "another recipe (different: seed)" in capsys.readouterr().err
    compress.check_output(recipe, resume=True)
    assert len(seen) == 1


def test_pairs_are_evaluated_with_the_inputs_that_the_model_has(folder: Path) -> None:
    model = tiny_model("distilbert")
    onnx.save(model, folder / "m.onnx")
    sparsec.compile_model(folder / "m.onnx", folder / "m.so")
    task = TASKS["stsb"]
    encoded = task.read(folder / "x.csv", load_tokenizer(folder / "model"), 32)
    expected = reference(model, task, encoded)
    got = compress.evaluate_library(folder / "m.so", task, encoded, threads=1)
    assert got == pytest.approx(expected, abs=1e-3)
    assert len(model.graph.input) == 2  # no token types
    with pytest.raises(InvalidInput, match="no output logits, which the task sst2 needs"):
        compress.evaluate_library(folder / "m.so", TASKS["sst2"], encoded)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--task", "mnli"), "--task 'mnli': wanted one of sst2, stsb, embed, squad"),
        (("--sparsity", "0"), "--sparsity 0.0: wanted a share between 0 and 1"),
        (("--sparsity", "1"), "--sparsity 1.0: wanted"),
        (("--sparsity", "-0.5"), "--sparsity -0.5: wanted"),
        (("--criterion", "luck"), "criterion 'luck': wanted one of"),
        (("--epochs", "prune"), "--epochs 'prune': wanted NAME=NUMBER,... with names of teacher"),
        (("--epochs", "luck=1"), "--epochs 'luck=1': wanted NAME=NUMBER"),
        (("--rates", "prune=-1"), "prune -1.0: wanted 0 or more"),
        (("--distillation", "logits=x"), "with names of labels, logits"),
        (("--latency-ms", "1", "--sparsity", "0.5"), "leave out --sparsity"),
    ],
)
def test_wrong_options_are_refused(
    options: tuple[str, ...],
    wanted: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline, seen = double()
    monkeypatch.setattr(compress, "_pipeline", lambda: pipeline)
    assert main(arguments(folder, *options)) == 2
    assert wanted in capsys.readouterr().err
    assert seen == []
    assert not (folder / "out").exists()


def test_every_field_of_a_recipe_has_an_option() -> None:
    assert sorted(FIELDS) == sorted(entry.name for entry in fields(Recipe))


def test_folders_that_should_not_be_written_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline, seen = double()
    monkeypatch.setattr(compress, "_pipeline", lambda: pipeline)
    out = folder / "out"
    out.write_text("")
    assert main(arguments(folder)) == 2
    assert "out: is a file; wanted a folder" in capsys.readouterr().err
    out.unlink()
    out.mkdir()
    (out / "model.onnx").write_text("mine")
    assert main(arguments(folder, "--resume")) == 2
    assert "out: has model.onnx, and no recipe.json" in capsys.readouterr().err
    assert (out / "model.onnx").read_text() == "mine"
    monkeypatch.setattr(compress.os, "access", lambda *_: False)  # root may write anywhere
    assert main(arguments(folder, "-o", str(folder / "a" / "b"))) == 2
    assert f"b: no permission to write in {folder}" in capsys.readouterr().err
    assert seen == []


def test_a_run_that_was_refused_before_it_made_anything_does_not_keep_its_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Any] = []

    def refuse(recipe: Any, *, targets: Any, tell: Callable[..., None]) -> None:
        recipes.append(recipe)
        recipe.output.mkdir(exist_ok=True)
        (recipe.output / "recipe.json").write_text(recipe.to_json())
        raise InvalidInput("no")

    monkeypatch.setattr(compress, "_pipeline", lambda: SimpleNamespace(compress=refuse))
    assert main(arguments(folder)) == 2
    assert main(arguments(folder, "--sparsity", "0.7")) == 2
    assert [r.sparsity for r in recipes] == [0.8, 0.7]


def test_an_interrupted_run_says_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(recipe: Any, **_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "_pipeline", lambda: SimpleNamespace(compress=interrupted))
    assert main(arguments(folder)) == 130
    assert "with --resume goes on" in capsys.readouterr().err


def test_a_latency_gives_every_layer_its_sparsity(tiny_folder: Path) -> None:
    given = {name: tiny_folder / name for name in ("train", "dev", "output")}
    given |= {"model": tiny_folder, "task": "stsb", "block": "8x1", "latency_tokens": 32}
    advice = compress._advice(compress.make_recipe(given), (8, 1))
    dense, *sparse = [model["ms"] for model in advice["models"]]
    middle = (dense + min(sparse)) / 2

    def targets(ms: float | None) -> dict[str, float] | None:
        return compress.latency_targets(
            compress.make_recipe({**given, "latency_ms": ms}), lambda text, step, steps: None
        )

    assert targets(None) is None
    assert set((targets(2 * dense) or {}).values()) == {0.0}
    found = targets(middle) or {}
    assert len(found) == 12
    assert max(found.values()) > 0
    assert set(found.values()) <= {0.0, *compress.ADVISED}
    with pytest.raises(InvalidInput, match="--latency-ms 1e-06: the sparsest model takes"):
        targets(1e-6)


def test_the_whole_command(
    tiny_folder: Path, sst2_files: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(compress, "BENCH_SECONDS", 0.01)
    train, dev = map(str, sst2_files)
    arguments = [
        "compress", str(tiny_folder), "--task", "sst2", "--train", train, "--dev", dev,
        "--block", "8x1", "--sparsity", "0.5", "-o", str(tmp_path / "out"), "--no-permute",
        "--epochs", "teacher=4,prune=1,tune=0,quantise=0.3", "--device", "cpu", "--threads", "1",
        "--rates", "teacher=3e-3,prune=2e-3,tune=1e-3,quantise=3e-4", "--tokens-per-batch", "128",
    ]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["dev"]["library"]["accuracy"] > 0.9
    simulated = result["dev"]["quantise"]["accuracy"]
    assert result["dev"]["library"]["accuracy"] == pytest.approx(simulated, abs=0.04)
    printed = capsys.readouterr()
    assert "zero blocks of 8x1: 0.500 of each of 12 linears" in printed.out
    assert "quantise: loss" in printed.err
