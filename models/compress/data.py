"""Tokenised examples in RAM, and batches of similar length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sparsec.errors import InvalidInput

Array = NDArray[Any]
Batch = dict[str, torch.Tensor]

TOKENIZER_FILE = "tokenizer.json"
PAD_TOKENS = ("[PAD]", "<pad>")
# Examples are sorted by length inside pools of so many batches: large enough that a batch has
# little padding, small enough that its examples differ from epoch to epoch.
POOL_BATCHES = 50


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples: all rows one after the other, with special tokens, without padding.

    An example has `rows_per_example` rows: 1, or 2 where two sentences are encoded each for
    itself. Row r is `ids[starts[r] : starts[r + 1]]`; rows k, k + examples, ... belong to
    example k: first the first rows of all examples, then their second rows.
    """

    rows_per_example: int
    ids: NDArray[np.int32]  # [tokens]
    types: NDArray[np.uint8]  # [tokens]: 1 in the second text of a pair, else 0
    starts: NDArray[np.int64]  # [rows + 1]
    targets: dict[str, Array]  # each [examples, ...]; empty for plain text
    pad_id: int = 0

    def __len__(self) -> int:
        """The number of examples."""
        return (len(self.starts) - 1) // self.rows_per_example

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of the longest row of each example, [examples]."""
        rows = np.diff(self.starts).reshape(self.rows_per_example, -1)
        longest: NDArray[np.int64] = rows.max(axis=0)
        return longest

    def arrays(self, indices: Sequence[int]) -> dict[str, Array]:
        """The model's inputs int64 [rows, seq], padded to the longest row, and the targets.

        Rows are the first rows of all these examples, then their second rows.
        """
        chosen = np.asarray(indices, np.int64)
        rows = np.concatenate([chosen + k * len(self) for k in range(self.rows_per_example)])
        lengths = self.starts[rows + 1] - self.starts[rows]
        columns = np.arange(lengths.max())
        real = columns < lengths[:, None]
        places = (self.starts[rows][:, None] + columns)[real]
        arrays: dict[str, Array] = {
            "input_ids": np.full(real.shape, self.pad_id, np.int64),
            "attention_mask": real.astype(np.int64),
            "token_type_ids": np.zeros(real.shape, np.int64),
        }
        arrays["input_ids"][real] = self.ids[places]
        arrays["token_type_ids"][real] = self.types[places]
        return arrays | {name: values[chosen] for name, values in self.targets.items()}

    def batch(self, indices: Sequence[int]) -> Batch:
        """The same as CPU tensors."""
        return {name: torch.from_numpy(a) for name, a in self.arrays(indices).items()}


def batches(
    lengths: NDArray[np.int64], tokens_per_batch: int, seed: int, epoch: int
) -> list[list[int]]:
    """Every example once, in batches of similar length with examples * longest within the limit.

    `lengths` is per example (Encoded.lengths); for examples of two rows give half the tokens. An
    example that is longer than the limit is a batch of its own. The order depends on `seed` and
    `epoch` alone.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    pool = max(1, int(POOL_BATCHES * tokens_per_batch / max(1.0, float(lengths.mean()))))
    found: list[list[int]] = []
    for start in range(0, len(order), pool):
        members = order[start : start + pool]
        by_length = members[np.argsort(-lengths[members], kind="stable")].tolist()
        while by_length:
            count = max(1, tokens_per_batch // int(lengths[by_length[0]]))
            found.append(by_length[:count])
            by_length = by_length[count:]
    return [found[k] for k in rng.permutation(len(found))]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    Raises InvalidInput when there is none that can be read.
    """
    path = folder / TOKENIZER_FILE
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: is not a folder")
    if not path.is_file():
        raise InvalidInput(
            f"{folder}: holds no {TOKENIZER_FILE}; save the model's fast tokenizer there"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InvalidInput(f"{path}: not a tokenizer: {error}") from None


def truncating(tokenizer: Tokenizer, max_length: int | None, **how: Any) -> Tokenizer:
    """A copy of the tokenizer that cuts rows to `max_length` tokens (None: none) and pads none.

    Raises InvalidInput when the special tokens leave no room in `max_length`.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    if max_length is None:
        return copy
    special = copy.num_special_tokens_to_add(is_pair=True)
    if max_length <= special + 1:
        raise InvalidInput(
            f"a maximum length of {max_length} tokens leaves no room beside {special} special "
            "tokens; 128 is usual"
        )
    copy.enable_truncation(max_length, **how)
    return copy


def pad_id(tokenizer: Tokenizer) -> int:
    """The id for padding; it has no influence, as the attention mask is 0 there."""
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    known = (tokenizer.token_to_id(token) for token in PAD_TOKENS)
    return next((int(one) for one in known if one is not None), 0)


def encode(
    tokenizer: Tokenizer,
    columns: Sequence[Sequence[str]],
    max_length: int,
    targets: dict[str, Array],
) -> Encoded:
    """Texts as rows: all of the first column, then those of the second, each for itself."""
    cut = truncating(tokenizer, max_length)
    rows = [row for column in columns for row in cut.encode_batch(list(column))]
    return Encoded(len(columns), *flat(rows), targets, pad_id(tokenizer))


def flat(rows: Sequence[Any]) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int64]]:
    """Ids, types and starts (see Encoded) of what a tokenizer gave for each row."""
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    ids = itertools.chain.from_iterable(row.ids for row in rows)
    types = itertools.chain.from_iterable(row.type_ids for row in rows)
    count = starts[-1]
    return np.fromiter(ids, np.int32, count), np.fromiter(types, np.uint8, count), starts
