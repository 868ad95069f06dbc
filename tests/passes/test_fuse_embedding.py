"""Look-ups in constant tables and their sums."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.passes.canonicalize import Canonicalize
from sparsec.passes.fuse_embedding import FuseEmbedding

BATCH, SEQ = symbol("batch"), symbol("seq")


@pytest.fixture
def words(weight) -> tuple[Graph, Value]:
    """A graph that looks words up."""
    graph = Graph("embeddings")
    ids = graph.add_input("ids", DType.I64, (BATCH, SEQ))
    return graph, lookup(graph, weight(50, 8), ids)


def lookup(graph: Graph, table: np.ndarray, ids: Value) -> Value:
    return graph.add("gather", [graph.add_constant(table), ids], {"axis": 0})


def iota(graph: Graph) -> Value:
    attrs = {"start": 0, "step": 1, "length": SEQ, "dtype": DType.I64}
    return graph.add("iota", [], attrs)


def rows(graph: Graph, table: np.ndarray) -> Value:
    """The first seq rows of a table."""
    attrs = {"axes": (0,), "starts": (0,), "ends": (SEQ,), "steps": (1,)}
    return graph.add("slice", [graph.add_constant(table)], attrs)


def unsqueezed(graph: Graph, x: Value) -> Value:
    return graph.add("reshape", [x], {"shape": (1, *x.type.shape)})


POSITIONS = {
    "gather by a range": lambda g, w: lookup(g, w(64, 8), iota(g)),
    "gather by a range [1, seq]": lambda g, w: lookup(g, w(64, 8), unsqueezed(g, iota(g))),
    "gather, then unsqueeze": lambda g, w: unsqueezed(g, lookup(g, w(64, 8), iota(g))),
    "slice": lambda g, w: rows(g, w(64, 8)),
    "slice, then unsqueeze": lambda g, w: unsqueezed(g, rows(g, w(64, 8))),
    "slice, then broadcast": lambda g, w: g.add(
        "broadcast_to", [rows(g, w(64, 8))], {"shape": (BATCH, SEQ, 8)}
    ),
    "one constant row": lambda g, w: g.add_constant(w(1, 1, 8)),
}


def test_one_lookup(words, check):
    graph, y = words
    graph.add_output("y", y)
    assert check(graph, FuseEmbedding()).ops == {"embedding": 1}


@pytest.mark.parametrize("make", POSITIONS.values(), ids=POSITIONS.keys())
@pytest.mark.parametrize("first", [True, False])
def test_words_and_positions(words, check, weight, make, first):
    graph, y = words
    p = make(graph, weight)
    graph.add_output("y", graph.add("add", [p, y] if first else [y, p]))
    ops = check(graph, Canonicalize(), FuseEmbedding()).ops
    assert ops["embedding"] == 1
    assert set(ops) <= {"embedding", "iota", "reshape"}


def test_three_tables(words, check, weight):
    graph, y = words
    types = graph.add_input("types", DType.I64, (BATCH, SEQ))
    y = graph.add("add", [y, lookup(graph, weight(2, 8), types)])
    graph.add_output("y", graph.add("add", [y, rows(graph, weight(64, 8))]))
    ops = check(graph, FuseEmbedding()).ops
    assert ops == {"embedding": 1, "iota": 1, "reshape": 1} or ops == {"embedding": 1, "iota": 1}
    assert len(graph.nodes[-1].inputs) == 6


def test_types_that_are_stored_zeros(words, check, weight):
    """Hugging Face without token_type_ids: a buffer of zeros is sliced and expanded."""
    graph, y = words
    buffer = graph.add_constant(np.zeros((1, 64), np.int64))
    attrs = {"axes": (1,), "starts": (0,), "ends": (SEQ,), "steps": (1,)}
    zeros = graph.add("slice", [buffer], attrs)
    types = graph.add("broadcast_to", [zeros], {"shape": (BATCH, SEQ)})
    graph.add_output("y", graph.add("add", [y, lookup(graph, weight(2, 8), types)]))
    ops = check(graph, Canonicalize(), FuseEmbedding(), Canonicalize()).ops
    assert ops == {"embedding": 1}


def test_positions_that_are_computed(words, check, weight):
    """RoBERTa: positions count the tokens that are not padding."""
    graph, y = words
    mask = graph.add_input("mask", DType.I64, (BATCH, SEQ))
    count = graph.add("cumsum", [mask], {"axis": 1, "exclusive": False, "reverse": False})
    positions = graph.add("mul", [count, mask])
    graph.add_output("y", graph.add("add", [y, lookup(graph, weight(64, 8), positions)]))
    assert check(graph, FuseEmbedding()).ops == {"cumsum": 1, "mul": 1, "embedding": 1}


def test_ids_of_two_dtypes(words, check, weight):
    graph, y = words
    types = graph.add_input("types", DType.I32, (BATCH, SEQ))
    graph.add_output("y", graph.add("add", [y, lookup(graph, weight(2, 8), types)]))
    assert check(graph, FuseEmbedding()).ops == {"cast": 1, "embedding": 1}


def test_a_lookup_that_is_read_twice_stays_apart(words, check, weight):
    graph, y = words
    graph.add_output("words", y)
    graph.add_output("y", graph.add("add", [y, rows(graph, weight(64, 8))]))
    checked = check(graph, FuseEmbedding())
    assert checked.ops == {"embedding": 1, "slice": 1, "add": 1}
    assert "the look-up is read elsewhere" in checked.notes


def test_a_sum_with_something_else_stays(words, check):
    graph, y = words
    other = graph.add_input("other", DType.F32, (BATCH, SEQ, 8))
    graph.add_output("y", graph.add("add", [y, other]))
    checked = check(graph, FuseEmbedding())
    assert checked.ops == {"embedding": 1, "add": 1}
    assert "is not rows of a constant table" in checked.notes


def test_ids_of_another_rank_stay_a_gather(check, weight):
    graph = Graph("embeddings")
    ids = graph.add_input("ids", DType.I64, (BATCH, SEQ, 2))
    graph.add_output("y", lookup(graph, weight(50, 8), ids))
    checked = check(graph, FuseEmbedding())
    assert checked.ops == {"gather": 1}
    assert "is not batch x seq" in checked.notes


def test_zoo_model_keeps_its_answer(encoder, check):
    Canonicalize().run(encoder)
    ops = check(encoder, FuseEmbedding()).ops
    assert ops["embedding"] == 1
