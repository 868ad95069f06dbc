"""Attention with integer products against float64, and its bytes against its own numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.isa.amx import ALL_FULL
from sparsec.codegen.isa.int8 import AVX512_VNNI
from sparsec.codegen.kernels.attention_int8 import AttentionInt8, AttentionInt8Family
from sparsec.codegen.kernels.quantize import inverse_of
from sparsec.codegen.kernels.query_blocks import PACKED
from sparsec.ir.dims import Dim, evaluate, symbol
from sparsec.ir.graph import Graph, Node
from sparsec.ir.layouts import Panels
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType
from sparsec.target import Target

Array = np.ndarray[Any, Any]
ALL = [k for k in AttentionInt8Family().variants() if isinstance(k, AttentionInt8)]
# AMX equals AVX512-VNNI bit by bit: test_all_equal_vnni.
VARIANTS = [k for k in ALL if k.result == "f32" and k.mask != PACKED and k.isa != "amx"]
SOME = [k for k in VARIANTS if k.mask in ("key", "full")]
OTHERS = [  # than those on AVX512-VNNI
    pytest.param(k, marks=pytest.mark.isa("amx" if k.has_tiles else "avx512vnni"), id=k.name)
    for k in ALL
    if k.int8 is not AVX512_VNNI and k.mask != PACKED
]
EPS = float(np.finfo(np.float32).eps)
V_SCALE = 0.013
BATCH, SEQ = symbol("batch"), symbol("seq")


@dataclass(frozen=True)
class Case:
    """`spread` is the size of the scores, `qkv` is u8 [3, batch, seq, channels]."""

    batch: int
    seq: int
    heads: int
    head_size: int
    spread: float = 3.0

    @property
    def channels(self) -> int:
        return self.heads * self.head_size

    @property
    def factor(self) -> float:
        """74 is the deviation of a uniform byte."""
        return float(np.float32(self.spread / (74 * 74 * self.head_size**0.5)))

    def qkv(self, rng: np.random.Generator) -> Array:
        shape = (3, self.batch, self.seq, self.channels)
        return rng.integers(0, 256, shape).astype(np.uint8)

    def heads_of(self, x: Array) -> Array:
        """[batch, heads, seq, head_size] without the zero point."""
        wide = x.astype(np.float64) - 128
        parts = wide.reshape(self.batch, self.seq, self.heads, self.head_size)
        return parts.transpose(0, 2, 1, 3)


def call(run: Any, kernel: AttentionInt8, case: Case, qkv: Array, mask: Array | None,
         out: tuple[float, int] | None = None) -> Array:  # fmt: skip
    tokens = case.batch * case.seq
    merged = run.to_panels(np.concatenate(list(qkv), axis=2).reshape(tokens, -1))
    fill, dtype = (np.nan, np.float32) if kernel.result == "f32" else (99, np.uint8)
    y = np.full((merged.shape[0], case.channels, 64), fill, dtype)
    args: list[Any] = [merged] * 3 + ([] if mask is None else [mask]) + [y]
    args += [tokens, case.seq, case.heads, case.head_size]
    args += [n for i in range(3) for n in (3 * case.channels, i * case.channels)]
    if mask is not None:
        batch, heads, queries, keys = mask.shape
        args += [0 if batch == 1 else heads * queries * keys, 0 if heads == 1 else queries * keys]
        args += [keys] if kernel.mask == "full" else []
    args += [case.factor, V_SCALE, *(() if out is None else (inverse_of(out[0]), out[1]))]
    args += [ALL_FULL] if kernel.has_tiles else []
    scratch = evaluate(kernel.block.scratch_bytes(case.seq, case.head_size, kernel.mask), {})
    items = y.shape[0] * case.heads
    assert run(kernel, *args, output=y, items=items, scratch_bytes=scratch) == 0
    return np.asarray(run.from_panels(y, tokens))


def expected(case: Case, qkv: Array, mask: Array | None) -> tuple[Array, Array]:
    """The result and how far a kernel may be from it.

    The kernel's 255 * exp(x) is off by 1e-4 of it and by the fp32 rounding of x, so a
    probability may be a step off where 255 * exp(x) is that near to a half. Each such step moves
    the average of v by the distance of that key's v, over the sum of the probabilities.
    """
    q, k, v = (case.heads_of(x) for x in qkv)
    scores = q @ k.swapaxes(-1, -2) * case.factor
    size = np.abs(scores).max()
    if mask is not None:
        scores = scores + mask
        size += np.abs(mask[np.abs(mask) < 1e3]).max(initial=0)
    highest = scores.max(axis=-1, keepdims=True)
    steps = 255 * np.exp(scores - np.where(np.isneginf(highest), 0, highest))
    near = np.abs(steps - np.floor(steps) - 0.5) <= steps * (1e-4 + 4 * EPS * size) + 1e-6
    p = np.rint(steps)
    total = np.maximum(p.sum(axis=-1, keepdims=True), 1)
    context = p @ v / total
    distance = np.abs(v[:, :, None] - context[:, :, :, None])  # [b, h, query, key, d]
    moved = np.einsum("bhqk,bhqkd->bhqd", near, distance) / total
    # Steps may also leave the sum: the first-order bound above grows by their share of it.
    share = near.sum(axis=-1, keepdims=True) / total
    bound = (moved / np.maximum(1 - share, 0.5) + 4 * EPS * 128) * V_SCALE
    flat = (case.batch * case.seq, case.channels)
    return tuple(x.transpose(0, 2, 1, 3).reshape(flat) for x in (context * V_SCALE, bound))


def random_mask(kernel: AttentionInt8, case: Case, rng: np.random.Generator) -> Array | None:
    if kernel.mask == "none":
        return None
    queries = case.seq if kernel.mask == "full" else 1
    mask = rng.standard_normal((case.batch, 1, queries, case.seq)).astype(np.float32)
    mask[..., 1:][rng.random(mask[..., 1:].shape) < 0.2] = -np.inf
    return mask


def check(run: Any, kernel: AttentionInt8, case: Case, qkv: Array, mask: Array | None) -> None:
    y = call(run, kernel, case, qkv, mask)
    want, bound = expected(case, qkv, mask)
    worst = np.unravel_index((np.abs(y - want) - bound).argmax(), y.shape)
    assert (np.abs(y - want) <= bound).all(), (case, y[worst], want[worst], bound[worst])
    out = (0.011, 100)
    stored = call(run, replace(kernel, result="u8"), case, qkv, mask, out)
    attrs = {"scale": out[0], "zero_point": out[1], "dtype": DType.U8}
    np.testing.assert_array_equal(stored, OPS["quantize"].evaluate([y], attrs, {})[0])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seq", [1, 2, 7, 15, 16, 17, 32, 33, 48, 64, 65, 127, 128, 129])
def test_lengths(kernel: AttentionInt8, run: Any, batch: int, seq: int) -> None:
    rng = np.random.default_rng([batch, seq])
    for head_size in (4, 20):
        case = Case(batch, seq, 2, head_size)
        check(run, kernel, case, case.qkv(rng), random_mask(kernel, case, rng))


@pytest.mark.parametrize("head_size", [4, 8, 12, 16, 28, 32, 64, 96])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("spread", [0.1, 8.0])
def test_heads_side_by_side(
    kernel: AttentionInt8, run: Any, heads: int, head_size: int, spread: float
) -> None:
    rng = np.random.default_rng([heads, head_size])
    case = Case(2, 40, heads, head_size, spread)
    check(run, kernel, case, case.qkv(rng), random_mask(kernel, case, rng))


def test_many_short_sequences(kernel: AttentionInt8, run: Any, rng: np.random.Generator) -> None:
    for batch, seq in ((150, 1), (40, 5)):
        case = Case(batch, seq, 2, 8)
        check(run, kernel, case, case.qkv(rng), random_mask(kernel, case, rng))


def test_the_largest_bytes(kernel: AttentionInt8, run: Any) -> None:
    """The corners of the integer ranges: no product saturates, no sum overflows."""
    case = Case(1, 70, 1, 64, 0.01)
    for q, k, v in ((0, 0, 0), (255, 255, 255), (0, 255, 0), (255, 0, 255)):
        qkv = np.empty((3, 1, 70, 64), np.uint8)
        qkv[0], qkv[1], qkv[2] = q, k, v
        check(
            run,
            kernel,
            case,
            qkv,
            None if kernel.mask == "none" else np.zeros((1, 1, 70, 70), np.float32),
        )


def test_broadcast_masks(some_kernel: AttentionInt8, run: Any, rng: np.random.Generator) -> None:
    case = Case(2, 21, 3, 8)
    queries = 21 if some_kernel.mask == "full" else 1
    for outer in ((1, 1), (2, 1), (2, 3), (1, 3)):
        shape = (*outer, queries, 21)
        mask = rng.standard_normal(shape).astype(np.float32)
        check(run, some_kernel, case, case.qkv(rng), mask)


def test_all_keys_masked(some_kernel: AttentionInt8, run: Any, rng: np.random.Generator) -> None:
    case = Case(2, 21, 1, 8)
    queries = 21 if some_kernel.mask == "full" else 1
    mask = rng.standard_normal((2, 1, queries, 21)).astype(np.float32)
    for lowest in (-np.inf, np.finfo(np.float32).min):  # zeros, and the mean of all values
        mask[1] = lowest
        qkv = case.qkv(rng)
        y = call(run, some_kernel, case, qkv, mask)
        want, bound = expected(case, qkv, np.where(mask == -np.inf, mask, np.maximum(mask, -1e9)))
        if lowest == -np.inf:
            assert (y[21:] == 0).all()
        else:
            # Adding the lowest number to a score gives the lowest number again.
            mean = case.heads_of(qkv[2])[1, 0].mean(axis=0) * V_SCALE
            np.testing.assert_allclose(y[21:], np.tile(mean, (21, 1)), rtol=1e-5, atol=1e-6)
        assert (np.abs(y - want) <= bound)[:21].all()


@pytest.mark.parametrize("seq", [5, 16, 33, 70])
def test_triangles_and_windows(some_kernel: AttentionInt8, run: Any, seq: int) -> None:
    """A query sees the keys up to its own, or those near it: few keys, and no two alike."""
    if some_kernel.mask != "full":
        return
    rng = np.random.default_rng(seq)
    case, distance = Case(2, seq, 2, 16), np.subtract.outer(np.arange(seq), np.arange(seq))
    for hidden in (distance < 0, np.abs(distance) > 2):
        for lowest in (-np.inf, np.finfo(np.float32).min):
            mask = np.where(hidden, lowest, 0).astype(np.float32)[None, None]
            qkv = case.qkv(rng)
            y = call(run, some_kernel, case, qkv, mask)
            want, bound = expected(case, qkv, np.maximum(mask, -1e9))
            assert (np.abs(y - want) <= bound).all()


# Few heads and tokens, as emulated tiles are slow: every kind of block, with head sizes around
# tiles of 16 channels and steps of 64, and sequences around tiles of 16 keys and panels of 64.
BIT_CASES = [
    Case(1, 1, 1, 16),
    Case(3, 5, 1, 20),
    Case(14, 5, 1, 16),
    Case(2, 15, 1, 28),
    Case(1, 17, 3, 16),
    Case(4, 16, 1, 32),
    Case(3, 32, 1, 32),
    Case(1, 64, 2, 64),
    Case(1, 66, 1, 68),
    Case(2, 48, 1, 36),
    Case(2, 97, 1, 32),
    Case(1, 130, 1, 132),
]


@pytest.mark.parametrize("case", BIT_CASES, ids=str)
@pytest.mark.parametrize("other", OTHERS)
def test_all_equal_vnni(other: AttentionInt8, case: Case, run: Any) -> None:
    rng = np.random.default_rng([case.batch, case.seq, case.head_size])
    qkv, mask = case.qkv(rng), random_mask(other, case, rng)
    out = (0.011, 100) if other.result == "u8" else None
    vnni = replace(other, int8=AVX512_VNNI)
    got, want = (call(run, kernel, case, qkv, mask, out) for kernel in (other, vnni))
    np.testing.assert_array_equal(got, want)


def node_of(mask_shape: tuple[Dim, ...] | None, attrs: dict[str, Any], head_size: int = 8) -> Node:
    """Three heads; q, k and v are parts of one value."""
    graph, width = Graph("g"), 3 * head_size
    x = graph.add_input("x", DType.U8, (BATCH, SEQ, 3 * width))
    graph.set_type(x, x.type.with_layout(Panels()))
    mask = None if mask_shape is None else graph.add_input("mask", DType.F32, mask_shape)
    sizes = {"heads": 3, "head_size": head_size, "scale": 1 / head_size**0.5,
             "q_offset": 0, "k_offset": width, "v_offset": 2 * width,
             "q_scale": 0.01, "k_scale": 0.02, "v_scale": 0.03}  # fmt: skip
    return graph.add_node("attention_int8", [x, x, x, mask], {**sizes, **attrs})


LEVELS = {"avx2": "haswell", "avx512vnni": "icelake-server", "amx": "sapphirerapids"}


@pytest.mark.parametrize("level", [pytest.param(n, marks=pytest.mark.isa(n)) for n in LEVELS])
@pytest.mark.parametrize("shape", [None, (BATCH, 1, 1, SEQ), (3, SEQ, SEQ)], ids=str)
@pytest.mark.parametrize("attrs", [{}, {"out_scale": 0.02, "out_zero_point": 120}])
def test_lowered_node(
    shape: tuple[Dim, ...] | None, attrs: dict[str, Any], level: str, run: Any
) -> None:
    rng = np.random.default_rng(7)
    env, head_size = {"batch": 3, "seq": 43}, 20
    width = 3 * head_size
    node = node_of(shape, attrs, head_size)
    x = rng.integers(0, 256, (3, 43, 3 * width)).astype(np.uint8)
    sizes = [] if shape is None else [evaluate(n, env) for n in shape]
    mask = rng.standard_normal(sizes).astype(np.float32)
    operands = [x, x, x, None if shape is None else mask]
    (want,) = OPS[node.op].evaluate(operands, node.attrs, env)
    panels = run.to_panels(x.reshape(129, 3 * width))
    y = np.full((panels.shape[0], width, 64), 99, want.dtype)
    family = AttentionInt8Family()
    schedule = family.schedules(family.workload(node), Target.named(LEVELS[level]))[0]
    assert schedule.isa == level
    run.node(node, schedule, {"x": panels, "mask": mask, node.output.name: y}, env)
    got = run.from_panels(y, 129).reshape(want.shape)
    # Doubtful probabilities, 4 % of 43 keys, move the result by less than a step of 0.02.
    if attrs:
        apart = np.abs(got.astype(int) - want.astype(int))
        assert apart.max() <= 1
        assert apart.mean() < 0.05
    else:
        np.testing.assert_allclose(got, want, atol=0.02)


@pytest.mark.parametrize(
    ("head_size", "target", "isas"),
    [
        (32, "sapphirerapids", ["amx", "avx512vnni"]),
        (16, "sapphirerapids", ["amx", "avx512vnni"]),
        (12, "sapphirerapids", ["avx512vnni"]),  # less than a tile of values
        (32, "icelake-server", ["avx512vnni"]),
        (32, "skylake-avx512", ["avx2"]),
        (6, "haswell", ["avx2"]),  # pairs of channels, not quads
    ],
)
def test_order_of_kernels(head_size: int, target: str, isas: list[str]) -> None:
    node, family = node_of(None, {}, head_size), AttentionInt8Family()
    found = family.schedules(family.workload(node), Target.named(target))
    assert [s.isa for s in found] == isas


@pytest.mark.parametrize(
    ("mask", "attrs", "target"),
    [
        ((BATCH, 1, SEQ, 1), {}, "icelake-server"),
        (None, {"head_size": 6}, "icelake-server"),
        (None, {"head_size": 7}, "haswell"),
    ],
)
def test_what_has_no_kernel(
    mask: tuple[Dim, ...] | None, attrs: dict[str, Any], target: str
) -> None:
    node = node_of(mask, attrs)
    family = AttentionInt8Family()
    assert family.schedules(family.workload(node), Target.named(target)) == []
