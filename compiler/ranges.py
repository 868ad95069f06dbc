"""Which range of a tensor's values its 256 u8 levels should cover, from a histogram of them.

minmax      all of them: no value is clipped, an outlier makes every step coarse
percentile  all but 0.01 % of the values, half of that on each side, as ONNX Runtime's calibrator
            cuts them (H. Wu et al., "Integer Quantization for Deep Learning Inference", 2020)
entropy     the range whose stored distribution loses least information, by Kullback and Leibler
            (S. Migacz, "8-bit Inference with TensorRT", GTC 2017), here for two-sided ranges
mse         the range of the least squared error of what is stored (Y. Choukroun et al.,
            "Low-bit Quantization of Neural Networks for Efficient Inference", 2019)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsec.errors import InvalidInput

Floats = NDArray[np.float64]
Range = tuple[float, float]

BINS = 4096  # on each side of zero; at least half of one side is in use: 8 bins per level
LEVELS = 256
PERCENTILE = 99.99
_FRACTIONS = np.linspace(1.0, 1 / 64, 64)  # of an end of the range, the first best one wins
_ROUNDS = 2  # of the search over one end, then the other


def _no_counts() -> NDArray[np.int64]:
    return np.zeros(2 * BINS, np.int64)


@dataclass(frozen=True, slots=True)
class Channels:
    """The channels `[start, stop)` of a value, which have a range of their own."""

    value: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.value}[{self.start}:{self.stop}]"


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """A histogram around zero: bin i counts the values from (i - BINS) * width on.

    The width is a power of two that doubles when a value lies outside, so that bins merge in
    pairs and no order of the data changes the result.
    """

    low: float = math.inf
    high: float = -math.inf
    width: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=_no_counts)

    @property
    def is_empty(self) -> bool:
        return self.low > self.high

    def including(self, data: NDArray[Any]) -> Observation:
        """The histogram of these finite values too."""
        if data.size == 0:
            return self
        low, high = min(self.low, float(data.min())), max(self.high, float(data.max()))
        width = max(self.width, _width(max(-low, high)))
        bins = np.floor(data.reshape(-1) / width).astype(np.int64) + BINS
        added = np.bincount(bins, minlength=2 * BINS)
        return Observation(low, high, width, self._widened(width) + added)

    def _widened(self, width: float) -> NDArray[np.int64]:
        if self.width in (0.0, width):
            return self.counts
        bins = np.floor((np.arange(2 * BINS) - BINS) * (self.width / width)).astype(np.int64)
        # float64 sums of counts are exact below 2**53
        sums = np.bincount(bins + BINS, weights=self.counts, minlength=2 * BINS)
        return sums.astype(np.int64)

    def occupied(self) -> tuple[Floats, Floats]:
        """The centres of the bins that hold values, and how many each holds."""
        (bins,) = np.nonzero(self.counts)
        centres = np.asarray((bins - BINS + 0.5) * self.width, np.float64)
        return centres, self.counts[bins].astype(np.float64)


def _width(most: float) -> float:
    """The least power of two of which BINS cover `most`."""
    _, exponent = math.frexp(max(most, 1e-30) / BINS)
    return math.ldexp(1.0, exponent)


def choose_range(observation: Observation, method: str) -> Range:
    """`(low, high)` for u8; values outside are clipped.

    Raises InvalidInput when there is no such method, or nothing was observed.
    """
    choose = METHODS.get(method)
    if choose is None:
        raise InvalidInput(f"there is no calibration method {method!r}; use {', '.join(METHODS)}")
    if observation.is_empty:
        raise InvalidInput("no value was observed: the calibration data hold no real token")
    return choose(observation)


def _minmax(observation: Observation) -> Range:
    return observation.low, observation.high


def _percentile(observation: Observation) -> Range:
    below = np.cumsum(observation.counts) / observation.counts.sum()
    cut = (100.0 - PERCENTILE) / 200.0
    first, last = (int(np.searchsorted(below, share)) for share in (cut, 1.0 - cut))
    low, high = (first - BINS) * observation.width, (last + 1 - BINS) * observation.width
    return max(low, observation.low), min(high, observation.high)


def _entropy(observation: Observation) -> Range:
    return _search(observation, _divergence)


def _mse(observation: Observation) -> Range:
    return _search(observation, _squared_error)


METHODS: Mapping[str, Callable[[Observation], Range]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}


def _search(
    observation: Observation, cost: Callable[[Floats, Floats, float, float], float]
) -> Range:
    """The range of least cost: each end in turn moves towards zero, the other stays."""
    centres, counts = observation.occupied()
    full_low, full_high = min(observation.low, 0.0), max(observation.high, 0.0)
    low, high = full_low, full_high
    for _ in range(_ROUNDS):
        if full_high > 0.0:
            highs = full_high * _FRACTIONS
            high = float(highs[np.argmin([cost(centres, counts, low, h) for h in highs])])
        if full_low < 0.0:
            lows = full_low * _FRACTIONS
            low = float(lows[np.argmin([cost(centres, counts, x, high) for x in lows])])
    return low, high


def _levels(centres: Floats, low: float, high: float) -> tuple[Floats, float, float]:
    """The level that each centre is stored as, the scale and the zero point."""
    scale = max((high - low) / (LEVELS - 1), 1e-30)
    zero_point = np.rint(-low / scale)
    return np.clip(np.rint(centres / scale) + zero_point, 0, LEVELS - 1), scale, zero_point


def _squared_error(centres: Floats, counts: Floats, low: float, high: float) -> float:
    level, scale, zero_point = _levels(centres, low, high)
    error = (level - zero_point) * scale - centres
    return float((counts * error * error).sum())


def _divergence(centres: Floats, counts: Floats, low: float, high: float) -> float:
    """Of the clipped distribution from one that knows only how many values each level holds."""
    (inside,) = np.nonzero((centres >= low) & (centres <= high))
    if inside.size == 0:
        return math.inf
    first, last = int(inside[0]), int(inside[-1]) + 1
    level = _levels(centres[first:last], low, high)[0].astype(np.int64)
    kept = counts[first:last]
    held = np.bincount(level, weights=kept, minlength=LEVELS)
    bins = np.bincount(level, minlength=LEVELS)
    stored = (held / np.maximum(bins, 1))[level] / kept.sum()
    clipped = kept.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    clipped /= counts.sum()
    return float((clipped * np.log(clipped / stored)).sum())
