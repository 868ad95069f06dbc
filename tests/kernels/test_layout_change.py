"""Rows of tokens to panels and back: nothing but copies, so results are equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.layout_change import LayoutChange, LayoutChangeFamily

VARIANTS = LayoutChangeFamily().variants()


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 40])
def test_layout_change(kernel: LayoutChange, run: Any, tokens: int, channels: int) -> None:
    rng = np.random.default_rng([tokens, channels])
    rows = rng.integers(0, 256, (tokens, channels)).astype(kernel.element)
    if kernel.direction == "to_panels":
        source, expected = rows, run.to_panels(rows, lanes_past_end=0.0)
    else:
        source, expected = run.to_panels(rows), rows
    y = np.full_like(expected, np.nan if kernel.element == "float32" else 99)  # as to_panels
    assert run(kernel, source, y, tokens, channels, output=y, items=-(-tokens // 16)) == 0
    np.testing.assert_array_equal(y, expected)
