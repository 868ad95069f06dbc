"""Distillation losses: 0 for the teacher itself, and what they are by hand."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="compress needs the extra compress")

from sparsec.models.compress.distil import (  # noqa: E402
    Seen,
    embedding_loss,
    hidden_loss,
    logits_loss,
    losses,
    mean_pooled,
    relation_loss,
    similarity_loss,
    total,
)
from sparsec.models.compress.recipe import Distillation  # noqa: E402

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
ALL = Distillation(labels=0, logits=1, hidden=2, relations=3, embedding=4, similarity=5)


def seen(seed: int, layers: int = 2, channels: int = 8, heads: int = 2) -> Seen:
    made = torch.Generator().manual_seed(seed)
    hidden = tuple(torch.randn(2, 4, channels, generator=made) for _ in range(layers + 1))
    relations = tuple(torch.randn(2, 4, channels, generator=made) for _ in range(3))
    return Seen({"logits": torch.randn(2, 3, generator=made)}, hidden, relations, heads)


def test_a_student_that_is_its_teacher_loses_nothing() -> None:
    parts = losses(seen(0), seen(0), MASK, ALL)
    assert sorted(parts) == ["embedding", "hidden", "logits", "relations", "similarity"]
    for name, part in parts.items():
        assert part.item() == pytest.approx(0.0, abs=1e-6), name


def test_parts_are_weighted_and_those_without_weight_are_not_computed() -> None:
    parts = losses(seen(0), seen(1), MASK, Distillation(logits=1, hidden=2))
    assert sorted(parts) == ["hidden", "logits"]
    wanted = parts["logits"] + 2 * parts["hidden"] + 5 * torch.tensor(0.5)
    weights = Distillation(labels=5, logits=1, hidden=2)
    assert torch.isclose(total({**parts, "labels": torch.tensor(0.5)}, weights), wanted)


def test_padding_counts_nowhere() -> None:
    ours, theirs = seen(0), seen(1)
    before = losses(ours, theirs, MASK, ALL)
    padding = MASK == 0
    for tensor in (*ours.hidden, *theirs.hidden, *ours.relations, *theirs.relations):
        tensor[padding] = 1e3
    for name, part in losses(ours, theirs, MASK, ALL).items():
        torch.testing.assert_close(part, before[name])


def test_spans_do_not_end_in_padding() -> None:
    outputs = [{"start_logits": torch.zeros(2, 4), "end_logits": torch.zeros(2, 4)} for _ in "ab"]
    outputs[0]["end_logits"][1, 3] = 50.0  # padding
    ours, theirs = (Seen(o, (), (), 1) for o in outputs)
    weights = Distillation(logits=1, hidden=0)
    assert losses(ours, theirs, MASK, weights)["logits"].item() == pytest.approx(0.0, abs=1e-6)


def test_logits_are_softened_and_scaled_back() -> None:
    ours, theirs = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    # At temperature 2 the classes are one logit apart, so p = sigmoid(1) against 1 - p; the
    # divergence is (2 p - 1) x 1, and it is scaled by 2^2.
    wanted = 4 * (2 * torch.sigmoid(torch.tensor(1.0)) - 1)
    assert torch.isclose(logits_loss(ours, theirs, 2.0), wanted)


def test_hidden_states_are_relative_to_the_teachers_spread() -> None:
    ours, theirs = seen(0), seen(1)
    scaled = [tuple(100 * h for h in s.hidden) for s in (ours, theirs)]
    plain = hidden_loss(ours.hidden, theirs.hidden, MASK)
    torch.testing.assert_close(hidden_loss(*scaled, MASK), plain)


def test_a_deeper_teacher_is_looked_at_in_every_second_layer() -> None:
    ours, theirs = seen(0, layers=2), seen(1, layers=4)
    chosen = tuple(theirs.hidden[i] for i in (0, 2, 4))
    wanted = hidden_loss(ours.hidden, chosen, MASK)
    torch.testing.assert_close(hidden_loss(ours.hidden, theirs.hidden, MASK), wanted)


def test_relations_compare_models_of_other_widths() -> None:
    assert relation_loss(seen(0, channels=8), seen(1, channels=16, heads=4), MASK) > 0
    assert relation_loss(seen(0, channels=8), seen(1, channels=12, heads=6), MASK) > 0


def test_embeddings_compare_directions_of_the_mean_over_real_tokens() -> None:
    hidden = seen(0).hidden[-1]
    pooled = mean_pooled(hidden, MASK)
    torch.testing.assert_close(pooled[1], hidden[1, :2].mean(0))
    assert embedding_loss(3 * hidden, hidden, MASK).item() == pytest.approx(0.0, abs=1e-6)
    assert embedding_loss(-hidden, hidden, MASK).item() == pytest.approx(2.0)


def test_similarity_compares_the_cosines_of_pairs_of_rows() -> None:
    """By hand: two embeddings at 60 degrees against two at 90, so 0.5 against 0."""
    ours = torch.tensor([[[1.0, 0.0]], [[0.5, 0.75**0.5]]])
    theirs = torch.tensor([[[2.0, 0.0, 0.0]], [[0.0, 0.0, 3.0]]])
    mask = torch.ones(2, 1)
    assert similarity_loss(ours, theirs, mask).item() == pytest.approx((0.5 / 0.1) ** 2)
    assert similarity_loss(theirs, theirs, mask).item() == pytest.approx(0.0, abs=1e-9)
    assert similarity_loss(ours[:1], theirs[:1], mask[:1]).item() == 0.0
