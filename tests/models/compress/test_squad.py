"""SQuAD: windows, targets, spans and the official figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compress needs the extra compress")

from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

from sparsec.errors import InvalidInput  # noqa: E402
from sparsec.models.compress import squad  # noqa: E402
from sparsec.models.compress.tasks import TASKS  # noqa: E402

TASK = TASKS["squad"]
CONTEXT = " ".join(f"w{k}" for k in range(50)) + " ."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "?", ".", *(f"w{k}" for k in range(50))]
    made = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made


def question(text: str, answer: str, **more: Any) -> dict[str, Any]:
    start = CONTEXT.index(answer)
    return {
        "id": text,
        "question": text,
        "answers": [{"text": answer, "answer_start": start}],
        **more,
    }


def document(*questions: Any, context: str = CONTEXT) -> dict[str, Any]:
    paragraphs = [{"context": context, "qas": list(questions)}]
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}


def write(folder: Path, content: Any) -> Path:
    path = folder / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def oracle(windows: squad.Windows) -> list[Any]:
    """Logits that are right wherever the window holds the answer."""
    places = zip(windows.targets["start_positions"], windows.targets["end_positions"], strict=True)
    found = []
    for count, (start, end) in zip(np.diff(windows.starts), places, strict=True):
        logits = np.zeros((2, count), np.float32)
        if end:
            logits[[0, 1], [start, end]] = 5
        found.append(logits)
    return found


def test_windows_overlap_and_hold_their_answer(tokenizer: Any, tmp_path: Path) -> None:
    content = document(question("w1 ?", "w22 w23"), question("w2 ?", "w49 ."))
    windows = TASK.read(write(tmp_path, content), tokenizer, 32)
    assert isinstance(windows, squad.Windows)
    # 3 special tokens, 2 of the question: 27 of 51 tokens, 10 of them in the next window too
    assert windows.lengths.tolist() == [32, 32, 22] * 2
    assert windows.question_of.tolist() == [0, 0, 0, 1, 1, 1]
    batch = windows.batch([0, 1, 5])
    assert batch["start_positions"].tolist() == [26, 9, 19]
    assert batch["end_positions"].tolist() == [27, 10, 20]
    assert batch["token_type_ids"][0].tolist() == [0] * 4 + [1] * 28
    ids = batch["input_ids"]
    assert [tokenizer.id_to_token(k) for k in ids[1, 9:11].tolist()] == ["w22", "w23"]
    assert windows.targets["end_positions"].tolist() == [27, 10, 0, 0, 0, 20]
    assert TASK.score(oracle(windows), windows) == {"exact_match": 100, "f1": 100}


def test_a_long_question_is_cut_to_a_quarter(tokenizer: Any, tmp_path: Path) -> None:
    content = document(question(" ".join(["w1"] * 40), "w3"))
    windows = TASK.read(write(tmp_path, content), tokenizer, 32)
    assert windows.ids[:10].tolist() == [2, *[tokenizer.token_to_id("w1")] * 8, 3]
    assert TASK.score(oracle(windows), windows)["f1"] == 100


def test_prediction_takes_the_best_window_and_nothing_of_the_question(
    tokenizer: Any, tmp_path: Path
) -> None:
    windows = TASK.read(write(tmp_path, document(question("w5 ?", "w30 w31"))), tokenizer, 32)
    batch = windows.arrays([0, 1, 2])
    outputs = {f"{s}_logits": np.zeros(batch["input_ids"].shape) for s in ("start", "end")}
    for logits in outputs.values():
        logits[:, 1] = 50  # the question: no answer
        logits[2, 30] = 50  # padding
    outputs["start_logits"][:, 4] = 1
    outputs["end_logits"][:, 4] = 1  # w0, w17, w34
    place = int(windows.targets["start_positions"][1])
    outputs["start_logits"][1, place] = 3
    outputs["end_logits"][1, place + 1] = 3
    predicted = TASK.predict(outputs, batch)
    assert [p.shape for p in predicted] == [(2, 32), (2, 32), (2, 22)]
    assert squad.answers(predicted, windows) == ["w30 w31"]


def test_best_span_is_the_best_of_all_short_ones() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 29, 30, 31, 80):
        starts, ends = rng.standard_normal((2, count)) * 3
        spans = [
            (starts[i] + ends[j], i, j)
            for i in range(count)
            for j in range(i, min(count, i + squad.LONGEST_ANSWER))
        ]
        assert squad.best_span(starts, ends) == pytest.approx(max(spans))


@pytest.mark.parametrize(
    ("given", "wanted", "exact", "f1"),
    [
        ("The Normans", "normans", 1, 1),
        ("10th-century", "10thcentury!", 1, 1),
        ("an apple,  a day", "apple day", 1, 1),
        ("Theory", "ory", 0, 0),  # an article is a word
        ("in the late 1990s", "late 1990s", 0, 2 * (2 / 3) / (2 / 3 + 1)),
        ("a b b c", "b b d d", 0, 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("", "x", 0, 0),
    ],
)
def test_exact_match_and_f1(given: str, wanted: str, exact: float, f1: float) -> None:
    assert squad.exact_match(given, wanted) == exact
    assert squad.f1(given, wanted) == pytest.approx(f1)


def test_the_best_of_several_answers_counts(tokenizer: Any, tmp_path: Path) -> None:
    qa = question("w1 ?", "w7")
    qa["answers"] += [{"text": "w8 w9", "answer_start": CONTEXT.index("w8 w9")}]
    windows = TASK.read(write(tmp_path, document(qa)), tokenizer, 64)
    logits = np.zeros((2, int(windows.lengths[0])), np.float32)
    logits[[0, 1], 4 + 8] = 5  # w8
    assert TASK.score([logits], windows) == pytest.approx({"exact_match": 0, "f1": 200 / 3})


def test_an_answer_off_by_two_characters_is_found(tmp_path: Path) -> None:
    qa = question("w1 ?", "w7")
    qa["answers"][0]["answer_start"] += 2
    found = squad.read_questions(write(tmp_path, document(qa)))
    assert CONTEXT[found[0].start : found[0].end] == "w7"


def test_loss_leaves_padding_out() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"attention_mask": mask, "start_positions": torch.tensor([1, 0]),
             "end_positions": torch.tensor([1, 2])}  # fmt: skip
    logits = torch.tensor([[0.0, 0, 100], [0, 0, 0]])
    loss = TASK.loss({"start_logits": logits, "end_logits": logits}, batch)
    assert loss == pytest.approx((np.log(2) + np.log(3)) / 2)


BAD_START = question("q", "w1", answers=[{"text": "w1", "answer_start": 100}])


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", "the file is empty"),
        ('{"data": [\n1,]}', r"x\.json:2: not JSON: .* \(column 3\)"),
        ("[" * 100_000, r"x\.json: not JSON of questions: it is nested too deeply"),
        ('{"data": "\\ud83d"}', r"x\.json: holds '\\ud83d', which is half a character"),
        ([], r"x\.json: data: wanted a list, got nothing"),
        ({"data": {}}, "data: wanted a list, got dict"),
        ({"data": []}, "holds no question"),
        (
            {"data": [{"paragraphs": [{"qas": []}]}]},
            r"data\[0\]\.paragraphs\[0\]\.context: wanted",
        ),
        (document({"question": "q"}), r"paragraphs\[0\]\.qas\[0\]\.answers: wanted a list"),
        (document(question(" ", "w1")), r"qas\[0\]\.question: is empty"),
        (document(question("q", "w1"), {"answers": []}), r"qas\[1\]\.question: wanted a text"),
        (document(question("q", "w1", answers=[])), r"qas\[0\]: has no answer \(SQuAD 2\.0"),
        (document(question("q", "w1", is_impossible=True)), "has no answer"),
        (document(question("q", "w1", answers=[{"text": "w1"}])), "answer_start: wanted a whole"),
        (document(question("q", "w1", answers=[{"text": " ", "answer_start": 1}])), "is empty"),
        (document(BAD_START), r"answers\[0\]\.answer_start: wanted 'w1' at character 100"),
        (document(question("q", "w1", id=3)), r"qas\[0\]\.id: wanted a text, got int"),
    ],
)
def test_malformed_files_are_refused_with_the_field(
    content: Any, wanted: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=wanted):
        TASK.read(write(tmp_path, content), tokenizer, 64)


def test_short_windows_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="31 tokens is too short"):
        TASK.read(tmp_path / "x.json", tokenizer, 31)
