"""A tiny model folder and data to compress: words whose names say their label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

GOOD = ["fine", "great", "lovely", "warm"]
BAD = ["dull", "poor", "weak", "cold"]
OTHER = ["film", "plot", "scene", "actor", "music", "story", "ending", "cast"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences of some words; the label is that of most of them."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        label = int(random.integers(2))
        telling = list(random.choice(GOOD if label else BAD, 2))
        words = telling + list(random.choice(OTHER, random.integers(1, 6)))
        random.shuffle(words)
        found.append((" ".join(words), label))
    return found


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with 32 channels, and its tokenizer, as Hugging Face saves them."""
    return _folder(tmp_path_factory.mktemp("tiny"), layers=2, channels=32)


@pytest.fixture(scope="session")
def larger_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with four layers of 48 channels."""
    return _folder(tmp_path_factory.mktemp("larger"), layers=4, channels=48)


def _folder(folder: Path, layers: int, channels: int) -> Path:
    torch = pytest.importorskip("torch", reason="compress needs the extra compress")
    import tokenizers
    import transformers

    words = [*SPECIAL, *GOOD, *BAD, *OTHER]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=channels, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(str(folder))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def sst2_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train and dev files of the task "sst2"."""
    folder = tmp_path_factory.mktemp("data")
    for name, count, seed in (("train", 240, 1), ("dev", 60, 2)):
        lines = [f"{text}\t{label}" for text, label in sentences(count, seed)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    return folder / "train.tsv", folder / "dev.tsv"
