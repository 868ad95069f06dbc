"""All stages on a tiny model: from a dense folder to a block-sparse ONNX file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsec.errors import InvalidInput

torch = pytest.importorskip("torch", reason="compress needs the extra compress")

from onnx import load, numpy_helper  # noqa: E402

from sparsec.models.compress import pipeline  # noqa: E402
from sparsec.models.compress.data import load_tokenizer  # noqa: E402
from sparsec.models.compress.pipeline import compress  # noqa: E402
from sparsec.models.compress.recipe import Distillation, Epochs, Rates, Recipe  # noqa: E402
from sparsec.models.compress.tasks import evaluate, find_task  # noqa: E402
from sparsec.models.evaluate import evaluator  # noqa: E402
from sparsec.sparse.bsr import block_zeros  # noqa: E402

EPOCHS = Epochs(teacher=6, prune=2, tune=1, quantise=0.5)
RATES = Rates(teacher=3e-3, prune=2e-3, tune=1e-3, quantise=3e-4)


@pytest.fixture
def recipe(tiny_folder: Path, sst2_files: tuple[Path, Path], tmp_path: Path) -> Recipe:
    train, dev = sst2_files
    return Recipe(
        tiny_folder, "sst2", train, dev, tmp_path / "out", block="8x1", sparsity=0.5,
        epochs=EPOCHS, rates=RATES, tokens_per_batch=128, max_length=32, device="cpu", threads=1,
        permute=False,
    )  # fmt: skip


def score(onnx: Path, recipe: Recipe) -> dict[str, float]:
    """Of the ONNX file, by the evaluator that is installed."""
    task = find_task(recipe.task)
    dev = task.read(recipe.dev, load_tokenizer(recipe.model), recipe.max_length)
    model = load(onnx)
    names = [i.name for i in model.graph.input]
    run = evaluator(model)
    return evaluate(lambda arrays: run({n: arrays[n] for n in names}), task, dev)


def accuracy(onnx: Path, recipe: Recipe) -> float:
    return score(onnx, recipe)["accuracy"]


def weights_s8(onnx: Path) -> list[np.ndarray]:
    """The quantised weights `[out, in]` of products."""
    found = (numpy_helper.to_array(t) for t in load(onnx).graph.initializer)
    return [array.T for array in found if array.dtype == np.int8 and array.ndim == 2]


@pytest.mark.parametrize("criterion", ["obs", "magnitude", "movement", "snip"])
def test_makes_a_sparse_int8_model_that_does_the_task(recipe: Recipe, criterion: str) -> None:
    recipe = replace(recipe, criterion=criterion)
    made = compress(recipe)
    assert made.dev["teacher"]["accuracy"] > 0.9
    assert made.dev["quantise"]["accuracy"] > 0.9
    assert accuracy(made.onnx, recipe) == pytest.approx(made.dev["quantise"]["accuracy"], abs=0.04)
    assert all(share == pytest.approx(0.5, abs=0.05) for share in made.layers.values())
    weights = weights_s8(made.onnx)
    assert len(weights) == 12
    for weight in weights:
        assert block_zeros(weight, [(8, 1)])[8, 1] >= 0.45
    lines = [json.loads(text) for text in (recipe.output / "log.jsonl").read_text().splitlines()]
    stages = [line["stage"] for line in lines]
    assert list(dict.fromkeys(stages)) == ["teacher", "prune", "tune", "quantise"]
    later = [line["sparsity"] for line in lines if line["stage"] in ("tune", "quantise")]
    assert later == pytest.approx([0.5] * len(later), abs=0.05)


def test_a_second_run_finds_everything_done(recipe: Recipe) -> None:
    first = compress(recipe)
    before = first.onnx.read_bytes()
    steps: list[str] = []
    again = compress(recipe, tell=lambda text, step, of: steps.append(text))
    assert again == first
    assert again.onnx.read_bytes() == before
    assert not steps


def test_another_block_starts_from_the_same_teacher_and_a_sparser_one_from_the_sparse_folder(
    recipe: Recipe, tmp_path: Path
) -> None:
    first = compress(recipe)
    sparser = replace(
        recipe, output=tmp_path / "sparser", teacher=first.teacher, start=first.sparse,
        sparsity=0.75, criterion="magnitude",
    )  # fmt: skip
    made = compress(sparser)
    assert made.dev["teacher"] == first.dev["teacher"]
    assert all(share == pytest.approx(0.75, abs=0.05) for share in made.layers.values())


def test_a_start_that_is_sparse_enough_keeps_its_pattern(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prune stage is training on text alone: nothing is chosen again."""
    first = compress(recipe)
    monkeypatch.setattr(pipeline, "prune_one_shot", None)
    made = compress(
        replace(recipe, output=tmp_path / "more", teacher=first.teacher, start=first.sparse)
    )
    assert made.layers == first.layers
    log = [json.loads(line) for line in (tmp_path / "more" / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log} >= {"prune", "tune"}


def test_sparsities_of_a_latency_are_kept_for_a_run_that_goes_on(recipe: Recipe) -> None:
    recipe = replace(recipe, one_shot=True, epochs=Epochs(0.1, 0, 0, 0))
    first = compress(recipe)
    targets = dict.fromkeys(first.layers, 0.25)  # grids of 128 and 256 blocks
    again = replace(recipe, output=recipe.output.with_name("again"), teacher=first.teacher)
    made = compress(again, targets=targets)
    assert set(made.layers.values()) == {0.25}
    assert json.loads((again.output / "sparsities.json").read_text()) == targets


def test_a_larger_teacher_is_learnt_from_by_logits_and_relations(
    recipe: Recipe, larger_folder: Path, tmp_path: Path
) -> None:
    short = replace(recipe, one_shot=True, quantise=False, epochs=Epochs(6, 0, 0, 0))
    teacher = compress(replace(short, model=larger_folder, output=tmp_path / "large")).teacher
    other = replace(recipe, teacher=teacher, quantise=False)
    with pytest.raises(InvalidInput, match="hidden=0,embedding=0,relations=1"):
        compress(other)
    weights = Distillation(labels=0, logits=1, hidden=0, relations=1)
    made = compress(replace(other, distillation=weights, epochs=Epochs(0, 6, 1, 0)))
    assert made.dev["teacher"]["accuracy"] > 0.9
    assert made.dev["tune"]["accuracy"] > 0.9


def test_one_shot_needs_no_training(recipe: Recipe, tmp_path: Path) -> None:
    teacher = compress(replace(recipe, epochs=Epochs(6, 0.1, 0, 0))).teacher
    steps: list[str] = []
    recipe = replace(recipe, output=tmp_path / "one", teacher=teacher, one_shot=True)
    made = compress(recipe, tell=lambda text, step, of: steps.append(text))
    assert not steps
    assert made.dev["one-shot"]["accuracy"] > 0.7
    assert all(share == pytest.approx(0.5, abs=0.05) for share in made.layers.values())


def test_one_shot_needs_no_data_of_the_task_but_a_model_that_knows_it(
    recipe: Recipe, tmp_path: Path
) -> None:
    teacher = compress(replace(recipe, epochs=Epochs(6, 0.1, 0, 0))).teacher
    text = tmp_path / "text.txt"
    lines = recipe.train.read_text().splitlines()[1:] if recipe.train else []
    text.write_text("\n".join(line.split("\t")[0] for line in lines))
    alone = replace(recipe, output=tmp_path / "one", train=None, text=(text,), one_shot=True)
    made = compress(replace(alone, teacher=teacher))
    assert made.dev["one-shot"]["accuracy"] > 0.7
    with pytest.raises(InvalidInput, match=r"has no weights for classifier.* nothing to learn"):
        compress(replace(alone, output=tmp_path / "two"))


def test_embeddings_are_learnt_from_the_dense_model_alone(recipe: Recipe, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    words = ["film plot", "great scene", "dull actor", "warm music", "cold story", "poor film"]
    pairs.write_text("".join(f"{a},{b},{k % 6}\n" for k, (a, b) in enumerate(pairwise(words))))
    made = compress(replace(recipe, task="embed", train=pairs, dev=pairs))
    lines = [json.loads(text) for text in (recipe.output / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"prune", "tune", "quantise"}
    assert {"embedding", "hidden", "similarity"} == set(lines[0]["losses"])
    assert made.dev["teacher"]["spearman"] <= 1


def test_answers_are_found_in_windows(recipe: Recipe, tmp_path: Path) -> None:
    """Questions name the word in front of the answer; contexts take two windows."""
    vocabulary = sorted(load_tokenizer(recipe.model).get_vocab())
    known = [word for word in vocabulary if word.isalpha()]
    rng = np.random.default_rng(0)
    paragraphs = []
    for k in range(40):
        words = [str(word) for word in rng.permutation(known * 3)]
        context, place = " ".join(words), int(rng.integers(1, len(words)))
        start = len(" ".join(words[:place])) + 1
        answer = {"text": words[place], "answer_start": start}
        asked = {"id": str(k), "question": words[place - 1], "answers": [answer]}
        paragraphs.append({"context": context, "qas": [asked]})
    data = tmp_path / "squad.json"
    data.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": paragraphs}]}))
    recipe = replace(recipe, task="squad", train=data, dev=data, epochs=Epochs(2, 1, 0, 0.5))
    made = compress(recipe)
    assert set(made.dev) == {"teacher", "prune", "quantise"}
    simulated = made.dev["quantise"]
    assert 0 <= simulated["exact_match"] <= simulated["f1"] <= 100
    assert score(made.onnx, recipe) == pytest.approx(simulated, abs=10)  # 2.5 a question
    lines = [json.loads(text) for text in (recipe.output / "log.jsonl").read_text().splitlines()]
    teacher = [line["loss"] for line in lines if line["stage"] == "teacher"]
    assert teacher[-1] < teacher[0]


def test_embeddings_need_pairs_to_be_scored(recipe: Recipe, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a film\n")
    with pytest.raises(InvalidInput, match=r"text\.txt: has nothing to score by"):
        compress(replace(recipe, task="embed", train=text, dev=text))


def test_without_quantisation_the_file_is_fp32(recipe: Recipe) -> None:
    made = compress(replace(recipe, quantise=False))
    assert not weights_s8(made.onnx)
    assert accuracy(made.onnx, recipe) == made.dev["tune"]["accuracy"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"block": "7x1"}, "does not divide bert.encoder.layer.0"),
    ({"block": "2:4"}, "--criterion magnitude"),
    ({"block": "2:4", "criterion": "snip", "budget": "global"}, "--budget layer"),
    ({"block": "2:4", "criterion": "snip", "one_shot": True}, "without --one-shot"),
    ({"block": "2:4", "criterion": "snip", "sparsity": 0.8}, "no more than 0.5; give that"),
    ({"epochs": Epochs(prune=0)}, "nothing would be pruned"),
    ({"model": Path("nowhere")}, "nowhere"),
    ({"train": Path("nowhere.tsv")}, "nowhere.tsv"),
    ({"dev": Path("nowhere.tsv")}, "nowhere.tsv"),
    ({"task": "sst3"}, "sst3"),
    ({"teacher": Path("nowhere")}, "nowhere"),
])  # fmt: skip
def test_bad_requests_leave_nothing_behind(
    recipe: Recipe, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        compress(replace(recipe, **changes))
    assert not recipe.output.exists()


def test_rows_longer_than_the_table_of_positions_are_refused(
    recipe: Recipe, tmp_path: Path
) -> None:
    dev = tmp_path / "long.tsv"
    dev.write_text("sentence\tlabel\n" + "the " * 100 + "\t1\n")
    with pytest.raises(InvalidInput, match=r"rows of 102 tokens, .* can take 64"):
        compress(replace(recipe, dev=dev, max_length=128))
    assert not recipe.output.exists()


@pytest.mark.parametrize("role", ["model", "teacher"])
def test_a_model_without_a_row_for_every_token_is_refused(
    recipe: Recipe, role: str, tmp_path: Path
) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    small = tmp_path / "small"
    transformers.BertForSequenceClassification(config).save_pretrained(str(small))
    shutil.copy(recipe.model / "tokenizer.json", small)
    changes: dict[str, Any] = {role: small}
    with pytest.raises(InvalidInput, match="knows 5 tokens, and the tokenizer in"):
        compress(replace(recipe, **changes))


def test_a_head_of_another_number_of_classes_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    import transformers

    tuned = tmp_path / "three"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(recipe.model), num_labels=3
    )
    model.save_pretrained(str(tuned))
    with pytest.raises(InvalidInput, match=r"three: classifier.bias is \[3\], wanted \[2\]"):
        compress(replace(recipe, teacher=tuned))


def test_what_nothing_is_learned_from_is_refused(recipe: Recipe) -> None:
    alone = Distillation(labels=1, logits=0, hidden=0)
    with pytest.raises(InvalidInput, match="nothing is learned from joined, which has no labels"):
        compress(replace(recipe, distillation=alone, joined=True))
    with pytest.raises(InvalidInput, match="nothing is learned from"):
        compress(replace(recipe, distillation=Distillation(hidden=0), joined=False))
    assert not recipe.output.exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"sparsity": 0.0}, "--sparsity"), ({"sparsity": 1.0}, "--sparsity"),
    ({"sparsity": float("nan")}, "--sparsity"), ({"criterion": "luck"}, "criterion 'luck'"),
    ({"epochs": Epochs(tune=-1)}, "tune -1"), ({"prune_until": 0.0}, "prune_until"),
    ({"max_length": 3}, "max_length 3"), ({"device": "tpu"}, "device 'tpu'"),
    ({"seed": 10**20}, "seed 1000.*at most"), ({"seed": -1}, "seed -1"),
    ({"distillation": Distillation(temperature=0)}, "temperature 0"),
    ({"threads": -1}, "threads -1"), ({"text_share": 0}, "text_share"),
    ({"train": None}, "--train FILE is missing"),
    ({"train": None, "one_shot": True}, "--one-shot with --text"),
    ({"latency_ms": 0.0}, "--latency-ms 0.0"),
    ({"latency_ms": 1.0, "budget": "global"}, "--budget layer"),
    ({"latency_ms": 1.0, "block": "2:4"}, "it goes with blocks"),
])  # fmt: skip
def test_a_recipe_refuses_what_makes_no_sense(
    recipe: Recipe, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        replace(recipe, **changes)


def test_a_recipe_names_what_differs(recipe: Recipe) -> None:
    other = replace(recipe, sparsity=0.9, output=Path("elsewhere"), threads=2)
    assert recipe.differences(recipe.to_json()) == []
    assert recipe.differences(other.to_json()) == ["sparsity"]
