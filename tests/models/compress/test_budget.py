"""Sparsity per layer from what layers take and lose."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from sparsec.errors import InvalidInput

torch = pytest.importorskip("torch", reason="compress needs the extra compress")

from sparsec.models.compress.budget import _ladder, sparsities_for  # noqa: E402
from sparsec.models.compress.pattern import BlockPattern  # noqa: E402

PATTERN = BlockPattern(4, 1)


def linears() -> dict[str, Any]:
    torch.manual_seed(0)
    shapes = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "up": (16, 8), "down": (8, 16)}
    return {name: torch.nn.Linear(i, o) for name, (o, i) in shapes.items()}


def advice(times: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """Three products of 24 x 8 (q, k, v), 8 x 8, 16 x 8, 8 x 16; times of dense, 0.5, 0.75."""
    times = times or {"qkv": [30, 20, 12], "o": [10, 7, 4], "up": [20, 12, 8], "down": [20, 9, 8]}
    shapes = {"qkv": (24, 8), "o": (8, 8), "up": (16, 8), "down": (8, 16)}
    layers = [
        {
            "name": name, "rows": shapes[name][0], "cols": shapes[name][1],
            "dense": {"us": us[0]},
            "options": [
                {"block": "4x1", "sparsity": s, "us": t}
                for s, t in zip((0.5, 0.75), us[1:], strict=True)
            ] + [{"block": "16x1", "sparsity": 0.9, "us": 0.1}],
        }
        for name, us in times.items()
    ]  # fmt: skip
    return {"layers": layers, "other_us": 20.0}


def spent(found: dict[str, float], given: dict[str, Any]) -> float:
    at = {"qkv": "q", "o": "o", "up": "up", "down": "down"}
    total = float(given["other_us"])
    for layer in given["layers"]:
        options = {o["sparsity"]: o["us"] for o in layer["options"] if o["block"] == "4x1"}
        total += {0.0: layer["dense"]["us"], **options}[found[at[layer["name"]]]]
    return total


@pytest.mark.parametrize("budget_us", [101, 90, 80, 70, 60, 52])
def test_a_budget_is_met_and_products_that_became_one_share_a_sparsity(budget_us: int) -> None:
    found = sparsities_for(advice(), linears(), PATTERN, budget_us / 1000)
    assert found["q"] == found["k"] == found["v"]
    assert spent(found, advice()) <= budget_us
    assert (set(found.values()) == {0.0}) == (budget_us >= 100)


def test_no_single_step_back_would_do() -> None:
    model, given = linears(), advice()
    found = sparsities_for(given, model, PATTERN, 0.070)
    ladders = [
        _ladder(layer, [model[n] for n in names], PATTERN)
        for layer, names in zip(given["layers"], ("qkv", ["o"], ["up"], ["down"]), strict=True)
    ]
    chosen = [found[n] for n in ("q", "o", "up", "down")]
    lost = sum(
        next(c.lost for c in ladder if c.sparsity == s)
        for ladder, s in zip(ladders, chosen, strict=True)
    )
    every = [
        sum(c.lost for c in combination)
        for combination in itertools.product(*ladders)
        if sum(c.us for c in combination) <= 50
    ]
    largest_step = max(b.lost - a.lost for lad in ladders for a, b in itertools.pairwise(lad))
    assert min(every) <= lost <= min(every) + largest_step


def test_says_what_the_sparsest_model_takes() -> None:
    with pytest.raises(InvalidInput, match=r"takes 0\.052 ms, 0\.02 of it outside"):
        sparsities_for(advice(), linears(), PATTERN, 0.050)


def test_refuses_the_advice_of_another_model() -> None:
    model = linears()
    with pytest.raises(InvalidInput, match="was it made from this model"):
        sparsities_for(advice(), {n: model[n] for n in ("q", "o", "up")}, PATTERN, 1.0)
    with pytest.raises(InvalidInput, match="lacks the layers extra"):
        sparsities_for(advice(), {**model, "extra": torch.nn.Linear(8, 8)}, PATTERN, 1.0)
