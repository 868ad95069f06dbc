"""What happens to the scores of an attention between their product and the softmax.

    where(condition, fill, s)   ->   s + where(condition, lowest, 0)

A kernel adds one mask to the scores. Replacing them is the same as adding to them where what is
added absorbs them, and nothing else is done to what was replaced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sparsec.ir.graph import Value
from sparsec.passes.rewrite import VIEWS, Reject

# exp(fill - score) is 0 in fp32 when score - fill > 104, so any real score above -9896 hides
# a fill of -1e4 or less.
FILL_LIMIT, FAR = -9999.0, 104.0
# Added in fp32, it absorbs every score below 2**103 in size (half its last place), so a row that
# is masked throughout keeps equal scores, as if they had been replaced.
LOWEST = float(np.finfo(np.float32).min)
ABSORBING = -(2.0**103)


@dataclass(frozen=True, slots=True)
class Scale:
    """The scores, and what was added to them, times `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Add:
    """`mask` added to the scores."""

    mask: Value


@dataclass(frozen=True, slots=True)
class Fill:
    """The scores replaced by `fill` where `condition` is `replaces`."""

    condition: Value
    replaces: bool
    fill: float


Step = Scale | Add | Fill


def check_fills(steps: tuple[Step, ...]) -> Reject | None:
    """That adding what `fill_values` gives is the same as replacing, in all rows.

    Where a row has a score that is neither replaced nor masked, a fill is hidden by it. Where it
    has none, fills and masks count against each other: nothing may be added to a fill that absorbs
    it only in our form, and before it nothing that comes near it.
    """
    found = fill_values(steps)
    finite = [index for index, value in found.items() if not math.isinf(value.end)]
    scaled = any(isinstance(one, Scale) for one in steps[min(finite, default=len(steps)) :])
    if len(finite) > 1 and scaled:
        return Reject("scores are replaced before and after they are scaled")
    for index, step in enumerate(steps):
        if not isinstance(step, Fill):
            continue
        later, end = steps[index + 1 :], found[index].end
        if not end <= FILL_LIMIT:
            return Reject(f"scores replaced by {step.fill} still count")
        if step.fill > ABSORBING and any(isinstance(one, Add) for one in later):
            return Reject(f"scores replaced by {step.fill} are added to")
        earlier = (one for one in steps[:index] if isinstance(one, Add))
        if step.fill > ABSORBING and any(_size(one.mask) > -step.fill / 2 for one in earlier):
            return Reject(f"scores replaced by {step.fill} have a mask that may be as large")
        most = np.inf if np.isinf(step.fill) else 1.0
        if any(isinstance(one, Scale) and not 0 < one.factor <= most for one in later):
            return Reject(f"scores replaced by {step.fill} are scaled up")
        if any(0 < abs(other.end - end) <= FAR for other in found.values()):
            return Reject("scores are replaced by numbers too close to each other")
    return None


def _size(mask: Value) -> float:
    """A bound of the magnitudes: known of constants and of rows of constant tables."""
    while mask.data is None and mask.producer is not None and mask.producer.op in VIEWS:
        mask = mask.producer.input(0)
    return math.inf if mask.data is None else float(np.abs(mask.data).max(initial=0.0))


@dataclass(frozen=True, slots=True)
class FillValue:
    """What a fill is after all steps, and what is added to the score instead of replacing it."""

    end: float
    added: float


def fill_values(steps: tuple[Step, ...]) -> dict[int, FillValue]:
    """By the number of the step: all absorb any score, and are ordered as the fills are."""
    ends: dict[int, float] = {}
    for index, step in enumerate(steps):
        if isinstance(step, Fill):
            factors = (one.factor for one in steps[index + 1 :] if isinstance(one, Scale))
            ends[index] = step.fill * math.prod(factors)
    order = sorted({end for end in ends.values() if not math.isinf(end)})
    return {
        index: FillValue(end, end if math.isinf(end) else LOWEST * 0.5 ** order.index(end))
        for index, end in ends.items()
    }
