"""The oracle: binding of inputs, its errors, and that it frees what nothing reads any more."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from sparsec import interpreter
from sparsec.errors import InvalidInput
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph
from sparsec.ir.types import DType

B, S = symbol("batch"), symbol("seq")


def lookup() -> Graph:
    """table[ids] * mask[..., None]"""
    graph = Graph("lookup")
    ids = graph.add_input("ids", DType.I64, (B, S))
    mask = graph.add_input("mask", DType.F32, (B, S))
    table = graph.add_constant(np.arange(8, dtype=np.float32).reshape(4, 2), "table")
    rows = graph.add("gather", [table, ids], {"axis": 0})
    wide = graph.add("reshape", [mask], {"shape": (B, S, 1)})
    graph.add_output("y", graph.add("mul", [rows, wide]))
    graph.add_limit(S, 6, "the table of positions has no more rows")
    return graph


def feed(batch: int = 2, seq: int = 3) -> dict[str, np.ndarray]:
    return {"ids": np.ones((batch, seq), np.int64), "mask": np.full((batch, seq), 2, np.float32)}


def test_run_gives_outputs_by_name():
    (y,) = interpreter.run(lookup(), feed()).values()
    np.testing.assert_array_equal(y, np.broadcast_to(np.float32([4, 6]), (2, 3, 2)))


def test_inputs_need_not_be_contiguous():
    inputs = feed(3, 2)
    inputs = {name: data.T for name, data in inputs.items()}
    assert interpreter.run(lookup(), inputs)["y"].shape == (2, 3, 2)


BAD = [
    ({"ids": np.ones((2, 3), np.int64)}, r"missing \['mask'\]"),
    ({**feed(), "extra": np.ones(1)}, r"unknown \['extra'\]"),
    ({**feed(), "ids": np.ones((2, 3), np.int32)}, "input ids must be int64, got int32"),
    ({**feed(), "ids": np.ones(3, np.int64)}, "input ids must have 2 axes"),
    ({**feed(), "ids": np.ones((2, 4), np.int64)}, "mask axis 1 is 3, but seq is 4 by ids axis 1"),
    (feed(2, 7), "seq is 7, at most 6: the table of positions"),
    (feed(0, 3), r"ids axis 0 \(batch\) is 0"),
    ({**feed(), "ids": np.full((2, 3), 9)}, r"gather \(gather\): index 9"),
]


@pytest.mark.parametrize(("inputs", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_inputs_are_named(inputs: dict[str, np.ndarray], message: str):
    with pytest.raises(InvalidInput, match=message):
        interpreter.run(lookup(), inputs)


def test_a_fixed_size_is_checked():
    graph = Graph("fixed")
    graph.add_output("y", graph.add("exp", [graph.add_input("x", DType.F32, (B, B * 2, 4))]))
    assert interpreter.run(graph, {"x": np.zeros((3, 6, 4), np.float32)})["y"].shape == (3, 6, 4)
    for shape, message in (((3, 6, 5), "axis 2 must be 4"), ((3, 7, 4), r"axis 1 must be 2\*b")):
        with pytest.raises(InvalidInput, match=message):
            interpreter.run(graph, {"x": np.zeros(shape, np.float32)})


def test_results_are_freed_after_their_last_reader(monkeypatch: pytest.MonkeyPatch):
    graph = Graph("chain")
    value = graph.add_input("x", DType.F32, (B,))
    for _ in range(6):
        value = graph.add("exp", [value])
    graph.add_output("y", value)
    alive: list[weakref.ref[np.ndarray]] = []
    counts: list[int] = []
    plain = interpreter.run_node

    def watched(*args):
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        results = plain(*args)
        alive.extend(weakref.ref(r) for r in results)
        return results

    monkeypatch.setattr(interpreter, "run_node", watched)
    interpreter.run(graph, {"x": np.zeros(3, np.float32)})
    assert max(counts) <= 2  # the operand, and the last result in the loop's variable
