"""Reads files of examples; what is wrong is refused with its line."""

from __future__ import annotations

import csv
import io
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sparsec.errors import InvalidInput
from sparsec.models.compress.data import truncating

SENTENCE_HEADER = ("sentence", "label")
PAIR_HEADER = ("sentence1", "sentence2", "score")
SST2_CLASSES = 2
LARGEST_SCORE = 5.0  # of STS-B
LONGEST_SHOWN = 60  # characters of a line in a message

# Wiki markup (" = Title = ") and Markdown ("# Title").
_HEADING = re.compile(r"(=.*=|#{1,6}\s.*)")
_SENTENCE_END = re.compile(r"([.!?][\"'’”)\]]*)\s+")


def read_text(path: Path) -> str:
    """The whole file.

    Raises InvalidInput when it is missing, no file, empty, or not UTF-8 (with the line).
    """
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "no such file"
        raise InvalidInput(f"{path}: {what}")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidInput(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); "
            "convert it, for example with iconv -t UTF-8"
        ) from None
    if not text.strip():
        raise InvalidInput(f"{path}: the file is empty")
    return text


def read_sentences(path: Path, classes: int) -> tuple[list[str], list[int]]:
    """Sentences and labels of a tab-separated file with the header line sentence, label.

    Quotes are plain characters, as in GLUE. Raises InvalidInput naming the line.
    """
    header = "\t".join(SENTENCE_HEADER)
    lines = _lines(read_text(path))
    _, first = next(lines)
    if first != header:
        raise InvalidInput(
            f"{path}:1: wanted the header line {header!r} (with a tab), got {_short(first)}"
        )
    sentences, labels = [], []
    for number, line in lines:
        place = f"{path}:{number}"
        sentence, label = _columns(place, line.split("\t"), SENTENCE_HEADER)
        sentences.append(_sentence(place, sentence))
        labels.append(_label(place, label, classes))
    _check_any(path, sentences)
    return sentences, labels


def read_pairs(path: Path) -> tuple[list[str], list[str], list[float]]:
    """Both sentences and the score, 0 to 5, of each record of a comma-separated file.

    A header line sentence1,sentence2,score may come first. Raises InvalidInput naming the line.
    """
    left: list[str] = []
    right: list[str] = []
    scores: list[float] = []
    for place, record in _records(path):
        if record == list(PAIR_HEADER) and not scores:
            continue
        one, two, score = _columns(place, record, PAIR_HEADER)
        left.append(_sentence(place, one))
        right.append(_sentence(place, two))
        scores.append(_score(place, score))
    _check_any(path, scores)
    return left, right, scores


def read_pieces(path: Path, tokenizer: Tokenizer, max_length: int) -> list[str]:
    """A text as pieces of at most `max_length` tokens, special tokens included.

    A line is a paragraph; blank lines and headings are dropped. Of a .tsv file of sentences with
    labels, or a .csv file of pairs with scores, the sentences are the paragraphs. One that is too
    long is cut behind a sentence, where there is none behind a word. Raises InvalidInput when no
    paragraph is left.
    """
    paragraphs = _PARAGRAPHS.get(path.suffix, _plain_paragraphs)(path)
    whole = truncating(tokenizer, None)
    truncating(tokenizer, max_length)  # whether there is room
    room = max_length - whole.num_special_tokens_to_add(is_pair=False)
    rows = whole.encode_batch(paragraphs, add_special_tokens=False)
    return [
        piece
        for text, row in zip(paragraphs, rows, strict=True)
        for piece in ([text] if len(row) <= room else _cut(text, row, room))
    ]


def _plain_paragraphs(path: Path) -> list[str]:
    lines = [line.strip() for _, line in _lines(read_text(path))]
    paragraphs = [line for line in lines if line and not _HEADING.fullmatch(line)]
    _check_any(path, paragraphs)
    return paragraphs


def _paragraphs_of_pairs(path: Path) -> list[str]:
    left, right, _ = read_pairs(path)
    return [*left, *right]


_PARAGRAPHS = {
    ".tsv": lambda path: read_sentences(path, SST2_CLASSES)[0],
    ".csv": _paragraphs_of_pairs,
}


def _cut(text: str, row: Any, room: int) -> Iterator[str]:
    """Pieces of `text` of at most `room` tokens; `row` is what the tokenizer made of all of it."""
    begins, words = [start for start, _ in row.offsets], row.word_ids  # characters, numbers
    sentences = [bisect_left(begins, found.end(1)) for found in _SENTENCE_END.finditer(text)]
    behind_words = [k for k in range(1, len(row)) if words[k] != words[k - 1]]
    first = 0
    while first < len(row):
        end = first + room
        if end < len(row):
            end = _last(sentences, first, end) or _last(behind_words, first, end) or end
        piece = text[begins[first] : begins[end] if end < len(row) else len(text)].strip()
        if piece:
            yield piece
        first = end


def _last(places: list[int], above: int, limit: int) -> int | None:
    """The last of the rising `places` that is above one number and at most the other."""
    at = bisect_right(places, limit)
    return places[at - 1] if at and places[at - 1] > above else None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Line numbers and lines; only line feeds end a line, and blank lines at the end are none."""
    lines = text.rstrip().split("\n")
    return ((number, line.rstrip("\r")) for number, line in enumerate(lines, start=1))


def _records(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Place (file and first line) and fields of each record of a comma-separated file."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise InvalidInput(
                f"{place}: not comma-separated values: {error}; a quote inside a field is "
                "written twice"
            ) from None
        if record is None:
            return
        if record:
            yield place, record


def _columns(place: str, fields: list[str], wanted: Sequence[str]) -> list[str]:
    if len(fields) != len(wanted):
        raise InvalidInput(
            f"{place}: wanted {len(wanted)} columns ({', '.join(wanted)}), got {len(fields)}: "
            f"{_short(' | '.join(fields))}"
        )
    return fields


def _sentence(place: str, text: str) -> str:
    stripped = text.strip()
    if not stripped:
        raise InvalidInput(f"{place}: the sentence is empty; delete the line")
    return stripped


def _label(place: str, text: str, classes: int) -> int:
    wanted = f"wanted a whole number from 0 to {classes - 1}"
    if not text.strip().isdecimal():
        raise InvalidInput(f"{place}: the label {_short(text)} is not a number; {wanted}")
    digits = text.strip().lstrip("0") or "0"
    if len(digits) > 9 or int(digits) >= classes:
        raise InvalidInput(f"{place}: the label {_short(text)} is out of range; {wanted}")
    return int(digits)


def _score(place: str, text: str) -> float:
    wanted = f"wanted 0 to {LARGEST_SCORE:g}"
    try:
        score = float(text)
    except ValueError:
        raise InvalidInput(
            f"{place}: the score {_short(text)} is not a number; {wanted}"
        ) from None
    if not 0 <= score <= LARGEST_SCORE:  # NaN fails too
        raise InvalidInput(f"{place}: the score {_short(text)} is out of range; {wanted}")
    return score


def _check_any(path: Path, found: Sequence[Any]) -> None:
    if not found:
        raise InvalidInput(f"{path}: holds no example")


def _short(text: str) -> str:
    return repr(text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "...")
