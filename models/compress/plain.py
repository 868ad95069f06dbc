"""Weights that are what their parametrizations make of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize


def make_plain(linear: nn.Linear) -> None:
    """Let a linear hold as its weight what its parametrizations make of it.

    torch's own removal changes the class, which copies of the module share.
    """
    if parametrize.is_parametrized(linear, "weight"):
        weight = linear.weight.detach().clone()
        linear.__class__ = type(linear).__bases__[0]
        del linear._modules["parametrizations"]
        linear.weight = nn.Parameter(weight)


def bake(linears: Iterable[nn.Linear]) -> None:
    """Make every one of `linears` plain: masked weights become plain ones with zeros."""
    for linear in linears:
        make_plain(linear)
