"""Attention over token panels against float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.attention import Attention, AttentionFamily
from sparsec.codegen.kernels.query_blocks import PACKED
from sparsec.ir.ops import OPS

Array = np.ndarray[Any, Any]
ALL = [k for k in AttentionFamily().variants() if isinstance(k, Attention)]
VARIANTS = [k for k in ALL if k.result == "f32" and k.mask != PACKED]
SOME = [k for k in VARIANTS if k.mask != "none"]
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Sizes:
    batch: int
    seq: int
    heads: int
    head_size: int

    @property
    def channels(self) -> int:
        return self.heads * self.head_size


def masks(kind: str, s: Sizes, rng: np.random.Generator) -> list[Array | None]:
    """Masks of every broadcast form of the kind; padding as -inf and as the lowest number."""
    if kind == "none":
        return [None]
    shapes: list[tuple[int, ...]]
    if kind == "key":
        shapes = [(s.batch, 1, 1, s.seq), (1, 1, 1, s.seq), (s.batch, s.heads, 1, s.seq)]
    else:
        shapes = [(s.seq, s.seq), (s.batch, 1, s.seq, s.seq), (s.batch, s.heads, s.seq, s.seq),
                  (1, s.heads, s.seq, s.seq)]  # fmt: skip
    made = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    lows = (-np.inf, float(np.finfo(np.float32).min), -np.inf, -1e4)
    for mask, low in zip(made, lows, strict=False):
        mask[..., 1:][rng.random(mask[..., 1:].shape) < 0.3] = low
    return list(made)


def mask_steps(mask: Array) -> list[int]:
    batch, heads, queries, keys = (1,) * (4 - mask.ndim) + mask.shape
    return [
        0 if batch == 1 else heads * queries * keys,
        0 if heads == 1 else queries * keys,
        0 if queries == 1 else keys,
    ]


def call(run: Any, kernel: Attention, sizes: Sizes, qkv: list[Array], mask: Array | None) -> Array:
    """`qkv`: three `[batch, seq, channels]`, or one that holds all three side by side."""
    tokens = sizes.batch * sizes.seq
    offsets = [0, 0, 0] if len(qkv) == 3 else [i * sizes.channels for i in range(3)]
    panels = [run.to_panels(x.reshape(tokens, -1)) for x in qkv] * (3 // len(qkv))
    y = np.full((panels[0].shape[0], sizes.channels, 64), np.nan, np.float32)
    args: list[Any] = [*panels, *([] if mask is None else [mask]), y]
    args += [tokens, sizes.seq, sizes.heads, sizes.head_size]
    for panel, offset in zip(panels, offsets, strict=True):
        args += [panel.shape[1], offset]
    args += [] if mask is None else mask_steps(mask)
    items = y.shape[0] * sizes.heads
    scratch = -(-sizes.seq // 16) * 16 * 64 * 4
    scale = sizes.head_size**-0.5
    assert run(kernel, *args, scale, output=y, items=items, scratch_bytes=scratch) == 0
    assert np.isfinite(
        y.transpose(0, 2, 1).reshape(-1, sizes.channels)[: -(-tokens // 16) * 16]
    ).all()
    return np.asarray(run.from_panels(y, tokens)).reshape(sizes.batch, sizes.seq, -1)


def expected(sizes: Sizes, qkv: list[Array], mask: Array | None) -> Array:
    attrs = {"heads": sizes.heads, "head_size": sizes.head_size, "scale": sizes.head_size**-0.5,
             **{f"{n}_offset": 0 for n in "qkv"}}  # fmt: skip
    wide = [x.astype(np.float64) for x in qkv]
    (y,) = OPS["attention"].evaluate([*wide, None if mask is None else mask.astype(np.float64)],
                                     attrs, {})  # fmt: skip
    return np.asarray(y)


def check(
    run: Any, kernel: Attention, sizes: Sizes, qkv: list[Array], mask: Array | None, *,
    merged: bool = False,
) -> None:  # fmt: skip
    y = call(run, kernel, sizes, [np.concatenate(qkv, axis=2)] if merged else qkv, mask)
    # A score is off by at most (head_size + 4) eps |q| |k| scale; the probabilities, relatively,
    # by twice that and (seq + 8) eps for exp and their sum; y is an average of v.
    q, k, v = (np.abs(x).max() for x in qkv)
    extra = 0.0 if mask is None else float(np.abs(mask[np.abs(mask) < 1e4]).max(initial=0))
    score = q * k * sizes.head_size**0.5 + extra
    bound = v * EPS * (2 * (sizes.head_size + 4) * score + 2 * sizes.seq + 16)
    want = expected(sizes, qkv, mask)
    assert np.abs(y - want).max() <= bound, (sizes, np.abs(y - want).max(), bound)


def random_qkv(sizes: Sizes, rng: np.random.Generator) -> list[Array]:
    shape = (3, sizes.batch, sizes.seq, sizes.channels)
    return list(rng.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seq", [1, 7, 15, 16, 33, 64, 65, 129])
def test_lengths(kernel: Attention, run: Any, batch: int, seq: int) -> None:
    rng = np.random.default_rng([batch, seq])
    for head_size, heads in ((8, 3), (33, 1)):
        sizes = Sizes(batch, seq, heads, head_size)
        qkv = random_qkv(sizes, rng)
        for mask in masks(kernel.mask, sizes, rng):
            check(run, kernel, sizes, qkv, mask)


@pytest.mark.parametrize("head_size", [1, 5, 8, 32, 33, 64])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_side_by_side(kernel: Attention, run: Any, heads: int, head_size: int) -> None:
    rng = np.random.default_rng([heads, head_size])
    sizes = Sizes(2, 40, heads, head_size)
    mask = masks(kernel.mask, sizes, rng)[0]
    check(run, kernel, sizes, random_qkv(sizes, rng), mask, merged=True)


def test_many_short_sequences(kernel: Attention, run: Any, rng: np.random.Generator) -> None:
    sizes = Sizes(150, 1, 2, 16)
    for mask in masks(kernel.mask, sizes, rng):
        check(run, kernel, sizes, random_qkv(sizes, rng), mask)


def test_a_sequence_of_nan_stays_alone(kernel: Attention, run: Any) -> None:
    rng = np.random.default_rng(5)
    sizes = Sizes(3, 21, 2, 8)
    qkv = random_qkv(sizes, rng)
    mask = masks(kernel.mask, sizes, rng)[0]
    want = expected(sizes, qkv, mask)
    for x in qkv:
        x[1] = np.nan
    tokens = sizes.batch * sizes.seq
    args = [run.to_panels(x.reshape(tokens, -1)) for x in qkv]
    y = np.full_like(args[0], np.nan)
    args += [] if mask is None else [mask]
    numbers = [tokens, sizes.seq, 2, 8, *[16, 0] * 3, *([] if mask is None else mask_steps(mask))]
    status = run(kernel, *args, y, *numbers, 8**-0.5, output=y, items=2, scratch_bytes=32 * 256)
    got = run.from_panels(y, tokens).reshape(3, 21, -1)
    assert status == 0
    assert np.isnan(got[1]).all()
    np.testing.assert_allclose(got[::2], want[::2], rtol=1e-4, atol=1e-5)


def test_all_keys_masked(some_kernel: Attention, run: Any, rng: np.random.Generator) -> None:
    sizes = Sizes(2, 20, 1, 8)
    qkv = random_qkv(sizes, rng)
    for mask in masks(some_kernel.mask, sizes, rng):
        assert mask is not None
        whole = np.array(np.broadcast_to(mask, (2, 1, mask.shape[-2], 20)))
        whole[1] = -np.inf  # no key at all: zeros
        check(run, some_kernel, sizes, qkv, whole)
        whole[1] = np.finfo(np.float32).min  # no difference between keys: their mean
        check(run, some_kernel, sizes, qkv, whole)
