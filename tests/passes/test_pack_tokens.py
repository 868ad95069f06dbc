"""Packing keeps the answer at every real token, or says why it can not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.models.tiny import tiny_model
from sparsec.passes import graph_pipeline
from sparsec.passes.manager import PassManager
from sparsec.passes.pack_tokens import PackTokens, padded_ports

B, S = symbol("batch"), symbol("seq")
WIDTH = 8
HEADS = {"heads": 2, "head_size": 4, "scale": 0.5, "q_offset": 0, "k_offset": 8, "v_offset": 16}
LOWEST = float(np.finfo(np.float32).min)
MASKS = {
    "full": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "right": [[1, 1, 0, 0], [1, 0, 0, 0]],
    "left": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1]],
    "empty": [[0, 0, 0, 0], [1, 1, 0, 0]],
    "one token": [[1], [0], [1]],
}


class Model:
    """An encoder of one layer, written op by op; tests change what they are about."""

    def __init__(self, dtype: DType = DType.I64, shape: tuple = (B, S)):
        self.graph = Graph("test")
        self.rng = np.random.default_rng(0)
        self.ids = self.graph.add_input("ids", DType.I64, shape)
        self.mask = self.graph.add_input("mask", dtype, shape)

    def weight(self, *shape: int) -> Value:
        data = self.rng.standard_normal(shape) / np.sqrt(shape[-1])
        return self.graph.add_constant(data.astype(np.float32))

    def constant(self, value: float, dtype: DType = DType.F32) -> Value:
        return self.graph.add_constant(np.asarray(value, dtype.numpy))

    def add(self, op: str, *inputs: Value | None, **attrs: object) -> Value:
        return self.graph.add(op, inputs, attrs)

    def scores(self, hidden: float = LOWEST) -> Value:
        """(1 - mask) * hidden, as exporters write it: [batch, 1, 1, seq]"""
        batch, seq = self.mask.type.shape
        wide = self.add("reshape", self.mask, shape=(batch, 1, 1, seq))
        number = self.add("cast", wide, to=DType.F32)
        return self.add("mul", self.add("sub", self.constant(1), number), self.constant(hidden))

    def embed(self) -> Value:
        return self.add("embedding", self.ids, self.weight(4, WIDTH))

    def layer(self, x: Value, scores: Value | None) -> Value:
        qkv = self.add("linear", x, self.weight(24, WIDTH), None, None, activation="none")
        context = self.add("attention", qkv, qkv, qkv, scores, **HEADS)
        y = self.add("linear", context, self.weight(8, 8), None, x, activation="gelu")
        return self.add("layer_norm", y, self.weight(WIDTH), None, None, epsilon=1e-5)

    def encoder(self, hidden: float = LOWEST) -> Value:
        return self.layer(self.layer(self.embed(), self.scores(hidden)), self.scores(hidden))

    def token_mask(self, dtype: DType = DType.F32) -> Value:
        batch, seq = self.mask.type.shape
        rows = self.add("reshape", self.mask, shape=(batch, seq, 1))
        return self.add("cast", rows, to=dtype)

    def feed(self, mask: list[list[int]]) -> dict[str, np.ndarray]:
        real = np.array(mask, self.mask.type.dtype.numpy)
        return {"ids": self.rng.integers(0, 4, real.shape), "mask": real}


def rows(m: Model) -> Value:
    return m.encoder()


def first(m: Model) -> Value:
    return m.add("gather", m.encoder(), m.constant(0, DType.I64), axis=1)


def first_slice(m: Model) -> Value:
    cut = {"axes": (1,), "starts": (0,), "ends": (1,), "steps": (1,)}
    return m.add("slice", m.encoder(), **cut)


def mean(m: Model) -> Value:
    real = m.token_mask()
    total = m.add("reduce_sum", m.add("mul", m.encoder(), real), axes=(1,), keepdims=False)
    count = m.add("reduce_sum", real, axes=(1,), keepdims=False)
    return m.add("div", total, m.add("clip", count, min=1e-9, max=None))


def highest(m: Model) -> Value:
    shown = m.add("where", m.token_mask(DType.BOOL), m.encoder(), m.constant(-1e9))
    return m.add("reduce_max", shown, axes=(1,), keepdims=False)


def per_token(m: Model) -> Value:
    """As heads of tokens do: a part of the channels, one per token, a share of all."""
    x = m.add("softmax", m.add("mul", m.encoder(), m.weight(WIDTH)), axis=2)
    part = m.add("slice", x, axes=(2,), starts=(3,), ends=(4,), steps=(1,))
    return m.add("reshape", part, shape=m.mask.type.shape)


def with_other_rows(m: Model) -> Value:
    """Reads rows that are no look-up: a scaled mask of the tokens."""
    return m.add("add", m.encoder(), m.add("mul", m.token_mask(), m.constant(3)))


def largest_channel(m: Model) -> Value:
    return m.add("arg_max", m.encoder(), axis=2, keepdims=False)


SHAPES = {f.__name__: f for f in (rows, first, first_slice, mean, highest, per_token,
                                  with_other_rows, largest_channel)}  # fmt: skip


def check(m: Model, out: Value, masks: list[str]) -> None:
    m.graph.add_output("out", out)
    feeds = [m.feed(MASKS[name]) for name in masks]
    wanted = [run(m.graph, f)["out"] for f in feeds]
    record = PassManager([PackTokens()]).run(m.graph)[0]
    assert record["changed"] > 0, record["notes"]
    _, padded = padded_ports(m.graph)
    for inputs, want in zip(feeds, wanted, strict=True):
        if padded:
            want[inputs["mask"] == 0] = 0
        got = run(m.graph, inputs)["out"]
        # The same products: NumPy's may add 24 terms of order 1 in another order, twice.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_every_way_out_keeps_its_answer(name: str) -> None:
    m = Model()
    check(m, SHAPES[name](m), list(MASKS))


@pytest.mark.parametrize("dtype", [DType.I64, DType.I32, DType.BOOL, DType.F32])
def test_masks_of_every_type(dtype: DType) -> None:
    m = Model(dtype)
    check(m, m.encoder(), list(MASKS))


@pytest.mark.parametrize("hidden", [-1e4, -1e9, LOWEST, -np.inf])
def test_masks_of_every_size(hidden: float) -> None:
    m = Model(DType.BOOL)
    shown = m.add("reshape", m.mask, shape=(B, 1, 1, S))
    scores = m.add("where", shown, m.constant(0), m.constant(hidden))
    # Queries at padding, and heads, may be spelled out: it is one mask per key all the same.
    wide = m.add("broadcast_to", scores, shape=(B, 1, S, S))
    check(m, m.layer(m.embed(), wide), list(MASKS))


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (3, 1)])
def test_fixed_sizes(shape: tuple[int, int]) -> None:
    m = Model(shape=shape)
    out = m.encoder()
    MASKS_OF = {(2, 4): ["holes", "left"], (3, 1): ["one token"]}
    if shape in MASKS_OF:
        check(m, out, MASKS_OF[shape])
        return
    m.graph.add_output("out", out)
    assert PassManager([PackTokens()]).run(m.graph)[0]["changed"] > 0
    assert run(m.graph, m.feed([[1, 0, 1, 0]]))["out"].shape == (1, 4, 8)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("head", ["none", "classify", "qa"])
def test_encoders_of_the_zoo(check: Callable, family: str, head: str) -> None:
    graph = import_model(tiny_model(family, head=head))
    ops = check(graph, *graph_pipeline(), PackTokens()).ops
    assert ops["pack_tokens"] == 1
    assert ops["unpack_tokens"] == {"none": 1, "classify": 0, "qa": 2}[head]


def no_mask(m: Model) -> Value:
    return m.layer(m.embed(), None)


def half_masked(m: Model) -> Value:
    return m.layer(m.layer(m.embed(), m.scores()), None)


def weak(m: Model) -> Value:
    return m.encoder(-100.0)


def causal(m: Model) -> Value:
    lower = m.add("trilu", m.add("broadcast_to", m.constant(1), shape=(S, S)), upper=False, k=0)
    above = m.add("mul", m.add("sub", m.constant(1), lower), m.constant(LOWEST))
    return m.layer(m.embed(), m.add("add", m.scores(), above))


def by_query(m: Model) -> Value:
    wide = m.add("reshape", m.scores(), shape=(B, 1, S, 1))
    return m.layer(m.embed(), m.add("broadcast_to", wide, shape=(B, 1, S, S)))


def other_mask(m: Model) -> Value:
    x = m.layer(m.embed(), m.scores())
    return m.layer(x, m.add("add", m.scores(), m.constant(1)))


def plain_mean(m: Model) -> Value:
    return m.add("reduce_mean", m.encoder(), axes=(1,), keepdims=False)


def weighted_mean(m: Model) -> Value:
    """The weights are not 0 at padding."""
    weights = m.add("add", m.token_mask(), m.constant(1))
    product = m.add("mul", m.encoder(), weights)
    return m.add("reduce_sum", product, axes=(1,), keepdims=False)


def last(m: Model) -> Value:
    return m.add("gather", m.encoder(), m.constant(-1, DType.I64), axis=1)


def largest_token(m: Model) -> Value:
    return m.add("arg_max", m.encoder(), axis=1, keepdims=False)


def shifted(m: Model) -> Value:
    return m.add("cumsum", m.encoder(), axis=1, exclusive=False, reverse=False)


REFUSED = {
    no_mask: "no mask",
    half_masked: "no mask",
    weak: "-100",
    causal: "trilu",
    by_query: "mask of one token alone",
    other_mask: "another one",
    plain_mean: "no row per token",
    weighted_mean: "no row per token",
    last: "no row per token",
    largest_token: "no row per token",
    shifted: "may mix",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda f: f.__name__)
def test_what_can_not_be_proved_stays(make: Callable[[Model], Value]) -> None:
    m = Model()
    m.graph.add_output("out", make(m))
    feed = m.feed(MASKS["holes"])
    want = run(m.graph, feed)["out"]
    record = PassManager([PackTokens()]).run(m.graph)[0]
    assert record["changed"] == 0
    assert REFUSED[make] in record["notes"][0]
    np.testing.assert_array_equal(run(m.graph, feed)["out"], want)
