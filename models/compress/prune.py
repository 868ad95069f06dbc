"""Masks on the encoder's weights, and how they tighten while the model trains.

A mask is a parametrization (torch.nn.utils.parametrize): `linear.weight` is the masked weight, the
parameter behind it keeps the values of pruned blocks, so that a block may come back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.utils import parametrize

from sparsec.models.compress.pattern import Pattern, sparsity_of

Tensor = Any
Criterion = Literal["magnitude", "movement", "snip", "obs"]
Budget = Literal["layer", "global"]

Note = Callable[[Tensor, Tensor, Pattern], Tensor]

SNIP_MOMENTUM = 0.9  # share of the old statistic that stays at every step
GLOBAL_FLOOR = 0.05  # share of its cells that every weight keeps under a global budget


class BlockMask(torch.nn.Module):  # type: ignore[misc]
    """weight -> weight with the cells that are not `kept` zeroed.

    `kept` bool and `statistic` float32 have one entry per cell of the pattern. While `note` is
    set, each backward pass hands it (statistic, weight x gradient, pattern) and stores what it
    returns; the gradient is that of the masked weight, so pruned cells have one too.
    """

    def __init__(self, pattern: Pattern, kept: Tensor) -> None:
        super().__init__()
        self.pattern = pattern
        self.note: Note | None = None
        self.kept: Tensor
        self.statistic: Tensor
        self.register_buffer("kept", kept)
        self.register_buffer("statistic", torch.zeros(kept.shape, device=kept.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Mask a weight `[out, in]`."""
        masked = weight * self.pattern.spread(self.kept)
        note = self.note
        if note is not None and masked.requires_grad:
            values = weight.detach()

            def hook(gradient: Tensor) -> None:
                self.statistic.copy_(note(self.statistic, values * gradient, self.pattern))

            masked.register_hook(hook)
        return masked

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the parameter that gives `weight`: itself, as its zeros are zeros already."""
        return weight


def _note_movement(statistic: Tensor, products: Tensor, pattern: Pattern) -> Tensor:
    """Sanh et al., arXiv 2005.07683: weights that move away from zero gain."""
    return statistic - pattern.cells(products)


def _note_snip(statistic: Tensor, products: Tensor, pattern: Pattern) -> Tensor:
    """SNIP (arXiv 1810.02340) with momentum, as Neural Compressor names it."""
    return SNIP_MOMENTUM * statistic + pattern.cells(products.abs())


def masked_sparsity(model: torch.nn.Module) -> float:
    """Return the share of zeroed cells of all masks in a model; 0 where there are none."""
    return sparsity_of(m.kept for m in model.modules() if isinstance(m, BlockMask))


NOTES: dict[Criterion, Note | None] = {
    "magnitude": None,
    "movement": _note_movement,
    "snip": _note_snip,
    "obs": None,
}


def attach(
    linears: Mapping[str, Any], pattern: Pattern, kept: Mapping[str, Tensor] | None = None
) -> dict[str, BlockMask]:
    """Put a mask on every linear, all kept or as in `kept`; returns the masks by name."""
    masks = {}
    for name, linear in linears.items():
        pattern.check(name, tuple(linear.weight.shape))
        cells = pattern.cells(torch.ones_like(linear.weight.detach()))
        given = torch.ones_like(cells, dtype=torch.bool) if kept is None else kept[name]
        masks[name] = BlockMask(pattern, given.to(linear.weight.device))
        parametrize.register_parametrization(linear, "weight", masks[name])
    return masks


def found_masks(linears: Mapping[str, Any], pattern: Pattern) -> dict[str, Tensor]:
    """Return for each weight which of its cells hold any value that is not zero."""
    found = {}
    for name, linear in linears.items():
        pattern.check(name, tuple(linear.weight.shape))
        found[name] = pattern.cells((linear.weight.detach() != 0).float()) > 0
    return found


@dataclass(frozen=True, slots=True)
class Pruner:
    """Chooses the cells that stay: by a criterion, under a budget, never reviving for "obs".

    `targets` gives each weight its final share of zero cells. A global budget takes their mean
    over all cells and shares it out by score.
    """

    criterion: Criterion
    budget: Budget
    targets: Mapping[str, float]

    def start(self, masks: Mapping[str, BlockMask]) -> None:
        """Collect the statistic from the next backward pass on."""
        for mask in masks.values():
            mask.note = NOTES[self.criterion]

    def stop(self, masks: Mapping[str, BlockMask]) -> None:
        """Lock the pattern: nothing is collected any more."""
        for mask in masks.values():
            mask.note = None

    def goals(self, began: Mapping[str, float], progress: float) -> dict[str, float]:
        """Return the sparsity of each weight at `progress` (0 to 1), from what it `began` with."""
        share = cubic(progress)
        return {n: max(b, b + share * (self.targets[n] - b)) for n, b in began.items()}

    def update(
        self,
        linears: Mapping[str, Any],
        masks: Mapping[str, BlockMask],
        began: Mapping[str, float],
        progress: float,
    ) -> float:
        """Prune to where the schedule is at `progress`; returns the sparsity reached."""
        scores = {name: self._scores(linears[name], masks[name]) for name in masks}
        choose = _each if self.budget == "layer" else _together
        chosen = choose(scores, masks, self.goals(began, progress))
        for name, kept in chosen.items():
            masks[name].kept.copy_(kept)
        return sparsity_of(chosen.values())

    def _scores(self, linear: Any, mask: BlockMask) -> Tensor:
        if NOTES[self.criterion] is not None:
            return mask.statistic
        weight = linear.parametrizations.weight.original.detach()
        scores = mask.pattern.cells(weight.double() ** 2)
        return lamp(scores) if self.budget == "global" else scores


def cubic(progress: float) -> float:
    """Return the share of the final sparsity at `progress` (Zhu and Gupta, arXiv 1710.01878)."""
    return 1.0 - (1.0 - min(max(progress, 0.0), 1.0)) ** 3


def lamp(squares: Tensor) -> Tensor:
    """Make squared magnitudes of one weight comparable with other weights'.

    Each is divided by the sum of all that are at least as large (Lee et al., arXiv 2010.07611).
    """
    flat = squares.reshape(-1)
    order = flat.argsort(stable=True)
    above = flat[order].flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(flat)
    scores[order] = flat[order] / above.clamp_min(torch.finfo(flat.dtype).tiny)
    return scores.reshape(squares.shape)


def _each(
    scores: Mapping[str, Tensor], masks: Mapping[str, BlockMask], goals: Mapping[str, float]
) -> dict[str, Tensor]:
    return {name: masks[name].pattern.select(scores[name], goals[name]) for name in scores}


def _together(
    scores: Mapping[str, Tensor], masks: Mapping[str, BlockMask], goals: Mapping[str, float]
) -> dict[str, Tensor]:
    """One threshold for all weights; the best GLOBAL_FLOOR of each stay whatever it says."""
    total = sum(s.numel() for s in scores.values())
    goal = sum(goals[name] * s.numel() for name, s in scores.items()) / total
    floors = {n: masks[n].pattern.select(s, 1.0 - GLOBAL_FLOOR) for n, s in scores.items()}
    lifted = [s.masked_fill(floors[n], torch.inf).reshape(-1) for n, s in scores.items()]
    order = torch.cat(lifted).argsort(stable=True)
    kept = torch.ones(total, dtype=torch.bool, device=order.device)
    kept[order[: round(goal * total)]] = False
    parts = kept.split([s.numel() for s in scores.values()])
    return {n: part.reshape(scores[n].shape) for n, part in zip(scores, parts, strict=True)}
