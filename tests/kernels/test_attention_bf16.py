"""bf16 attention over panels of pairs against float64 NumPy on the same rounded operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.isa.amx import ALL_FULL
from sparsec.codegen.kernels.attention_bf16 import AttentionBf16, AttentionBf16Family
from sparsec.codegen.kernels.quantize import inverse_of
from sparsec.codegen.kernels.query_blocks import PACKED
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType

Array = np.ndarray[Any, Any]
ALL = [k for k in AttentionBf16Family().variants() if isinstance(k, AttentionBf16)]
VARIANTS = [k for k in ALL if k.result == "f32" and k.mask != PACKED]
SOME = [k for k in ALL if k.result != "f32" and k.rows in (4, 16) and k.mask != PACKED]
EACH_ISA = [k for k in VARIANTS if k.rows in (4, 16) and k.mask == "none"]
EPS = float(np.finfo(np.float32).eps)
BF16 = DType.BF16.numpy
SEQS = [1, 2, 7, 17, 48, 64, 65, 129]


@dataclass(frozen=True)
class Case:
    batch: int
    seq: int
    head_size: int
    heads: int = 2

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def channels(self) -> int:
        return self.heads * self.head_size

    @property
    def attrs(self) -> dict[str, Any]:
        offsets = {f"{x}_offset": i * self.channels for i, x in enumerate("qkv")}
        scale = self.head_size**-0.5
        return {"heads": self.heads, "head_size": self.head_size, "scale": scale, **offsets}


def mask_of(kind: str, c: Case, rng: np.random.Generator) -> tuple[Array | None, list[int]]:
    """The mask and its (batch, head, query) steps; all keys of the last sequence are masked."""
    if kind == "none":
        return None, []
    queries = 1 if kind == "key" else c.seq
    mask = rng.standard_normal((c.batch, 1, queries, c.seq)).astype(np.float32)
    mask[..., 1:][rng.random(mask[..., 1:].shape) < 0.3] = np.finfo(np.float32).min
    mask[-1] = -np.inf if c.batch > 1 else 0.0
    return mask, [queries * c.seq, 0, 0 if queries == 1 else c.seq]


def call(run: Any, kernel: AttentionBf16, c: Case, x: Array, mask: Array | None, *end: Any) -> Any:
    """The panels that the kernel writes for `x` bf16[tokens, 3 * channels]; q, k, v are in it."""
    panels = run.to_pairs(x)
    dtype, rows = {
        "f32": (np.float32, c.channels),
        "u8": (np.uint8, c.channels),
        "bf16": (np.int32, c.channels // 2),
    }[kernel.result]
    y = np.full((panels.shape[0], rows, 64), 99, dtype)
    places = [n for i in range(3) for n in (3 * c.channels // 2, i * c.channels // 2)]
    steps = end[0] if mask is not None else []
    numbers = [c.tokens, c.seq, c.heads, c.head_size, *places, *steps, c.attrs["scale"], *end[1:]]
    given = [panels, panels, panels, *([] if mask is None else [mask]), y]
    scratch = int(kernel.block.scratch_bytes(c.seq, c.head_size))  # type: ignore[call-overload]
    tiles = [ALL_FULL] if kernel.has_tiles else []
    status = run(kernel, *given, *numbers, *tiles, output=y, items=y.shape[0] * c.heads,
                 scratch_bytes=scratch)  # fmt: skip
    assert status == 0
    return y


def operands(c: Case, rng: np.random.Generator) -> Array:
    return rng.standard_normal((c.tokens, 3 * c.channels)).astype(BF16)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seq", SEQS)
@pytest.mark.parametrize("units", [1, 3])
def test_against_exact_softmax(
    kernel: AttentionBf16, run: Any, batch: int, seq: int, units: int
) -> None:
    c = Case(batch, seq, units * kernel.block.head_unit)
    rng = np.random.default_rng([batch, seq, units])
    x = operands(c, rng)
    mask, steps = mask_of(kernel.mask, c, rng)
    y = call(run, kernel, c, x, mask, steps)
    assert np.isfinite(
        y.transpose(0, 2, 1).reshape(-1, c.channels)[: -(-c.tokens // 16) * 16]
    ).all()
    wide = x.astype(np.float64).reshape(batch, seq, -1)
    exact, sizes = (
        OPS["attention"].evaluate([wide, wide, v, mask], c.attrs, {})[0]
        for v in (wide, np.abs(wide))
    )
    # Each probability is rounded to bf16, half to even: off by 2**-8 of it. Sums of head_size
    # products, of seq probabilities, and exp of scores below 2**5 are off by a few eps a term.
    terms = 8 * c.head_size + seq + 64
    bound = (2.0**-8 + terms * EPS) * sizes + 1e-30
    got = run.from_panels(y, c.tokens).reshape(exact.shape)
    assert (np.abs(got - exact) <= bound).all(), np.abs(got - exact).max()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seq", [1, 17, 64, 65])
def test_stored_results_are_those_of_fp32(
    some_kernel: AttentionBf16, run: Any, batch: int, seq: int
) -> None:
    c, plain = Case(batch, seq, 3 * some_kernel.block.head_unit), None
    rng = np.random.default_rng([batch, seq])
    x = operands(c, rng)
    mask, steps = mask_of(some_kernel.mask, c, rng)
    plain = AttentionBf16(some_kernel.vector, some_kernel.groups, some_kernel.rows,
                          some_kernel.mask)  # fmt: skip
    y = run.from_panels(call(run, plain, c, x, mask, steps), c.tokens)
    if some_kernel.result == "bf16":
        stored = run.from_pairs(call(run, some_kernel, c, x, mask, steps), c.tokens)
        np.testing.assert_array_equal(stored, y.astype(BF16))
        return
    scale, zero_point = 0.011, 120
    stored = call(run, some_kernel, c, x, mask, steps, inverse_of(scale), zero_point)
    attrs = {"scale": scale, "zero_point": zero_point, "dtype": DType.U8}
    (expected,) = OPS["quantize"].evaluate([y], attrs, {})
    np.testing.assert_array_equal(run.from_panels(stored, c.tokens), expected)


@pytest.mark.isa("avx512bf16")
@pytest.mark.parametrize(
    "plain", [pytest.param(k, marks=pytest.mark.isa(k.isa), id=k.isa) for k in EACH_ISA]
)
def test_a_sequence_does_not_see_the_values_of_its_neighbours(
    plain: AttentionBf16, run: Any
) -> None:
    """Pairs of keys straddle sequences of odd length: infinities stay where they are."""
    c = Case(3, 5, plain.block.head_unit)
    x = operands(c, np.random.default_rng(0))
    x[5:10, 2 * c.channels :] = np.inf
    y = run.from_panels(call(run, plain, c, x, None, []), c.tokens)
    assert np.isfinite(y[:5]).all()
    assert np.isfinite(y[10:]).all()
    assert np.isinf(y[5:10]).all()
