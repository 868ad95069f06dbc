"""Gated activations and rotary embedding in panels against the ops' meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.channels import ChannelsFamily, Gated, Rotary
from sparsec.ir.ops import OPS

VARIANTS = ChannelsFamily().variants()
TOKENS = [1, 15, 16, 63, 64, 65, 130]
# Activations differ from NumPy's by some units in the last place (tests of the pointwise kernels
# say how many), and values here are below 4 in size.
TOLERANCE = 1e-5


def meaning(kernel: Gated | Rotary, operands: list[Any], **attrs: Any) -> Any:
    op = "gated" if isinstance(kernel, Gated) else "rotary"
    (result,) = OPS[op].evaluate(operands, attrs, {})
    return result


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("channels", [1, 2, 7])
def test_kernel_equals_oracle(
    kernel: Any, run: Any, rng: np.random.Generator, tokens: int, channels: int
) -> None:
    panels = -(-tokens // 64)
    width = 4 * channels + 3
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    if isinstance(kernel, Gated):
        y = np.zeros((panels, channels, 64), np.float32)
        offset, gate = channels + 2, 1
        args = (run.to_panels(x), y, width, channels, offset, gate)
        items, operands = panels, [x]
        attrs = {"activation": kernel.activation, "channels": channels}
        attrs |= {"offset": offset, "gate_offset": gate}
    else:
        heads, size, offset = 2, 2 * channels, 3
        angles = rng.uniform(-3, 3, (tokens, size))
        tables = [f(angles).astype(np.float32) for f in (np.cos, np.sin)]
        y = np.zeros((panels, heads * size, 64), np.float32)
        args = (run.to_panels(x), *map(run.to_panels, tables), y, width, heads, size, offset)
        items, operands = panels * heads, [x, *tables]
        attrs = {"heads": heads, "head_size": size, "offset": offset}
    assert run(kernel, *args, output=y, items=items) == 0
    wanted = meaning(kernel, operands, **attrs)
    np.testing.assert_allclose(run.from_panels(y, tokens), wanted, TOLERANCE, TOLERANCE)
