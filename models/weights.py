"""Random weights of a zoo model, with the spread that trained weights give its activations.

Each tensor's values depend on the seed and its name only, so that models of the same seed with
different heads or sparsity share all they have in common.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsec.errors import InvalidInput
from sparsec.models.registry import ModelSpec
from sparsec.sparse.bsr import block_mask

Array = NDArray[np.float32]

EMBEDDING_STD = 0.05
BIAS_STD = 0.05
GAIN_STD = 0.1
# Linear weights have std gain / sqrt(in): inputs of variance 1 give outputs of variance gain**2.
# 1.5 for queries and keys: scores of std about 2, so that attention prefers some tokens.
QUERY_KEY_GAIN = 1.5
LINEAR_GAIN = 1.0
# The attention block adds less than its input, else all tokens become alike with depth.
OUTPUT_GAIN = 0.35


@dataclass(frozen=True, slots=True)
class Pruning:
    """Magnitude pruning of every encoder linear to this share of zero `rows x cols` blocks."""

    sparsity: float
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise InvalidInput(f"sparsity is a share from 0 to 1, not {self.sparsity}")
        if self.rows < 1 or self.cols < 1:
            raise InvalidInput(f"block {self} has no rows or no columns")

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    def check(self, spec: ModelSpec) -> None:
        """Refuse a block that does not divide the encoder linears of `spec`."""
        for size, what in ((spec.hidden, "hidden"), (spec.ffn, "FFN")):
            if size % self.rows or size % self.cols:
                raise InvalidInput(
                    f"{spec.name}: blocks of {self} (output x input) do not divide its {size} "
                    f"{what} channels; choose divisors of {spec.hidden} and {spec.ffn}"
                )


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """A source of the tensors of one model."""

    seed: int
    pruning: Pruning | None = None

    def linear(self, name: str, outputs: int, inputs: int, gain: float = LINEAR_GAIN) -> Array:
        """Return a dense weight `[out, in]`."""
        return self._normal(name, (outputs, inputs), gain / np.sqrt(inputs))

    def encoder_linear(self, name: str, outputs: int, inputs: int, gain: float) -> Array:
        """Return a weight `[out, in]` of the encoder, pruned when the model is."""
        w = self.linear(name, outputs, inputs, gain)
        if self.pruning is not None:
            p = self.pruning
            w[~block_mask(w, p.rows, p.cols, p.sparsity)] = 0.0
        return w

    def bias(self, name: str, size: int) -> Array:
        """Return the bias of a linear or a LayerNorm."""
        return self._normal(name, (size,), BIAS_STD)

    def gain(self, name: str, size: int) -> Array:
        """Return the gain of a LayerNorm."""
        return np.float32(1.0) + self._normal(name, (size,), GAIN_STD)

    def embedding(self, name: str, rows: int, channels: int) -> Array:
        """Return an embedding table."""
        return self._normal(name, (rows, channels), EMBEDDING_STD)

    def _normal(self, name: str, shape: tuple[int, ...], std: float) -> Array:
        random = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        values = random.standard_normal(shape, np.float32)
        values *= np.float32(std)
        return values
