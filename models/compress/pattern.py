"""Where zeros may lie in a pruned weight: whole blocks, or N of every M inputs.

Weights are `[out, in]`; a block `rows x cols` is output x input channels. A pattern works on a
grid: one cell per block, or per weight for N:M.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from sparsec.errors import InvalidInput

Tensor = Any  # torch has no types for mypy here


@dataclass(frozen=True, slots=True)
class BlockPattern:
    """Blocks of `rows` output times `cols` input channels are kept or zeroed as a whole."""

    rows: int
    cols: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a weight `[out, in]` that the blocks do not divide."""
        if shape[0] % self.rows or shape[1] % self.cols:
            raise InvalidInput(
                f"--block {self}: does not divide {name} of {shape[0]} x {shape[1]} "
                f"(output x input); choose divisors of both"
            )

    def cells(self, values: Tensor) -> Tensor:
        """Sum a tensor `[out, in]` over each cell: `[out / rows, in / cols]`."""
        out, size = values.shape
        blocks = values.reshape(out // self.rows, self.rows, size // self.cols, self.cols)
        return blocks.sum(dim=(1, 3))

    def spread(self, kept: Tensor) -> Tensor:
        """Return the grid with every cell as large as its block: `[out, in]`."""
        wide = kept.repeat_interleave(self.cols, dim=1) if self.cols > 1 else kept
        return wide.repeat_interleave(self.rows, dim=0) if self.rows > 1 else wide

    def select(self, scores: Tensor, sparsity: float) -> Tensor:
        """Return which cells stay when the round(sparsity * cells) lowest scores go.

        Between equal scores the first cells in row-major order go.
        """
        return _highest(scores.reshape(-1), sparsity).reshape(scores.shape)


@dataclass(frozen=True, slots=True)
class GroupPattern:
    """N:M: of every `of` consecutive inputs of an output, at least `keep` stay."""

    keep: int
    of: int

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @property
    def most(self) -> float:
        """The largest share of zeros that it can have."""
        return 1.0 - self.keep / self.of

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a weight `[out, in]` whose inputs are no whole groups."""
        if shape[1] % self.of:
            raise InvalidInput(f"--block {self}: {name} has {shape[1]} inputs, no multiple of it")

    def cells(self, values: Tensor) -> Tensor:
        """Return the tensor itself: every weight is a cell."""
        return values

    def spread(self, kept: Tensor) -> Tensor:
        """Return the grid itself."""
        return kept

    def select(self, scores: Tensor, sparsity: float) -> Tensor:
        """Return which weights stay: in each group as many as `sparsity` leaves, but `keep`."""
        count = max(self.keep, math.ceil(round((1.0 - sparsity) * self.of, 6)))
        groups = scores.reshape(scores.shape[0], -1, self.of)
        best = groups.argsort(dim=2, stable=True, descending=True)[..., :count]
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, best, True)
        return kept.reshape(scores.shape)


Pattern = BlockPattern | GroupPattern


def parse_pattern(text: str) -> Pattern:
    """Read `16x1` (output x input channels of a block) or `2:4`."""
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
        return BlockPattern(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text):
        keep, of = int(found[1]), int(found[2])
        if keep < of:
            return GroupPattern(keep, of)
    raise InvalidInput(
        f"--block {text!r}: wanted output x input channels such as 16x1, or N:M such as 2:4"
    )


def sparsity_of(masks: Iterable[Tensor]) -> float:
    """Return the share of cells that are zeroed, weighted by nothing but their number."""
    total = kept = 0
    for mask in masks:
        total += mask.numel()
        kept += int(mask.sum())
    return 1.0 - kept / total if total else 0.0


def _highest(scores: Tensor, sparsity: float) -> Tensor:
    drop = round(sparsity * scores.numel())
    order = scores.argsort(stable=True)
    kept = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    kept[order[:drop]] = False
    return kept
