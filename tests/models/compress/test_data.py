"""Readers, tokenising and batches, with a tokenizer of whole words made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compress needs the extra compress")

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors  # noqa: E402

from sparsec.errors import InvalidInput  # noqa: E402
from sparsec.models.compress import metrics  # noqa: E402
from sparsec.models.compress.data import batches, load_tokenizer, truncating  # noqa: E402
from sparsec.models.compress.tasks import TASKS, evaluate, find_task  # noqa: E402

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*'abcdefgh.,"', "one", "two", "three"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words and punctuation in a BERT-like template; sets padding and truncation, as files do."""
    vocabulary = {word: k for k, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.add_special_tokens(SPECIAL)
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.enable_padding(length=99)
    made.enable_truncation(5)
    return made


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def words(tokenizer: Any, encoded: Any, k: int) -> str:
    ids = encoded.ids[encoded.starts[k] : encoded.starts[k + 1]].tolist()
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_sst2_is_read_padded_and_cut(tokenizer: Any, tmp_path: Path) -> None:
    text = 'sentence\tlabel\r\na "b c .\t1\r\nd\t0\na b c d e f g h\t1\n\n'
    encoded = TASKS["sst2"].read(write(tmp_path, "a.tsv", text), tokenizer, 7)
    assert len(encoded) == 3
    assert encoded.lengths.tolist() == [7, 3, 7]
    batch = encoded.batch([1, 0])
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].tolist() == [[2, 7, 3, 0, 0, 0, 0], [2, 4, 14, 5, 6, 12, 3]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 7]
    assert all(batch[n].dtype == torch.int64 for n in batch)
    assert tokenizer.truncation["max_length"] == 5  # what was given is left as it was


def test_stsb_rows_are_all_left_ones_then_all_right_ones(tokenizer: Any, tmp_path: Path) -> None:
    text = 'sentence1,sentence2,score\n"a, b",c,5\nd,"e ""f""",2.5\n\n'
    encoded = TASKS["stsb"].read(write(tmp_path, "a.csv", text), tokenizer, 16)
    assert (len(encoded), encoded.rows_per_example) == (2, 2)
    assert [words(tokenizer, encoded, k) for k in range(4)] == ["a , b", "d", "c", 'e " f "']
    assert encoded.lengths.tolist() == [5, 6]
    batch = encoded.batch([1, 0])
    assert batch["labels"].tolist() == [2.5, 5.0]
    assert batch["labels"].dtype == torch.float32
    assert batch["input_ids"][:, 1].tolist() == [7, 4, 8, 6]  # d, a, then e, c


def test_text_is_cut_behind_sentences_then_words(tokenizer: Any, tmp_path: Path) -> None:
    text = " = a = \n\n# b\na b . c d e . f\na b c d e f g h\n one \r\n"
    encoded = TASKS["text"].read(write(tmp_path, "a.txt", text), tokenizer, 7)
    pieces = [words(tokenizer, encoded, k) for k in range(len(encoded))]
    assert pieces == ["a b .", "c d e . f", "a b c d e", "f g h", "one"]
    assert encoded.targets == {}
    assert TASKS["text"].score(None, encoded) == {}


def test_a_word_longer_than_a_row_is_cut_inside(tmp_path: Path) -> None:
    pieces = {c: k for k, c in enumerate([*SPECIAL, *"abcd", *(f"##{c}" for c in "abcd")])}
    made = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]", max_input_chars_per_word=500))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    encoded = TASKS["text"].read(write(tmp_path, "a.txt", "abcd" * 5 + " ab"), made, 8)
    rows = [words(made, encoded, k) for k in range(len(encoded))]
    assert "".join(rows).replace("##", "").replace(" ", "") == "abcd" * 5 + "ab"
    assert encoded.lengths.max() == 8


def test_the_sentences_of_task_files_are_text(tokenizer: Any, tmp_path: Path) -> None:
    read = TASKS["text"].read
    plain = read(write(tmp_path, "a.txt", "a b\nc\n"), tokenizer, 8)
    labelled = read(write(tmp_path, "a.tsv", SST2 + "a b\t1\nc\t0\n"), tokenizer, 8)
    pairs = read(write(tmp_path, "a.csv", "a b,c,2.5\n"), tokenizer, 8)
    for encoded in (labelled, pairs):
        assert encoded.ids.tolist() == plain.ids.tolist()
        assert encoded.starts.tolist() == plain.starts.tolist()
        assert encoded.rows_per_example == 1
        assert not encoded.targets


def test_embed_reads_pairs_from_csv_and_text_from_others(tokenizer: Any, tmp_path: Path) -> None:
    task = TASKS["embed"]
    assert task.read(write(tmp_path, "a.csv", "a,b,1\n"), tokenizer, 8).rows_per_example == 2
    plain = task.read(write(tmp_path, "a.txt", "a,b,1\n"), tokenizer, 8)
    assert plain.rows_per_example == 1
    assert task.loss({}, plain.batch([0])) is None


SST2 = "sentence\tlabel\n"


@pytest.mark.parametrize(
    ("task", "text", "wanted"),
    [
        ("sst2", "", "x: the file is empty"),
        ("sst2", " \n\n", "x: the file is empty"),
        ("sst2", "a b\t1\n", r"x:1: wanted the header line 'sentence\\tlabel' \(with a tab\)"),
        ("sst2", SST2, "x: holds no example"),
        ("sst2", SST2 + "a\t1\nb\n", r"x:3: wanted 2 columns \(sentence, label\), got 1: 'b'"),
        ("sst2", SST2 + "a\t1\n\nb\t1", r"x:3: wanted 2 columns"),
        ("sst2", SST2 + "a\tb\t1\n", "x:2: wanted 2 columns .* got 3"),
        ("sst2", SST2 + "a\t2\n", "x:2: the label '2' is out of range; wanted a whole number"),
        ("sst2", SST2 + "a\t" + "9" * 5000 + "\n", "x:2: the label .* is out of range"),
        ("sst2", SST2 + "a\t-1\n", "x:2: the label '-1' is not a number; wanted .* from 0 to 1"),
        ("sst2", SST2 + "a\tgood\n", "x:2: the label 'good' is not a number"),
        ("sst2", SST2 + "a\t1.0\n", "x:2: the label '1.0' is not a number"),
        ("sst2", SST2 + " \t1\n", "x:2: the sentence is empty"),
        ("sst2", SST2.encode() + b"a\t1\nb\xff\t1\n", r"x:3: not UTF-8 \(byte 0xff\)"),
        ("stsb", "a,b,1\na,b\n", r"x:2: wanted 3 columns \(sentence1, sentence2, score\), got 2"),
        ("stsb", "a,b,1\n\na,,1\n", "x:3: the sentence is empty"),
        ("stsb", "a,b,6\n", "x:1: the score '6' is out of range; wanted 0 to 5"),
        ("stsb", "a,b,nan\n", "x:1: the score 'nan' is out of range"),
        ("stsb", "a,b,c\n", "x:1: the score 'c' is not a number"),
        ("stsb", 'a,b,1\na,"b,1\nc,d,1\n', "x:2: not comma-separated values"),
        ("stsb", "sentence1,sentence2,score\n", "x: holds no example"),
        ("text", "\n= a =\n\n", "x: holds no example"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused_with_the_line(
    task: str, text: str | bytes, wanted: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=wanted):
        TASKS[task].read(write(tmp_path, "x", text), tokenizer, 16)


def test_what_is_no_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    for name, wanted in (("none", "no such file"), (".", "is a folder")):
        with pytest.raises(InvalidInput, match=wanted):
            TASKS["text"].read(tmp_path / name, tokenizer, 16)
    with pytest.raises(InvalidInput, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    write(tmp_path, "tokenizer.json", "{}")
    with pytest.raises(InvalidInput, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InvalidInput, match="4 tokens leaves no room beside 3"):
        truncating(tokenizer, 4)
    with pytest.raises(
        InvalidInput, match="--task 'text': wanted one of sst2, stsb, embed, squad"
    ):
        find_task("text")
    with pytest.raises(InvalidInput, match="is not a folder"):
        load_tokenizer(tmp_path / "none")


@pytest.mark.parametrize("count", [1, 7, 3000])
def test_batches_hold_every_example_once_within_the_limit(count: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 64, count)
    found = batches(lengths, 256, seed=3, epoch=1)
    assert sorted(k for one in found for k in one) == list(range(count))
    assert all(len(one) * lengths[one].max() <= 256 for one in found)
    assert batches(lengths, 256, seed=3, epoch=1) == found
    if count == 3000:
        assert batches(lengths, 256, seed=3, epoch=2) != found
        assert batches(lengths, 256, seed=4, epoch=1) != found
        padded = sum(len(one) * lengths[one].max() for one in found)
        assert padded < 1.1 * lengths.sum()  # 2 x when batches are drawn at random
        firsts = [lengths[one].max() for one in found]
        assert firsts != sorted(firsts)


def test_an_example_longer_than_the_limit_is_a_batch_of_its_own() -> None:
    found = batches(np.array([4, 100, 4]), 8, 0, 0)
    assert sorted(map(sorted, found)) == [[0, 2], [1]]


def test_losses_fall_with_the_right_answer() -> None:
    sst2, stsb = TASKS["sst2"], TASKS["stsb"]
    labels = {"labels": torch.tensor([0, 1])}
    right, wrong = torch.tensor([[2.0, 0], [0, 2.0]]), torch.tensor([[0, 2.0], [2.0, 0]])
    good, bad = (sst2.loss({"logits": x}, labels) for x in (right, wrong))
    assert good == pytest.approx(np.log1p(np.exp(-2.0)))
    assert bad > good
    batch = {"attention_mask": torch.tensor([[1, 0], [1, 1]]), "labels": torch.tensor([5.0])}
    states = torch.tensor([[[1.0, 0], [9, 9]], [[1, 1], [1, -1]]])  # means: (1, 0) and (1, 0)
    assert stsb.loss({"last_hidden_state": states}, batch) == pytest.approx(0, abs=1e-12)
    batch["labels"] = torch.tensor([0.0])
    assert stsb.loss({"last_hidden_state": states}, batch) == pytest.approx(1)


def test_cosines_leave_padding_out_even_where_it_is_no_number() -> None:
    mask = np.array([[1, 0], [1, 1], [1, 1], [1, 0]])
    states = np.array(
        [[[1, 0], [np.nan, 9]], [[1, 0], [0, 1]], [[0, 1], [2, -1]], [[0, 1], [np.inf, 0]]]
    )
    got = TASKS["stsb"].predict({"last_hidden_state": states}, {"attention_mask": mask})
    np.testing.assert_allclose(got, [1, np.sqrt(0.5)], atol=1e-12)


def test_scores(tokenizer: Any, tmp_path: Path) -> None:
    sst2, stsb = TASKS["sst2"], TASKS["stsb"]
    encoded = sst2.read(write(tmp_path, "a.tsv", SST2 + "a\t1\nb\t0\nc\t1\nd\t1"), tokenizer, 8)
    logits = np.array([[0.0, 1], [1, 0], [1, 0], [0, 1]])
    predicted = sst2.predict({"logits": logits}, encoded.arrays(range(4)))
    assert sst2.score(predicted, encoded) == {"accuracy": 0.75}
    pairs = stsb.read(write(tmp_path, "a.csv", "a,b,0\nc,d,1\ne,f,5\n"), tokenizer, 8)
    scores = stsb.score([0.1, 0.2, 0.3], pairs)
    assert scores["spearman"] == pytest.approx(1)
    assert 0 < scores["pearson"] < 1


def test_equal_values_share_their_rank() -> None:
    values = np.array([3.0, 1, 3, 2, 3])
    ranks = [sum(v < x for v in values) + (sum(values == x) + 1) / 2 for x in values]
    assert metrics.ranks(values).tolist() == ranks
    assert metrics.spearman(values, np.zeros(5)) == 0.0


def test_evaluate_brings_predictions_back_in_order(tokenizer: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 9))), k) for k in range(400)]
    text = "".join(f"{sentence} {sentence[0]}\t{k % 2}\n" for sentence, k in rows)
    encoded = TASKS["sst2"].read(write(tmp_path, "a.tsv", SST2 + text), tokenizer, 32)
    shapes = []

    def run(arrays: dict[str, Any]) -> dict[str, Any]:
        shapes.append(arrays["input_ids"].shape)
        one = np.eye(2)[arrays["labels"]]  # right, but for texts that start with a
        starts_with_a = arrays["input_ids"][:, 1] == tokenizer.token_to_id("a")
        return {"logits": np.where(starts_with_a[:, None], 1 - one, one)}

    wrong = sum(sentence.startswith("a") for sentence, _ in rows)
    assert evaluate(run, TASKS["sst2"], encoded) == {"accuracy": pytest.approx(1 - wrong / 400)}
    assert len(shapes) > 1
    assert sum(rows for rows, _ in shapes) == 400
