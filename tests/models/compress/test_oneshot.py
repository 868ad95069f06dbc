"""One-shot pruning of tiny encoders: against magnitude, in place, from masks, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="compress needs the extra compress")
transformers = pytest.importorskip("transformers", reason="compress needs the extra compress")

from torch.nn.utils import parametrize  # noqa: E402

from sparsec.errors import InvalidInput  # noqa: E402
from sparsec.models.compress.oneshot import PrunedSite, prune_one_shot  # noqa: E402
from sparsec.models.compress.pattern import BlockPattern  # noqa: E402
from sparsec.models.compress.sites import encoder_linears  # noqa: E402
from sparsec.models.compress.tiny import ARCHITECTURES, tiny_config  # noqa: E402


def encoder(name: str = "bert") -> Any:
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(tiny_config(name, initializer_range=0.2)).eval()


def texts(count: int = 8) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        lengths = torch.randint(4, 17, (8, 1), generator=random)
        ids = torch.randint(5, 50, (8, 16), generator=random)
        real = torch.arange(16)[None] < lengths
        found.append({"input_ids": ids * real, "attention_mask": real.long()})
    return found


def distance(model: Any, dense: Any) -> float:
    """Return the squared distance of the real tokens' last hidden states to the dense ones."""
    total = 0.0
    with torch.no_grad():
        for text in texts(12)[8:]:
            change = model(**text).last_hidden_state - dense(**text).last_hidden_state
            total += float(change[text["attention_mask"].bool()].square().sum())
    return total


def prune_by_magnitude(model: Any, rows: int, cols: int, sparsity: float) -> None:
    for linear in encoder_linears(model).values():
        w = linear.weight.data
        blocks = w.view(w.shape[0] // rows, rows, w.shape[1] // cols, cols).square().sum((1, 3))
        lowest = blocks.flatten().argsort()[: round(sparsity * blocks.numel())]
        kept = torch.ones(blocks.numel(), dtype=torch.bool)
        kept[lowest] = False
        w.mul_(kept.view(blocks.shape).repeat_interleave(rows, 0).repeat_interleave(cols, 1))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "cols"), [(8, 1), (4, 4)])
def test_pruned_model_is_nearer_to_the_dense_one_than_by_magnitude(
    name: str, rows: int, cols: int
) -> None:
    dense, model, plain = encoder(name), encoder(name), encoder(name)
    sites: list[PrunedSite] = []
    masks = prune_one_shot(model, texts(), BlockPattern(rows, cols), 0.5, progress=sites.append)
    assert list(masks) == list(encoder_linears(model)) == [s.name for s in sites]
    for key, linear in encoder_linears(model).items():
        zeros = ~masks[key].repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        assert not linear.weight[zeros].any()
        assert float(masks[key].double().mean()) == pytest.approx(0.5)
    assert all(0 <= s.error < 1 for s in sites)
    prune_by_magnitude(plain, rows, cols, 0.5)
    assert distance(model, dense) < 0.7 * distance(plain, dense)


def test_nothing_to_prune_changes_nothing() -> None:
    """At sparsity 0 the refit finds the dense weights again, up to float32 of the products."""
    dense, model = encoder(), encoder()
    prune_one_shot(model, texts(), BlockPattern(8, 1), 0.0)
    for old, new in zip(dense.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-3)


def test_same_input_gives_same_bits_and_padding_does_not_matter() -> None:
    first, second, padded = encoder(), encoder(), encoder()
    prune_one_shot(first, texts(), BlockPattern(8, 1), 0.5)
    second.train()
    prune_one_shot(second, texts(), BlockPattern(8, 1), 0.5)
    assert second.training
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    longer = [
        {key: torch.nn.functional.pad(value, (0, 5)) for key, value in t.items()} for t in texts()
    ]
    prune_one_shot(padded, longer, BlockPattern(8, 1), 0.5)
    for a, b in zip(first.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_sparsity_is_raised_from_masks_towards_another_model() -> None:
    """As in gradual pruning: masked weights are refitted behind their mask, blocks only leave."""

    class Mask(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, kept: Any) -> None:
            super().__init__()
            self.kept = kept

        def forward(self, weight: Any) -> Any:
            return weight * self.kept.repeat_interleave(8, 0)

    dense, model = encoder(), encoder()
    half = prune_one_shot(model, texts(), BlockPattern(8, 1), 0.5)
    for key, linear in encoder_linears(model).items():
        parametrize.register_parametrization(linear, "weight", Mask(half[key]))
    alone = copy.deepcopy(model)
    fewer = prune_one_shot(model, texts(), BlockPattern(8, 1), 0.75, reference=dense, kept=half)
    for key, kept in fewer.items():
        assert bool((half[key] | ~kept).all())
        assert float(kept.double().mean()) == pytest.approx(0.25)
        assert not encoder_linears(model)[key].weight[~kept.repeat_interleave(8, 0)].any()
    prune_one_shot(alone, texts(), BlockPattern(8, 1), 0.75, kept=half)
    assert distance(model, dense) < distance(alone, dense)


def test_only_named_linears_are_pruned() -> None:
    dense, model = encoder(), encoder()
    name = "encoder.layer.1.intermediate.dense"
    masks = prune_one_shot(model, texts(), BlockPattern(8, 1), {name: 0.25})
    assert list(masks) == [name]
    for key, linear in encoder_linears(model).items():
        same = torch.equal(linear.weight, encoder_linears(dense)[key].weight)
        assert same == (key != name)


def test_mistakes_are_named() -> None:
    model = encoder()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidInput, match=r"layer\.0.*query.*24x1.*do not divide"):
        prune_one_shot(model, texts(), BlockPattern(24, 1), 0.5)
    with pytest.raises(InvalidInput, match=r"no\.such is no linear of the encoder"):
        prune_one_shot(model, texts(), BlockPattern(8, 1), {"no.such": 0.5})
    with pytest.raises(InvalidInput, match="sparsity 1 is not from 0 to below 1"):
        prune_one_shot(model, texts(), BlockPattern(8, 1), 1.0)
    with pytest.raises(InvalidInput, match="no calibration text"):
        prune_one_shot(model, [], BlockPattern(8, 1), 0.5)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
