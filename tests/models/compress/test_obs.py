"""Block OBS against brute force: refits by least squares, costs by really leaving blocks out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="compress needs the extra compress")

from sparsec.errors import InvalidInput  # noqa: E402
from sparsec.models.compress.obs import (  # noqa: E402
    Problem,
    keep_best,
    obs_scores,
    refit,
)


def obs_prune(
    weight: Any, hessian: Any, rows: int, sparsity: float, kept: Any = None
) -> tuple[Any, Any]:
    """The weight without its cheapest blocks of one column, refitted, and what it keeps."""
    problem = Problem.of(weight, hessian)
    chosen = keep_best(obs_scores(problem, rows, 1, kept=kept), sparsity)
    return refit(problem, chosen), chosen


def example(out: int, depth: int, tokens: int = 200, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return a weight, correlated inputs and targets of another model, float64."""
    random = torch.Generator().manual_seed(seed)
    normal = {"generator": random, "dtype": torch.float64}
    w = torch.randn(out, depth, **normal)
    x = torch.randn(tokens, depth, **normal) @ torch.randn(depth, depth, **normal)
    return w, x, x @ w.T + 0.5 * torch.randn(tokens, out, **normal)


def loss(w: Any, x: Any, t: Any) -> float:
    return float((t - x @ w.T).square().sum())


def spread(kept: Any, rows: int, cols: int) -> Any:
    return kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (4, 1), (2, 4), (8, 2)])
def test_refit_is_the_least_squares_optimum(rows: int, cols: int) -> None:
    w, x, t = example(8, 16)
    random = torch.Generator().manual_seed(1)
    kept = torch.rand(8 // rows, 16 // cols, generator=random) < 0.5
    got = refit(Problem.of(w, x.T @ x, t.T @ x, damping=1e-12), kept)
    support = spread(kept, rows, cols)
    assert not got[~support].any()
    for i in range(8):
        wanted = torch.linalg.lstsq(x[:, support[i]], t[:, i]).solution
        torch.testing.assert_close(got[i, support[i]], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("rows", "cols"), [(4, 1), (2, 4)])
def test_cost_of_one_block_is_what_leaving_it_out_costs(rows: int, cols: int) -> None:
    """The first block of a row to leave scores the growth of the loss of the best refits."""
    w, x, t = example(4, 8)
    problem = Problem.of(w, x.T @ x, t.T @ x, damping=1e-12)
    scores = obs_scores(problem, rows, cols, step_share=1e-9)
    everything = torch.ones(4 // rows, 8 // cols, dtype=torch.bool)
    before = loss(refit(problem, everything), x, t)
    for i in range(4 // rows):
        growth = []
        for j in range(8 // cols):
            kept = everything.clone()
            kept[i, j] = False
            growth.append(loss(refit(problem, kept), x, t) - before)
        first = min(range(len(growth)), key=growth.__getitem__)
        assert int(scores[i].argmin()) == first
        # The scores are float32, and the growth is a difference of larger sums.
        assert float(scores[i, first]) == pytest.approx(growth[first], rel=1e-3)


def test_pruning_is_near_the_best_of_all_masks_and_beats_magnitude() -> None:
    w, x, t = example(4, 8)
    problem = Problem.of(w, x.T @ x, t.T @ x, damping=1e-12)
    kept = keep_best(obs_scores(problem, 4, 1), 0.5)
    pruned = refit(problem, kept)
    assert int(kept.sum()) == 4
    every = []
    for chosen in itertools.combinations(range(8), 4):
        mask = torch.zeros(1, 8, dtype=torch.bool)
        mask[0, list(chosen)] = True
        every.append(loss(refit(problem, mask), x, t))
    magnitude = w.square().sum(0, keepdim=True)
    by_magnitude = loss(refit(problem, keep_best(magnitude, 0.5)), x, t)
    # Greedy elimination has no bound that helps here; of these 70 masks it finds a top one.
    assert sorted(every).index(min(every, key=lambda e: abs(e - loss(pruned, x, t)))) < 3
    assert loss(pruned, x, t) < by_magnitude


def test_the_highest_scores_are_a_rows_support_at_any_sparsity() -> None:
    """Masks of a row grow into each other, and small steps are at least as good as one."""
    w, x, t = example(4, 32)
    problem = Problem.of(w, x.T @ x, t.T @ x)
    scores = obs_scores(problem, 4, 1)
    masks = [keep_best(scores, s) for s in (0.25, 0.5, 0.75)]
    assert [int(m.sum()) for m in masks] == [24, 16, 8]
    for more, fewer in itertools.pairwise(masks):
        assert bool((more | ~fewer).all())
    at_once = keep_best(obs_scores(problem, 4, 1, step_share=1.0), 0.75)
    assert loss(refit(problem, masks[2]), x, t) < loss(refit(problem, at_once), x, t)


@pytest.mark.parametrize(("rows", "cols"), [(4, 1), (4, 4)])
def test_a_start_mask_is_only_tightened(rows: int, cols: int) -> None:
    """Rows with different numbers of blocks go together; no block comes back."""
    w, x, t = example(16, 32)
    problem = Problem.of(w, x.T @ x, t.T @ x)
    random = torch.Generator().manual_seed(2)
    start = torch.rand(16 // rows, 32 // cols, generator=random) < 0.6
    scores = obs_scores(problem, rows, cols, kept=start)
    assert bool((scores[~start] == -1).all())
    assert bool((scores[start] > 0).all())
    for i in range(16 // rows):  # alone, a row gets the same scores
        alone = Problem(problem.hessian, problem.cross[i * rows : (i + 1) * rows])
        wanted = obs_scores(alone, rows, cols, kept=start[i : i + 1])[0]
        chosen = wanted[start[i]].argsort()[-2:]
        assert set(chosen.tolist()) == set(scores[i][start[i]].argsort()[-2:].tolist())
    kept = keep_best(scores, 0.8)
    assert bool((start | ~kept).all())


def test_a_whole_start_mask_changes_nothing() -> None:
    w, x, t = example(16, 32)
    problem = Problem.of(w, x.T @ x, t.T @ x)
    free = obs_scores(problem, 8, 1)
    given = obs_scores(problem, 8, 1, kept=torch.ones(2, 32, dtype=torch.bool))
    assert torch.equal(free, given)


def test_inputs_that_are_always_zero_are_dropped() -> None:
    w, x, _ = example(8, 16)
    x[:, 3] = 0.0
    pruned, kept = obs_prune(w, x.T @ x, 8, 0.5)
    assert not kept[:, 3].any()
    assert bool(torch.isfinite(pruned).all())
    nothing, _ = obs_prune(w, torch.zeros(16, 16), 8, 0.5)
    assert bool(torch.isfinite(nothing).all())


def test_mistakes_are_named() -> None:
    w, x, _ = example(8, 16)
    hessian = x.T @ x
    with pytest.raises(InvalidInput, match=r"16x1.*do not divide a weight of 8x16"):
        obs_prune(w, hessian, 16, 0.5)
    few = torch.zeros(1, 16, dtype=torch.bool)
    few[0, :2] = True
    with pytest.raises(InvalidInput, match="keeps 8 blocks, but only 2 are left"):
        obs_prune(w, hessian, 8, 0.5, few)
    with pytest.raises(InvalidInput, match="kept blocks have shape"):
        obs_prune(w, hessian, 4, 0.5, few)
