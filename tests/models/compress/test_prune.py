"""Masks on linears: what they compute, what they note, and how they tighten."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="compress needs the extra compress")

from sparsec.models.compress.pattern import BlockPattern, GroupPattern, sparsity_of  # noqa: E402
from sparsec.models.compress.plain import bake  # noqa: E402
from sparsec.models.compress.prune import (  # noqa: E402
    GLOBAL_FLOOR,
    SNIP_MOMENTUM,
    Pruner,
    attach,
    cubic,
    found_masks,
    lamp,
)

PATTERN = BlockPattern(4, 1)


def linears(count: int = 2) -> dict[str, torch.nn.Linear]:
    torch.manual_seed(0)
    made = {f"l{i}": torch.nn.Linear(8, 8) for i in range(count)}
    for i, linear in enumerate(made.values()):
        linear.weight.data *= 10.0**i
    return made


def test_a_masked_block_is_zero_and_comes_back_with_its_values() -> None:
    layers = linears(1)
    before = layers["l0"].weight.detach().clone()
    mask = attach(layers, PATTERN)["l0"]
    assert layers["l0"].parametrizations.weight[0] is mask
    mask.kept[0, 3] = False
    after = layers["l0"].weight
    assert (after[:4, 3] == 0).all()
    after.sum().backward()
    assert (layers["l0"].parametrizations.weight.original.grad[:4, 3] == 0).all()
    mask.kept[0, 3] = True
    assert torch.equal(layers["l0"].weight, before)


def test_baking_leaves_zeros_in_a_plain_weight() -> None:
    layers = linears(1)
    attach(layers, PATTERN)["l0"].kept[1, 2] = False
    bake(layers.values())
    assert isinstance(layers["l0"].weight, torch.nn.Parameter)
    found = found_masks(layers, PATTERN)["l0"]
    assert not found[1, 2]
    assert sparsity_of([found]) == pytest.approx(1 / 16)


@pytest.mark.parametrize("criterion", ["movement", "snip"])
def test_statistics_are_sums_of_weight_times_gradient(criterion: str) -> None:
    layers = linears(1)
    masks = attach(layers, PATTERN)
    masks["l0"].kept[0, 0] = False
    pruner = Pruner(criterion, "layer", {"l0": 0.5})
    pruner.start(masks)
    weight = layers["l0"].parametrizations.weight.original.detach()
    wanted = torch.zeros(2, 8)
    for seed in range(2):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
        out = layers["l0"](x)
        gradient = out.detach().T @ x  # of |out|^2 / 2 to the masked weight
        (0.5 * (out**2).sum()).backward()
        product = weight * gradient
        if criterion == "movement":
            wanted -= PATTERN.cells(product)
        else:
            wanted = SNIP_MOMENTUM * wanted + PATTERN.cells(product.abs())
    torch.testing.assert_close(masks["l0"].statistic, wanted)
    pruner.stop(masks)
    layers["l0"](x).sum().backward()
    torch.testing.assert_close(masks["l0"].statistic, wanted)


def test_a_budget_per_layer_gives_every_layer_its_share() -> None:
    layers = linears()
    masks = attach(layers, PATTERN)
    began = dict.fromkeys(layers, 0.0)
    reached = Pruner("magnitude", "layer", {"l0": 0.5, "l1": 0.75}).update(layers, masks, began, 1)
    assert reached == pytest.approx(0.625)
    assert [sparsity_of([m.kept]) for m in masks.values()] == [0.5, 0.75]


def test_a_global_budget_is_met_over_all_layers_and_leaves_none_empty() -> None:
    layers = linears()
    layers["l1"].weight.data[:] = 1e-6
    masks = attach(layers, BlockPattern(1, 1))
    began = dict.fromkeys(layers, 0.0)
    pruner = Pruner("magnitude", "global", dict.fromkeys(layers, 0.75))
    assert pruner.update(layers, masks, began, 1.0) == pytest.approx(0.75, abs=0.01)
    assert all(m.kept.float().mean() >= GLOBAL_FLOOR - 0.02 for m in masks.values())


def test_lamp_does_not_depend_on_the_scale_of_a_weight() -> None:
    squares = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(lamp(squares), lamp(1000 * squares))
    assert lamp(squares).max() == 1.0  # the largest is the only one as large as itself


def test_groups_are_tightened_to_n_of_m() -> None:
    layers = linears(1)
    masks = attach(layers, GroupPattern(2, 4))
    pruner = Pruner("magnitude", "layer", {"l0": 0.5})
    assert pruner.update(layers, masks, {"l0": 0.0}, 1.0) == 0.5


def test_the_schedule_is_cubic_and_starts_where_the_mask_is() -> None:
    assert [cubic(p) for p in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [0.0, 0.0, 0.875, 1.0, 1.0]
    goals = Pruner("magnitude", "layer", {"a": 0.8, "b": 0.2}).goals({"a": 0.4, "b": 0.3}, 0.5)
    assert goals == {"a": pytest.approx(0.75), "b": 0.3}
