"""Builds the additive mask of an attention from the steps between its product and softmax."""

from __future__ import annotations

import numpy as np

from sparsec.ir.graph import Value
from sparsec.passes.attention_parts import Attention, mask_shape
from sparsec.passes.attention_steps import Add, Fill, Scale, fill_values
from sparsec.passes.rewrite import Builder


def build_mask(found: Attention, g: Builder) -> Value | None:
    """The sum of all masks, [batch or 1, heads or 1, seq or 1, seq]; None without any."""
    total: Value | None = None
    fills = fill_values(found.steps)
    for index, step in enumerate(found.steps):
        match step:
            case Add(mask):
                mask = _four_axes(found, mask, g)
                total = mask if total is None else g.add(total, mask)
            case Fill():
                total = _fill(found, step, fills[index].added, total, g)
            case Scale(factor) if total is not None:
                total = g.mul(total, g.scalar(factor, total))
    if total is None or total.type.shape[3] == found.seq:
        return total
    return g.broadcast_to(total, shape=(*total.type.shape[:3], found.seq))


def _fill(found: Attention, step: Fill, added: float, total: Value | None, g: Builder) -> Value:
    condition = _four_axes(found, step.condition, g)
    kept = g.constant(np.asarray(0.0, np.float32)) if total is None else total
    fill = g.constant(np.asarray(added, np.float32))
    return g.where(condition, fill, kept) if step.replaces else g.where(condition, kept, fill)


def _four_axes(found: Attention, mask: Value, g: Builder) -> Value:
    shape = mask_shape(found, mask)
    assert shape is not None, mask
    return mask if mask.type.shape == shape else g.reshape(mask, shape=shape)
