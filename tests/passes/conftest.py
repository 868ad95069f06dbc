"""Runs passes on a graph and holds the oracle's answers after them against those before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.ir.dims import evaluate, symbol
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.models.tiny import tiny_model
from sparsec.passes.base import Pass
from sparsec.passes.manager import PassManager
from sparsec.passes.pack_tokens import padded_ports

SIZES = ((1, 1), (2, 5), (3, 33))

# Sums of at most 100 fp32 terms of order 1 are added in another order: 100 * 2**-24 = 6e-6.
TOLERANCE = 6e-6


@dataclass(frozen=True)
class Checked:
    """What is left of a graph after the passes: how often each op is there, and all notes."""

    ops: Counter[str]
    notes: str


def feed(graph: Graph, rng: np.random.Generator, env: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Inputs of every dtype; integers are 0 or 1: valid ids, and masks with padding."""
    values = {}
    for value in graph.inputs:
        shape = tuple(evaluate(d, env) for d in value.type.shape)
        if value.type.dtype.is_float:
            data = rng.standard_normal(shape)
        else:
            data = rng.integers(0, 2, shape)
            data[..., 0] = 1  # a mask keeps at least one key
        values[value.name] = data.astype(value.type.dtype.numpy)
    return values


@pytest.fixture
def check(rng: np.random.Generator) -> Callable[..., Checked]:
    """`check(graph, *passes)` fails unless the graph computes the same after the passes.

    Where padding is packed away the outputs of each token are 0 there.
    """

    def check(graph: Graph, *passes: Pass, sizes: Sequence[tuple[int, int]] = SIZES) -> Checked:
        feeds = [feed(graph, rng, {"batch": b, "seq": s}) for b, s in sizes]
        wanted = [run(graph, f) for f in feeds]
        records = PassManager(passes).run(graph)
        padding = padded_ports(graph) if any(n.op == "pack_tokens" for n in graph.nodes) else None
        for inputs, outputs in zip(feeds, wanted, strict=True):
            found = run(graph, inputs)
            for name, want in outputs.items():
                if padding is not None and name in padding[1]:
                    want[inputs[padding[0]] == 0] = 0
                np.testing.assert_allclose(found[name], want, TOLERANCE, TOLERANCE, err_msg=name)
        notes = "\n".join(note for record in records for note in record["notes"])
        return Checked(Counter(node.op for node in graph.nodes), notes)

    return check


@pytest.fixture
def weight(rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """`weight(rows, cols)`: fp32 values small enough that products stay of order 1."""

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    return weight


@pytest.fixture(params=["bert", "distilbert"])
def encoder(request: pytest.FixtureRequest) -> Graph:
    """A tiny encoder of the zoo as it was imported."""
    return import_model(tiny_model(request.param))


@pytest.fixture
def x32() -> tuple[Graph, Value]:
    """A graph with one fp32 input [batch, seq, 8]."""
    graph = Graph("test")
    return graph, graph.add_input("x", DType.F32, (symbol("batch"), symbol("seq"), 8))
