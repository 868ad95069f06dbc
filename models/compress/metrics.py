"""Figures of merit in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Numbers = Sequence[float] | Array


def accuracy(predicted: Numbers, labels: Numbers) -> float:
    """The share of equal numbers, 0 to 1."""
    return float((np.asarray(predicted) == np.asarray(labels)).mean())


def pearson(a: Numbers, b: Numbers) -> float:
    """The correlation of two lists of numbers, -1 to 1; 0 where one of them is constant."""
    x, y = (v - v.mean() for v in (np.asarray(a, np.float64), np.asarray(b, np.float64)))
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else 0.0


def spearman(a: Numbers, b: Numbers) -> float:
    """The correlation of the ranks."""
    return pearson(ranks(a), ranks(b))


def ranks(values: Numbers) -> Array:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: Array = last - (counts - 1) / 2
    return means[inverse]
