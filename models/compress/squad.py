"""SQuAD v1.1: questions over windows of their paragraph, and the official figures.

Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text (arXiv 1606.05250),
sections 3 and 6.1. Windows as in BERT's recipe (arXiv 1810.04805, section 4.2): an example is one
window; the best span of all windows of a question is its answer.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sparsec.errors import InvalidInput
from sparsec.models.compress.data import Batch, Encoded, flat, pad_id, truncating
from sparsec.models.compress.readers import read_text

Array = NDArray[Any]
Arrays = Mapping[str, Array]

LEAST_LENGTH = 32  # tokens of a window
QUESTION_SHARE = 1 / 4  # of a window, at most
OVERLAP_SHARE = 1 / 3  # of a window with the next: 128 tokens of 384, as usual
LONGEST_ANSWER = 30  # tokens
LARGEST_SHIFT = 2  # characters by which answer_start may be off
CHUNK = 512  # questions tokenised at once; their lists take memory

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Question:
    """Answers are the accepted texts; `start` and `end` (characters) are of the first one."""

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Windows(Encoded):
    """Windows as examples; what leads from tokens back to the text is kept for the score."""

    questions: tuple[Question, ...]
    question_of: NDArray[np.int64]  # [windows]
    in_context: NDArray[np.bool_]  # [tokens]: neither the question nor special
    spans: NDArray[np.int32]  # [tokens, 2]: first character and the one behind the last


def read_squad(path: Path, tokenizer: Tokenizer, max_length: int) -> Windows:
    """All windows of all questions, with the targets start_positions and end_positions.

    Positions are tokens of the window, both ends included; 0 (the first special token) where the
    answer is not wholly in the window. Raises InvalidInput naming line or field.
    """
    if max_length < LEAST_LENGTH:
        raise InvalidInput(
            f"a maximum length of {max_length} tokens is too short for a question and its "
            f"paragraph: wanted at least {LEAST_LENGTH}; 384 is usual"
        )
    questions = read_questions(path)
    rows, owners = [], []
    cut = truncating(
        tokenizer, max_length, strategy="only_second", stride=int(max_length * OVERLAP_SHARE)
    )
    texts = _shortened(tokenizer, [q.text for q in questions], int(max_length * QUESTION_SHARE))
    for first in range(0, len(questions), CHUNK):
        part = questions[first : first + CHUNK]
        pairs = [(text, q.context) for text, q in zip(texts[first:], part, strict=False)]
        for owner, row in enumerate(cut.encode_batch(pairs), start=first):
            for window in (row, *row.overflowing):
                rows.append(_Row(window))
                owners.append(owner)
    return _windows(questions, rows, np.array(owners, np.int64), pad_id(tokenizer))


class _Row:
    """A window in arrays; the tokenizer's own lists take ten times the memory."""

    def __init__(self, encoding: Any) -> None:
        self.ids = np.array(encoding.ids, np.int32)
        self.type_ids = np.array(encoding.type_ids, np.uint8)
        self.spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        self.in_context = np.array([side == 1 for side in encoding.sequence_ids], bool)

    def __len__(self) -> int:
        return len(self.ids)


def _windows(
    questions: tuple[Question, ...], rows: list[_Row], owners: NDArray[np.int64], pad: int
) -> Windows:
    places = [_positions(row, questions[k]) for row, k in zip(rows, owners, strict=True)]
    starts, ends = np.array(places, np.int64).T
    return Windows(
        1,
        *flat(rows),
        {"start_positions": starts.copy(), "end_positions": ends.copy()},
        pad,
        questions=questions,
        question_of=owners,
        in_context=np.concatenate([row.in_context for row in rows]),
        spans=np.concatenate([row.spans for row in rows]),
    )


def _positions(row: _Row, question: Question) -> tuple[int, int]:
    """First and last token of the answer, or zeros where the window does not hold all of it."""
    inside = np.flatnonzero(row.in_context)
    begins, ends = row.spans[inside].T
    if not len(inside) or question.start < begins[0] or question.end > ends[-1]:
        return 0, 0
    touched = inside[(begins < question.end) & (ends > question.start)]
    return (int(touched[0]), int(touched[-1])) if len(touched) else (0, 0)


def _shortened(tokenizer: Tokenizer, texts: list[str], most: int) -> list[str]:
    """Each question without what is behind its first `most` tokens."""
    rows = truncating(tokenizer, None).encode_batch(texts, add_special_tokens=False)
    return [
        text if len(row) <= most else text[: row.offsets[most - 1][1]]
        for text, row in zip(texts, rows, strict=True)
    ]


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a file in the official JSON form, v1.1.

    Raises InvalidInput naming the line of broken JSON, or the field that is missing or wrong.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
        # JSON may spell halves of characters, which no tokenizer reads.
        json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise InvalidInput(f"{path}: not JSON of questions: it is nested too deeply") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise InvalidInput(f"{path}: holds {half!r}, which is half a character") from None
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})"
        ) from None
    found = tuple(
        _question(f"{at}.qas[{k}]", qa, context)
        for at, context, qas in _paragraphs(f"{path}: ", content)
        for k, qa in enumerate(qas)
    )
    if not found:
        raise InvalidInput(f"{path}: holds no question")
    return found


def _paragraphs(place: str, content: Any) -> Iterator[tuple[str, str, list[Any]]]:
    """Place, context and questions of each paragraph."""
    for i, article in enumerate(_field(place, content, "data", list)):
        at = f"{place}data[{i}]"
        for k, paragraph in enumerate(_field(at, article, "paragraphs", list)):
            here = f"{at}.paragraphs[{k}]"
            context = _field(here, paragraph, "context", str)
            yield here, context, _field(here, paragraph, "qas", list)


def _question(place: str, qa: Any, context: str) -> Question:
    text = _field(place, qa, "question", str).strip()
    if not text:
        raise InvalidInput(f"{place}.question: is empty")
    answers = _field(place, qa, "answers", list)
    if not answers or qa.get("is_impossible"):
        raise InvalidInput(
            f"{place}: has no answer (SQuAD 2.0 has such questions, this task none); "
            "delete it, or give a file of v1.1"
        )
    found = [_answer(f"{place}.answers[{k}]", a, context) for k, a in enumerate(answers)]
    name = _field(place, qa, "id", str)
    return Question(name, text, context, tuple(t for t, _ in found), *_span(*found[0]))


def _answer(place: str, answer: Any, context: str) -> tuple[str, int]:
    """The text of an answer and where it is in the context."""
    text = _field(place, answer, "text", str)
    start = _field(place, answer, "answer_start", int)
    if not text.strip():
        raise InvalidInput(f"{place}.text: is empty")
    for shift in sorted(range(-LARGEST_SHIFT, LARGEST_SHIFT + 1), key=abs):
        if start + shift >= 0 and context.startswith(text, start + shift):
            return text, start + shift
    raise InvalidInput(
        f"{place}.answer_start: wanted {text[:60]!r} at character {start} of the context, "
        f"which has {context[max(0, start) :][: min(len(text), 60)]!r} there"
    )


def _span(text: str, start: int) -> tuple[int, int]:
    """First character and the one behind the last, without spaces around."""
    first = start + len(text) - len(text.lstrip())
    return first, first + len(text.strip())


def _field(place: str, holder: Any, name: str, kind: type) -> Any:
    value = holder.get(name) if isinstance(holder, dict) else None
    if isinstance(value, kind):
        return value
    came = "nothing" if value is None else type(value).__name__
    joint = "" if place.endswith(": ") else "."
    raise InvalidInput(
        f"{place}{joint}{name}: wanted {_KINDS[kind]}, got {came}; the official form is "
        "data[].paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}}}"
    )


_KINDS = {list: "a list", str: "a text", int: "a whole number"}


def span_loss(outputs: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """The mean of the cross entropies of start and end over the window's real tokens."""
    padding = batch["attention_mask"] == 0
    losses = []
    for side in ("start", "end"):
        logits = outputs[f"{side}_logits"].float().masked_fill(padding, -torch.inf)
        losses.append(torch.nn.functional.cross_entropy(logits, batch[f"{side}_positions"]))
    return (losses[0] + losses[1]) / 2


def predict_spans(outputs: Arrays, batch: Arrays) -> list[Array]:
    """Start and end logits of each window without its padding, fp32 [2, tokens]."""
    both = np.stack([outputs["start_logits"], outputs["end_logits"]], axis=1)
    lengths = batch["attention_mask"].sum(axis=1)
    return [
        logits[:, :count].astype(np.float32) for logits, count in zip(both, lengths, strict=True)
    ]


def score_spans(predictions: Sequence[Array], windows: Encoded) -> dict[str, float]:
    """Official exact match and F1 over the questions, 0 to 100."""
    assert isinstance(windows, Windows)
    pairs = list(zip(answers(predictions, windows), windows.questions, strict=True))
    exact = [max(exact_match(given, a) for a in q.answers) for given, q in pairs]
    shared = [max(f1(given, a) for a in q.answers) for given, q in pairs]
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(shared))}


def answers(predictions: Sequence[Array], windows: Windows) -> list[str]:
    """For each question the text of the best span of all its windows."""
    best = [(-np.inf, "")] * len(windows.questions)
    for k, logits in enumerate(predictions):
        row = slice(windows.starts[k], windows.starts[k + 1])
        inside = windows.in_context[row]
        owner = int(windows.question_of[k])
        if not inside.any():
            continue
        value, first, last = best_span(*logits[:, inside])
        if value > best[owner][0]:
            spans = windows.spans[row][inside]
            text = windows.questions[owner].context[spans[first, 0] : spans[last, 1]]
            best[owner] = (value, text)
    return [text for _, text in best]


def best_span(starts: Array, ends: Array) -> tuple[float, int, int]:
    """The largest sum of a start and an end logit, and their tokens, both included.

    Of all spans of at most LONGEST_ANSWER tokens, which are few enough to look at each.
    """
    before = np.full(LONGEST_ANSWER - 1, -np.inf)
    reach = np.lib.stride_tricks.sliding_window_view(
        np.concatenate([before, starts]), LONGEST_ANSWER
    )  # row e: the starts that a span with the end e may have
    sums = reach.max(axis=1) + ends
    last = int(sums.argmax())
    return float(sums[last]), last - LONGEST_ANSWER + 1 + int(reach[last].argmax()), last


def normalised(text: str) -> str:
    """In lower case, without punctuation, without articles, single spaces between words."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(given: str, wanted: str) -> float:
    """1 where both are the same text once normalised, else 0."""
    return float(normalised(given) == normalised(wanted))


def f1(given: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the words that both have, each as often."""
    ours, theirs = (Counter(normalised(text).split()) for text in (given, wanted))
    same = (ours & theirs).total()
    return 2 * same / (ours.total() + theirs.total()) if same else 0.0
