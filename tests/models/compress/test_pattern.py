"""Patterns: which cells a weight falls into, and which stay."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.errors import InvalidInput
from sparsec.sparse.bsr import block_mask

torch = pytest.importorskip("torch", reason="compress needs the extra compress")

from sparsec.models.compress.pattern import (  # noqa: E402
    BlockPattern,
    GroupPattern,
    parse_pattern,
    sparsity_of,
)


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (16, 1), (1, 4), (16, 4)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 1.0])
def test_blocks_by_magnitude_are_those_of_the_numpy_rule(block, sparsity) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 24)).astype(np.float32)
    pattern = BlockPattern(*block)
    cells = pattern.cells(torch.from_numpy(weight).double().abs())
    kept = pattern.spread(pattern.select(cells, sparsity))
    np.testing.assert_array_equal(kept.numpy(), block_mask(weight, *block, sparsity))


def test_of_equal_blocks_the_first_go() -> None:
    kept = BlockPattern(1, 1).select(torch.ones(2, 3), 0.5)
    assert kept.tolist() == [[False, False, False], [True, True, True]]


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 4), (0.3, 3), (0.5, 2), (0.9, 2)])
def test_groups_keep_as_many_as_asked_but_n(sparsity: float, count: int) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 8)))
    pattern = GroupPattern(2, 4)
    kept = pattern.select(pattern.cells(weight.abs()), sparsity)
    groups = kept.reshape(3, 2, 4)
    assert (groups.sum(-1) == count).all()
    lost = weight.abs().reshape(3, 2, 4)[~groups].reshape(3, 2, -1) if count < 4 else None
    if lost is not None:
        least = torch.where(groups, weight.abs().reshape(3, 2, 4), torch.inf).amin(-1)
        assert (lost.amax(-1) <= least).all()


def test_sparsity_counts_cells() -> None:
    masks = [torch.tensor([True, False]), torch.tensor([False] * 6)]
    assert sparsity_of(masks) == pytest.approx(7 / 8)


@pytest.mark.parametrize(("text", "pattern"), [
    ("16x1", BlockPattern(16, 1)), ("1x4", BlockPattern(1, 4)), ("2:4", GroupPattern(2, 4)),
])  # fmt: skip
def test_reads_what_it_prints(text: str, pattern: object) -> None:
    assert parse_pattern(text) == pattern
    assert str(pattern) == text


@pytest.mark.parametrize("text", ["", "16", "0x1", "16x", "16x1x1", "4:2", "4:4", "-4x1", "axb"])
def test_refuses_what_is_no_pattern(text: str) -> None:
    with pytest.raises(InvalidInput, match="wanted output x input channels"):
        parse_pattern(text)


@pytest.mark.parametrize("pattern", [BlockPattern(5, 1), BlockPattern(1, 5), GroupPattern(2, 5)])
def test_names_the_weight_that_it_does_not_divide(pattern: BlockPattern | GroupPattern) -> None:
    with pytest.raises(InvalidInput, match=r"layer\.0\.query"):
        pattern.check("layer.0.query", (32, 24))
