"""Sparsity per layer from a latency budget: what `sparsec advise` says a layer takes, against what
its weight loses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsec.errors import InvalidInput
from sparsec.models.compress.pattern import Pattern

Tensor = Any


@dataclass(frozen=True, slots=True)
class Choice:
    """A layer at one sparsity: the microseconds it takes and the share of squared weight lost."""

    sparsity: float
    us: float
    lost: float


def sparsities_for(
    advice: Mapping[str, Any], linears: Mapping[str, Any], pattern: Pattern, latency_ms: float
) -> dict[str, float]:
    """Return a sparsity for every linear so that a run takes at most `latency_ms`.

    `advice` is the JSON of `sparsec advise` for the same model. Of the ways to get there one is
    taken that loses little: from the dense model on, the layer whose next step saves the most time
    for the weight that it loses takes it. Raises InvalidInput when no sparsity in `advice` is
    enough, or when it is not of this model.
    """
    groups = _matched(advice["layers"], linears)
    ladders = [
        _ladder(layer, [linears[name] for name in names], pattern)
        for layer, names in zip(advice["layers"], groups, strict=True)
    ]
    at = _spend(ladders, 1000.0 * latency_ms - float(advice["other_us"]), latency_ms)
    return {
        name: ladder[step].sparsity
        for names, ladder, step in zip(groups, ladders, at, strict=True)
        for name in names
    }


def _matched(layers: Sequence[Mapping[str, Any]], linears: Mapping[str, Any]) -> list[list[str]]:
    """Return the linears that each layer computes: one, or q, k and v that became one product."""
    left = list(linears)
    groups = []
    for layer in layers:
        names: list[str] = []
        while left and sum(linears[n].out_features for n in names) < layer["rows"]:
            names.append(left.pop(0))
        rows = sum(linears[n].out_features for n in names)
        if rows != layer["rows"] or any(linears[n].in_features != layer["cols"] for n in names):
            raise InvalidInput(
                f"the advice has a layer {layer['name']} of {layer['rows']} x {layer['cols']} "
                f"where the model has {', '.join(names) or 'none'}: was it made from this model?"
            )
        groups.append(names)
    if left:
        raise InvalidInput(f"the advice lacks the layers {', '.join(left[:4])} of the model")
    return groups


def _ladder(layer: Mapping[str, Any], linears: Sequence[Any], pattern: Pattern) -> list[Choice]:
    """Return the layer's choices from dense on, each sparser and faster than the one before.

    Steps that save less per loss than a later one are left out, so that taking them in order is
    never worse.
    """
    cells = [pattern.cells(linear.weight.detach().double() ** 2) for linear in linears]
    choices = [Choice(0.0, float(layer["dense"]["us"]), 0.0)]
    for option in sorted(layer["options"], key=lambda o: float(o["sparsity"])):
        if option["block"] != str(pattern):
            continue
        lost = _lost(cells, pattern, float(option["sparsity"]))
        found = Choice(float(option["sparsity"]), float(option["us"]), lost)
        while len(choices) > 1 and _gain(choices[-2], choices[-1]) <= _gain(choices[-2], found):
            choices.pop()
        if found.us < choices[-1].us:
            choices.append(found)
    return choices


def _gain(before: Choice, after: Choice) -> float:
    """Microseconds saved for each unit of weight lost."""
    return (before.us - after.us) / max(after.lost - before.lost, 1e-12)


def _lost(cells: Sequence[Tensor], pattern: Pattern, sparsity: float) -> float:
    total = sum(float(c.sum()) for c in cells)
    kept = sum(float(torch.where(pattern.select(c, sparsity), c, 0.0).sum()) for c in cells)
    return 1.0 - kept / total if total else 0.0


def _spend(ladders: Sequence[Sequence[Choice]], budget_us: float, latency_ms: float) -> list[int]:
    at = [0] * len(ladders)
    while (now := sum(one[step].us for one, step in zip(ladders, at, strict=True))) > budget_us:
        steps = [i for i, ladder in enumerate(ladders) if at[i] + 1 < len(ladder)]
        if not steps:
            other_ms = latency_ms - budget_us / 1000
            raise InvalidInput(
                f"--latency-ms {latency_ms:g}: the sparsest model takes "
                f"{now / 1000 + other_ms:.3g} ms, {other_ms:.3g} of it outside its linears"
            )
        best = max(steps, key=lambda i: _gain(ladders[i][at[i]], ladders[i][at[i] + 1]))
        at[best] += 1
    return at
