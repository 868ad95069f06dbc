"""What an epoch sees: a share of a text, or phrases joined to the length of sentences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsec.models.compress.data import Encoded

# Tokens of a joined row: about the spread of SST-2's whole sentences.
SHORTEST_JOINED, LONGEST_JOINED = 12, 48


def some(encoded: Encoded, share: float, seed: int, epoch: int) -> Encoded:
    """Return a random `share` of the examples of plain text, other ones in every epoch.

    Consecutive epochs go through a fixed shuffle, so that all is seen before anything is again.
    """
    if share >= 1.0:
        return encoded
    order = np.random.default_rng([seed]).permutation(len(encoded))
    count = max(round(share * len(encoded)), 1)
    at = np.arange(epoch * count, (epoch + 1) * count) % len(encoded)
    return rows(encoded, order[at])


def rows(encoded: Encoded, chosen: NDArray[np.int64]) -> Encoded:
    """Return these rows as examples of one row without targets."""
    lengths = np.diff(encoded.starts)[chosen]
    starts = np.zeros(len(chosen) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    places = np.repeat(encoded.starts[chosen] - starts[:-1], lengths) + np.arange(starts[-1])
    return Encoded(1, encoded.ids[places], encoded.types[places], starts, {}, encoded.pad_id)


def joined(encoded: Encoded, seed: int, epoch: int) -> Encoded:
    """Return rows that each are several of the given rows in a row, without targets.

    Each given row is used once; its first and last token, which are special, are kept at the ends
    only. A student learns from what its teacher says of them, so they need to make no sense.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(encoded.starts) - 1)
    lengths = np.diff(encoded.starts)[order] - 2
    groups: list[list[int]] = []
    group: list[int] = []
    size = 0
    wanted = random.integers(SHORTEST_JOINED, LONGEST_JOINED + 1)
    for row, length in zip(order, lengths, strict=True):
        if group and size + length > wanted:
            groups.append(group)
            group, size = [], 0
            wanted = random.integers(SHORTEST_JOINED, LONGEST_JOINED + 1)
        group.append(row)
        size += length
    groups.append(group)
    return _concatenated(encoded, groups)


def _concatenated(encoded: Encoded, groups: list[list[int]]) -> Encoded:
    """Return one row per group: its rows' insides between the first's start and last's end."""
    pieces, starts = [], [0]
    for group in groups:
        begin, end = encoded.starts[group], encoded.starts[np.array(group) + 1]
        inside = [np.arange(b + 1, e - 1) for b, e in zip(begin, end, strict=True)]
        places = np.concatenate([begin[:1], *inside, end[-1:] - 1])
        pieces.append(places)
        starts.append(starts[-1] + len(places))
    places = np.concatenate(pieces)
    return Encoded(
        1, encoded.ids[places], encoded.types[places], np.array(starts), {}, encoded.pad_id
    )
