"""Attention as exporters spell it: every form of scale, mask, softmax and heads."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsec.interpreter import run
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.passes.absorb_qdq import Roundings
from sparsec.passes.canonicalize import Canonicalize
from sparsec.passes.fuse_attention import FuseAttention

BATCH, SEQ = symbol("batch"), symbol("seq")
LOWEST = float(np.finfo(np.float32).min)


class Attention:
    """A graph with q, k, v [batch, seq, heads * size] and the ways to write attention on them."""

    def __init__(self, heads: int = 2, size: int = 4):
        self.heads, self.size = heads, size
        self.graph = Graph("attention")
        shape = (BATCH, SEQ, heads * size)
        self.q, self.k, self.v = (self.graph.add_input(n, DType.F32, shape) for n in "qkv")

    def add(self, op: str, *operands: Value | float, **attrs) -> Value:
        values = [
            v if isinstance(v, Value) else self.graph.add_constant(np.float32(v)) for v in operands
        ]
        return self.graph.add(op, values, attrs)

    def split(self, x: Value, *perm: int) -> Value:
        four = self.add("reshape", x, shape=(BATCH, SEQ, self.heads, self.size))
        return self.add("transpose", four, perm=perm)

    def scores(self, q: Value | None = None, scale: bool = True) -> Value:
        q = self.split(self.q, 0, 2, 1, 3) if q is None else q
        scores = self.add("matmul", q, self.split(self.k, 0, 2, 3, 1))
        return self.add("mul", scores, self.scale) if scale else scores

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.size)

    def softmax(self, scores: Value) -> Value:
        return self.add("softmax", scores, axis=3)

    def finish(self, probabilities: Value) -> Graph:
        context = self.add("matmul", probabilities, self.split(self.v, 0, 2, 1, 3))
        return self.join(self.add("transpose", context, perm=(0, 2, 1, 3)))

    def join(self, context: Value) -> Graph:
        y = self.add("reshape", context, shape=(BATCH, SEQ, self.heads * self.size))
        self.graph.add_output("y", y)
        return self.graph


PASSES = (Canonicalize(), FuseAttention(), Canonicalize())


@pytest.mark.parametrize(("heads", "size"), [(2, 4), (1, 8), (3, 5), (12, 1)])
def test_any_heads(check, heads, size):
    a = Attention(heads, size)
    graph = a.finish(a.softmax(a.scores()))
    assert check(graph, *PASSES).ops == {"attention": 1}
    attrs = graph.nodes[0].attrs
    assert (attrs["heads"], attrs["head_size"]) == (heads, size)
    assert attrs["scale"] == pytest.approx(size**-0.5)


SCALES = {
    "none": (lambda a: a.scores(scale=False), 1.0),
    "of the scores": (lambda a: a.scores(), 0.5),
    "divides": (lambda a: a.add("div", a.scores(scale=False), 3.0), 1 / 3),
    "of q in heads": (
        lambda a: a.scores(a.add("mul", a.split(a.q, 0, 2, 1, 3), 0.3), scale=False),
        0.3,
    ),
    "of q before heads": (
        lambda a: a.scores(a.split(a.add("mul", 0.3, a.q), 0, 2, 1, 3), scale=False),
        0.3,
    ),
    "split over q and k": (
        lambda a: a.add(
            "matmul",
            a.add("mul", a.split(a.q, 0, 2, 1, 3), 0.7),
            a.add("mul", a.split(a.k, 0, 2, 3, 1), 0.7),
        ),
        0.49,
    ),
}


@pytest.mark.parametrize(("make", "scale"), SCALES.values(), ids=SCALES.keys())
def test_scale(check, make, scale):
    a = Attention()
    graph = a.finish(a.softmax(make(a)))
    assert check(graph, *PASSES).ops == {"attention": 1}
    assert graph.nodes[0].attrs["scale"] == pytest.approx(scale)


SHAPES = {
    "keys": (BATCH, 1, 1, SEQ),
    "keys of all": (1, 1, 1, SEQ),
    "queries x keys": (1, 1, SEQ, SEQ),
    "batch x queries x keys": (BATCH, 1, SEQ, SEQ),
    "all": (BATCH, 2, SEQ, SEQ),
    "two axes": (SEQ, SEQ),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("swapped", [False, True])
def test_added_mask(check, shape, swapped):
    a = Attention()
    mask = a.graph.add_input("mask", DType.F32, shape)
    scores = a.add("add", *([mask, a.scores()] if swapped else [a.scores(), mask]))
    graph = a.finish(a.softmax(scores))
    ops = check(graph, *PASSES).ops
    assert ops == ({"attention": 1} if len(shape) == 4 else {"attention": 1, "reshape": 1})


def keep(a: Attention) -> Value:
    mask = a.graph.add_input("mask", DType.BOOL, (BATCH, SEQ))
    return a.add("reshape", mask, shape=(BATCH, 1, 1, SEQ))


@pytest.mark.parametrize("fill", [LOWEST, float("-inf"), -1e4, -1e9])
@pytest.mark.parametrize("negated", [False, True])
def test_filled_mask(check, fill, negated):
    a = Attention()
    condition = a.add("logical_not", keep(a)) if negated else keep(a)
    operands = [fill, a.scores()] if negated else [a.scores(), fill]
    graph = a.finish(a.softmax(a.add("where", condition, *operands)))
    ops = check(graph, *PASSES).ops
    assert ops == {"reshape": 1, "where": 1, "attention": 1}
    (mask,) = (n.input(3) for n in graph.nodes if n.op == "attention")
    assert mask.type.shape == (BATCH, 1, 1, SEQ)


@pytest.mark.parametrize("fill", [LOWEST, -1e4, -1e9])
def test_a_row_that_is_filled_throughout_has_equal_weights(rng, fill):
    a = Attention()
    graph = a.finish(a.softmax(a.add("where", keep(a), a.scores(), fill)))
    feeds = {n: rng.standard_normal((2, 5, 8)).astype(np.float32) for n in "qkv"}
    feeds["mask"] = np.zeros((2, 5), np.bool_)
    wanted = run(graph, feeds)["y"]
    for one in PASSES:
        one.run(graph)
    assert "attention" in {n.op for n in graph.nodes}
    np.testing.assert_allclose(run(graph, feeds)["y"], wanted, 1e-6, 1e-6)


def other_keep(a: Attention) -> Value:
    mask = a.graph.add_input("other", DType.BOOL, (1, 1, SEQ, SEQ))
    return a.graph.add("broadcast_to", [mask], {"shape": (BATCH, 1, SEQ, SEQ)})


def two_fills(a: Attention, first: float, last: float) -> Value:
    inner = a.add("where", other_keep(a), a.scores(), first)
    return a.add("where", keep(a), inner, last)


def a_fill_and(op: str, number: float, fill: float = -1e4):
    """`op` of scores that were filled, and of a number."""
    return lambda a: a.add(op, a.add("where", keep(a), a.scores(), fill), number)


def added(a: Attention, lowest: float) -> Value:
    """The additive mask that an exporter makes of a mask: (1 - mask) * lowest."""
    mask = a.add("cast", other_keep(a), to=DType.F32)
    return a.add("mul", a.add("sub", 1.0, mask), lowest)


def small_bias(a: Attention) -> Value:
    table = np.linspace(-3, 3, 2).astype(np.float32).reshape(1, 2, 1, 1)
    return a.graph.add_constant(table)


def a_fill_and_a_bias(a: Attention) -> Value:
    bias = a.graph.add_input("bias", DType.F32, (1, 2, SEQ, SEQ))
    return a.add("add", a.add("where", keep(a), a.scores(), -1e4), bias)


STEPS = {  # of scores; and whether one added mask says the same in every row
    "two fills": (lambda a: two_fills(a, -1e4, -1e9), True),
    "two fills, the larger last": (lambda a: two_fills(a, -1e9, -1e4), True),
    "the same fill twice": (lambda a: two_fills(a, -1e9, -1e9), True),
    "fills that are near": (lambda a: two_fills(a, -1e4, -1e4 - 50), False),
    "a scale between fills": (
        lambda a: a.add(
            "where",
            keep(a),
            a.add("mul", a.add("where", other_keep(a), a.scores(), -1e9), 0.125),
            -1e4,
        ),
        False,
    ),
    "masked before": (
        lambda a: a.add("where", keep(a), a.add("add", a.scores(), added(a, -1e4)), -1e4),
        False,
    ),
    "biased before": (
        lambda a: a.add("where", keep(a), a.add("add", a.scores(), small_bias(a)), -1e4),
        True,
    ),
    "scaled down": (a_fill_and("mul", 0.125, -1e9), True),
    "scaled until it counts": (a_fill_and("mul", 1e-4), False),
    "scaled up": (a_fill_and("mul", 8.0, LOWEST), False),
    "-inf scaled up": (a_fill_and("mul", 8.0, -np.inf), True),
    "turned round": (a_fill_and("mul", -1.0, -1e9), False),
    "biased": (a_fill_and_a_bias, False),
}


@pytest.mark.parametrize(("make", "fuses"), STEPS.values(), ids=STEPS.keys())
def test_rows_in_which_nothing_is_kept(rng, make, fuses):
    """There fills count against each other; in the others no fill is seen."""
    a = Attention()
    graph = a.finish(a.softmax(make(a)))
    feeds = {n: rng.standard_normal((2, 5, 8)).astype(np.float32) for n in "qkv"}
    feeds["mask"] = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 1, 0]], np.bool_)
    feeds["other"] = np.tril(np.ones((1, 1, 5, 5), np.bool_))
    feeds["bias"] = (5e3 * rng.standard_normal((1, 2, 5, 5))).astype(np.float32)
    feeds = {v.name: feeds[v.name] for v in graph.inputs}
    wanted = run(graph, feeds)["y"]
    for one in PASSES:
        one.run(graph)
    assert ("attention" in {n.op for n in graph.nodes}) == fuses
    if np.isfinite(wanted).all():
        np.testing.assert_allclose(run(graph, feeds)["y"], wanted, 2e-6, 2e-6)


def test_a_broadcast_mask_stays_small(check):
    a = Attention()
    wide = a.add("broadcast_to", keep(a), shape=(BATCH, 1, SEQ, SEQ))
    mask = a.add("where", wide, 0.0, LOWEST)
    graph = a.finish(a.softmax(a.add("add", a.scores(), mask)))
    assert check(graph, *PASSES).ops == {"reshape": 1, "where": 1, "attention": 1}
    (mask,) = (n.input(3) for n in graph.nodes if n.op == "attention")
    assert mask.type.shape == (BATCH, 1, 1, SEQ)


def test_masks_in_a_row_and_a_scale_after_them(check):
    a = Attention()
    bias = a.graph.add_input("bias", DType.F32, (1, 2, SEQ, SEQ))
    scores = a.add("mul", a.add("add", a.scores(scale=False), bias), 0.5)
    graph = a.finish(a.softmax(a.add("where", keep(a), scores, LOWEST)))
    ops = check(graph, *PASSES).ops
    assert ops == {"reshape": 1, "mul": 1, "where": 1, "attention": 1}


@pytest.mark.parametrize("form", ["div", "reciprocal", "no maximum"])
def test_softmax_spelled_out(check, form):
    a = Attention()
    scores = a.scores()
    if form != "no maximum":
        scores = a.add("sub", scores, a.add("reduce_max", scores, axes=(3,), keepdims=True))
    e = a.add("exp", scores)
    total = a.add("reduce_sum", e, axes=(3,), keepdims=True)
    inverse = form == "reciprocal"
    p = a.add("mul", e, a.add("reciprocal", total)) if inverse else a.add("div", e, total)
    assert check(a.finish(p), *PASSES).ops == {"attention": 1}


def check_padding(graph: Graph, rng: np.random.Generator, padding: int) -> None:
    """Of five tokens so many; a sequence of padding alone gives zeros."""
    feeds = {n: rng.standard_normal((2, 5, 8)).astype(np.float32) for n in "qkv"}
    feeds["mask"] = np.ones((2, 5), np.bool_)
    feeds["mask"][1, 5 - padding :] = False
    wanted = run(graph, feeds)["y"]
    assert (wanted[1] == 0).all() == (padding == 5)
    for one in PASSES:
        one.run(graph)
    assert [n.op for n in graph.nodes] == ["reshape", "where", "attention"]
    np.testing.assert_allclose(run(graph, feeds)["y"], wanted, 1e-5, 1e-6)


@pytest.mark.parametrize("padding", [2, 5])
def test_guarded_softmax(rng, padding):
    """sdpa: where(is_nan(p), 0, p); a sequence of padding alone gives zeros."""
    a = Attention()
    mask = a.add("where", keep(a), 0.0, float("-inf"))
    p = a.softmax(a.add("add", a.scores(), mask))
    graph = a.finish(a.add("where", a.add("is_nan", p), 0.0, p))
    check_padding(graph, rng, padding)


def row_guarded(a: Attention, p: Value, bias: Value, axes: tuple[int, ...] = (3,)) -> Graph:
    """The guard of ONNX's Attention; it asks the mask as it is for all queries."""
    wide = a.add("broadcast_to", bias, shape=(BATCH, 1, SEQ, SEQ))
    row_max = a.add("reduce_max", wide, axes=axes, keepdims=True)
    return a.finish(a.add("where", a.add("equal", row_max, float("-inf")), 0.0, p))


@pytest.mark.parametrize("padding", [2, 5])
def test_softmax_that_is_guarded_by_rows_of_the_mask(rng, padding):
    a = Attention()
    mask = a.add("where", keep(a), 0.0, float("-inf"))
    graph = row_guarded(a, a.softmax(a.add("add", a.scores(), mask)), mask)
    check_padding(graph, rng, padding)


def test_a_guard_of_no_row_is_nothing(check):
    a = Attention()
    zero = a.graph.add_constant(np.float32(0))
    assert check(row_guarded(a, a.softmax(a.scores()), zero), *PASSES).ops == {"attention": 1}


@pytest.mark.parametrize(
    ("last", "axes", "note"),
    [(0.0, (3,), "asks another mask"), (None, (2,), "not over the keys")],
)
def test_a_guard_that_asks_something_else_is_left(check, last, axes, note):
    a = Attention()
    mask = a.add("where", keep(a), 0.0, -1.0)
    scores = a.add("add", a.scores(), mask)
    if last is not None:
        other = a.graph.add_input("other", DType.F32, (BATCH, 1, 1, SEQ))
        scores = a.add("add", scores, other)
    found = check(row_guarded(a, a.softmax(scores), mask, axes), *PASSES)
    assert found.ops["attention"] == 0
    assert note in found.notes


@pytest.mark.parametrize("masked", [False, True])
def test_batch_and_heads_in_one_axis(check, masked):
    """Three axes: [batch * heads, seq, size], and the mask added in four."""
    a = Attention()
    rows = BATCH * a.heads
    shape = (rows, SEQ, a.size)
    q, k, v = (a.add("reshape", a.split(x, 0, 2, 1, 3), shape=shape) for x in (a.q, a.k, a.v))
    scores = a.add("matmul", a.add("mul", q, a.scale), a.add("transpose", k, perm=(0, 2, 1)))
    if masked:
        mask = a.graph.add_input("mask", DType.F32, (BATCH, 1, 1, SEQ))
        scores = a.add("reshape", scores, shape=(BATCH, a.heads, SEQ, SEQ))
        scores = a.add("reshape", a.add("add", scores, mask), shape=(rows, SEQ, SEQ))
    context = a.add("matmul", a.add("softmax", scores, axis=2), v)
    four = a.add("reshape", context, shape=(BATCH, a.heads, SEQ, a.size))
    graph = a.join(a.add("transpose", four, perm=(0, 2, 1, 3)))
    assert check(graph, *PASSES).ops == {"attention": 1}
    assert graph.nodes[0].attrs["heads"] == a.heads


def test_three_axes_without_heads_are_one_head(check):
    a = Attention(1, 8)
    scores = a.add("matmul", a.q, a.add("transpose", a.k, perm=(0, 2, 1)))
    a.graph.add_output("y", a.add("matmul", a.add("softmax", scores, axis=2), a.v))
    assert check(a.graph, *PASSES).ops == {"attention": 1}


def cross(a: Attention) -> Graph:
    k = a.graph.add_input("keys", DType.F32, (BATCH, 2, 4, 7))
    v = a.graph.add_input("values", DType.F32, (BATCH, 2, 7, 4))
    p = a.softmax(a.add("matmul", a.split(a.q, 0, 2, 1, 3), k))
    a.graph.add_output("y", a.add("matmul", p, v))
    return a.graph


def read_twice(a: Attention) -> Graph:
    p = a.softmax(a.scores())
    a.graph.add_output("probabilities", p)
    return a.finish(p)


def small_fill(a: Attention) -> Graph:
    return a.finish(a.softmax(a.add("where", keep(a), a.scores(), -100.0)))


def over_queries(a: Attention) -> Graph:
    return a.finish(a.add("softmax", a.scores(), axis=2))


def clipped(a: Attention) -> Graph:
    return a.finish(a.softmax(a.add("tanh", a.scores())))


def learned_scale(a: Attention) -> Graph:
    scale = a.graph.add_input("scale", DType.F32, (1, 2, 1, 1))
    return a.finish(a.softmax(a.add("mul", a.scores(), scale)))


REFUSED = {
    cross: "not the shapes of self-attention",
    read_twice: "the probabilities are read elsewhere",
    small_fill: "scores replaced by -100.0 still count",
    over_queries: "the softmax is not over the keys",
    clipped: "(tanh), which is not understood",
    learned_scale: "which is not a constant",
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.items(), ids=[f.__name__ for f in REFUSED])
def test_refused_with_a_reason(check, make, reason):
    a = Attention()
    checked = check(make(a), Canonicalize(), FuseAttention())
    assert "attention" not in checked.ops
    assert reason in checked.notes


def test_zoo_model_keeps_its_answer(encoder, check):
    Canonicalize().run(encoder)
    ops = check(encoder, FuseAttention(), Canonicalize()).ops
    assert ops["attention"] == 2
    assert not ops["softmax"]
    assert not ops["transpose"]


@pytest.mark.parametrize("keep", [Roundings.PRODUCTS, Roundings.ALL])
def test_roundings_of_operands_stay_where_all_do(keep):
    a = Attention()
    attrs = {"scale": 0.1, "zero_point": 100}
    stored = a.graph.add("quantize", [a.q], {**attrs, "dtype": DType.U8})
    q = a.split(a.graph.add("dequantize", [stored], attrs), 0, 2, 1, 3)
    graph = a.finish(a.softmax(a.scores(q)))
    for one in (Canonicalize(), FuseAttention(keep)):
        one.run(graph)
    ops = {n.op for n in graph.nodes}
    kept = keep is Roundings.ALL
    assert ("attention" in ops, "quantize" in ops) == (not kept, kept)
