"""Channels in another order: the same outputs, more weight kept, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="compress needs the extra compress")
transformers = pytest.importorskip("transformers", reason="compress needs the extra compress")

from torch.nn.utils import parametrize  # noqa: E402

from sparsec.errors import InvalidInput  # noqa: E402
from sparsec.models.compress.pattern import BlockPattern  # noqa: E402
from sparsec.models.compress.permute import _best_order, _View, permute  # noqa: E402
from sparsec.models.compress.sites import encoder_linears  # noqa: E402
from sparsec.models.compress.tiny import ARCHITECTURES, tiny_config  # noqa: E402

CHANGES: dict[str, Any] = {"num_attention_heads": 2, "initializer_range": 0.2}
PLAIN = transformers.AutoModel
CLASSIFIER = transformers.AutoModelForSequenceClassification
HEADS = [
    *((CLASSIFIER, name) for name in ARCHITECTURES),
    (transformers.AutoModelForQuestionAnswering, "bert"),
    (transformers.AutoModelForTokenClassification, "distilbert"),
]


def build(auto: Any, name: str) -> Any:
    """Return a tiny model, no parameter of which is a constant vector."""
    torch.manual_seed(0)
    model = auto.from_config(tiny_config(name, **CHANGES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outputs(model: Any) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (4, 12), generator=random)
    real = torch.ones_like(ids)
    real[1, 7:] = 0
    with torch.no_grad():
        return dict(model(input_ids=ids, attention_mask=real))


@pytest.mark.parametrize(("auto", "name"), HEADS, ids=lambda a: getattr(a, "__name__", a))
def test_heads_answer_the_same(auto: Any, name: str) -> None:
    model = build(auto, name)
    wanted = outputs(model)
    report = permute(model, BlockPattern(4, 4), 0.75, residual=True)
    assert report.stream is not None
    assert sorted(report.stream) == list(range(32))
    assert report.stream != tuple(range(32))
    for key, value in outputs(model).items():
        # Only the order of float32 sums of up to 64 terms differs.
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("residual", [False, True])
def test_hidden_states_come_in_the_reported_order(name: str, residual: bool) -> None:
    model = build(PLAIN, name)
    wanted = outputs(model)["last_hidden_state"]
    report = permute(model, BlockPattern(4, 1), 0.75, residual=residual)
    assert (report.stream is not None) == residual
    order = list(report.stream) if report.stream is not None else list(range(32))
    got = outputs(model)["last_hidden_state"]
    torch.testing.assert_close(got, wanted[..., order], rtol=0, atol=1e-4)


@pytest.mark.parametrize("pattern", [BlockPattern(8, 1), BlockPattern(1, 4), BlockPattern(8, 4)])
def test_blocks_keep_more(pattern: BlockPattern) -> None:
    model = build(PLAIN, "bert")
    dense = {n: w.weight.detach().clone() for n, w in encoder_linears(model).items()}
    report = permute(model, pattern, 0.75, residual=True)
    assert list(report.before) == list(report.after) == list(dense)
    for name, linear in encoder_linears(model).items():
        for weight, share in ((dense[name], report.before), (linear.weight, report.after)):
            squares = pattern.cells(weight.detach().square())
            kept = pattern.select(squares, 0.75)
            assert share[name] == pytest.approx(float(squares[kept].sum() / squares.sum()))
    assert sum(report.after.values()) > 1.02 * sum(report.before.values())


def test_finds_groups_that_are_there() -> None:
    """Channels of four kinds, shuffled: each group of four gathers one kind."""
    random = torch.Generator().manual_seed(0)
    kinds = torch.eye(4).repeat_interleave(4, 0).repeat_interleave(3, 1)
    shuffled = torch.randperm(16, generator=random)
    order = _best_order([_View(kinds[shuffled] / kinds.sum(), 4, 0.25)], 16)
    found = (shuffled[order] // 4).view(4, 4)
    assert bool((found == found[:, :1]).all())


def test_order_is_near_the_best_of_all() -> None:
    random = torch.Generator().manual_seed(5)
    for _ in range(3):
        values = torch.rand(6, 8, generator=random) ** 4
        view = _View(values / values.sum(), 3, 0.25)

        def kept(order: Any, view: _View = view) -> float:
            return float((view.sums(order) * view.kept(order)).sum())

        every = sorted(kept(torch.tensor(o)) for o in itertools.permutations(range(6)))
        start, found = kept(torch.arange(6)), kept(_best_order([view], 6))
        # A local search: at least half of what there is to gain.
        assert found - start >= 0.5 * (every[-1] - start)


def test_saliency_decides_what_is_kept() -> None:
    model = build(PLAIN, "bert")
    worth = {
        name: linear.weight.detach().square() * torch.arange(1, linear.in_features + 1)
        for name, linear in encoder_linears(model).items()
    }
    report = permute(model, BlockPattern(8, 1), 0.75, residual=True, saliency=worth)
    for name, values in worth.items():
        share = BlockPattern(8, 1).cells(values)
        kept = BlockPattern(8, 1).select(share, 0.75)
        assert report.before[name] == pytest.approx(float(share[kept].sum() / share.sum()))
    assert sum(report.after.values()) > sum(report.before.values())


def test_same_model_gives_same_order() -> None:
    first, second = build(PLAIN, "bert"), build(PLAIN, "bert")
    permute(first, BlockPattern(8, 4), 0.75, residual=True)
    permute(second, BlockPattern(8, 4), 0.75, residual=True)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_mistakes_are_named() -> None:
    model = build(PLAIN, "bert")
    with pytest.raises(InvalidInput, match=r"24x1: does not divide .*query"):
        permute(model, BlockPattern(24, 1), 0.75, residual=False)
    masked = transformers.AutoModelForMaskedLM.from_config(tiny_config("bert", **CHANGES))
    with pytest.raises(InvalidInput, match=r"cls.* is not known to read the residual stream"):
        permute(masked, BlockPattern(8, 1), 0.75, residual=True)
    model.encoder.layer[1].extra = torch.nn.Linear(32, 32)
    with pytest.raises(InvalidInput, match=r"layer\.1\.extra is not known"):
        permute(model, BlockPattern(8, 1), 0.75, residual=False)
    del model.encoder.layer[1].extra
    linear = next(iter(encoder_linears(model).values()))
    parametrize.register_parametrization(linear, "weight", torch.nn.Identity())
    with pytest.raises(InvalidInput, match=r"has a mask already"):
        permute(model, BlockPattern(8, 1), 0.75, residual=False)
