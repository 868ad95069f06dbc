"""Every order of association of the activations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sparsec.ir.graph import Graph, Value
from sparsec.passes.canonicalize import Canonicalize
from sparsec.passes.fuse_gelu import FuseGelu


class Ops:
    """Writes elementwise graphs with plain numbers as constants."""

    def __init__(self, graph: Graph):
        self.graph = graph

    def __getattr__(self, op):
        def add(*operands: Value | float) -> Value:
            values = [
                v if isinstance(v, Value) else self.graph.add_constant(np.float32(v))
                for v in operands
            ]
            return self.graph.add(op, values)

        return add


def orders(g: Ops, a, b, c) -> list[Value]:
    """a * b * c with each pair multiplied first."""
    return [g.mul(g.mul(p, q), r) for p, q, r in itertools.permutations((a, b, c))]


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("half", ["mul", "div", "sqrt half"])
def test_erf_form(x32, check, order, half):
    graph, x = x32
    g = Ops(graph)
    scaled = g.mul(x, math.sqrt(0.5)) if half == "sqrt half" else g.div(x, math.sqrt(2))
    gate = g.add(g.erf(scaled), 1.0)
    y = g.div(g.mul(x, gate), 2.0) if half == "div" else orders(g, x, 0.5, gate)[order]
    graph.add_output("y", y)
    assert check(graph, Canonicalize(), FuseGelu()).ops == {"gelu": 1}
    assert graph.nodes[0].attrs["approximate"] == "none"


def cubes(g: Ops, x: Value) -> list[Value]:
    """The argument of tanh as the frameworks write it."""
    k, c = math.sqrt(2 / math.pi), 0.044715
    return [
        g.mul(g.add(x, g.mul(g.pow(x, 3.0), c)), k),  # Hugging Face, TensorFlow
        g.mul(k, g.add(x, g.mul(c, g.mul(x, g.mul(x, x))))),  # TorchScript
        g.mul(k, g.add(x, g.mul(g.mul(g.mul(c, x), x), x))),
        g.mul(g.mul(x, k), g.add(g.mul(g.mul(c, x), x), 1.0)),  # gelu_fast
        g.mul(x, g.mul(k, g.add(1.0, g.mul(c, g.mul(x, x))))),
    ]


@pytest.mark.parametrize("form", range(5))
def test_tanh_form(x32, check, form):
    graph, x = x32
    g = Ops(graph)
    gate = g.add(1.0, g.tanh(cubes(g, x)[form]))
    graph.add_output("y", g.mul(0.5, g.mul(x, gate)))
    assert check(graph, Canonicalize(), FuseGelu()).ops == {"gelu": 1}
    assert graph.nodes[0].attrs["approximate"] == "tanh"


def test_silu(x32, check):
    graph, x = x32
    g = Ops(graph)
    graph.add_output("y", g.mul(g.sigmoid(x), x))
    assert check(graph, FuseGelu()).ops == {"silu": 1}


def near_misses(g: Ops, x: Value) -> dict[str, Value]:
    y = g.exp(x)
    cube = g.mul(x, g.mul(x, x))
    return {
        "another gate": g.mul(g.mul(x, 0.5), g.add(g.erf(g.div(y, math.sqrt(2))), 1.0)),
        "another scale": g.mul(g.mul(x, 0.5), g.add(g.erf(g.div(x, 1.5)), 1.0)),
        "another cubic": g.mul(
            g.mul(x, 0.5), g.add(g.tanh(g.mul(g.add(x, g.mul(cube, 0.05)), 0.8)), 1.0)
        ),
        "quick gelu": g.mul(x, g.sigmoid(g.mul(x, 1.702))),
    }


@pytest.mark.parametrize("name", ["another gate", "another scale", "another cubic", "quick gelu"])
def test_what_only_looks_like_it_stays(x32, check, name):
    graph, x = x32
    graph.add_output("y", near_misses(Ops(graph), x)[name])
    ops = check(graph, Canonicalize(), FuseGelu()).ops
    assert not ops["gelu"]
    assert not ops["silu"]


def test_zoo_model_keeps_its_answer(encoder, check):
    Canonicalize().run(encoder)
    assert check(encoder, FuseGelu()).ops["gelu"] == 2
