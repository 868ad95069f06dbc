"""quantize_tables: large embedding tables as int8 rows; those of a quantised model as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparsec.errors import InvalidInput
from sparsec.interpreter import run
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Node
from sparsec.ir.types import DType, QuantParams
from sparsec.passes import quantized_values
from sparsec.passes.manager import PassManager
from sparsec.passes.quantize_tables import QuantizeTables, numbers

WORDS, KINDS, CHANNELS = 40, 2, 12
LARGE = WORDS * CHANNELS * 4  # bytes of the larger table


@pytest.fixture
def graph(rng: np.random.Generator) -> Graph:
    """The sum of a row of a large and of a small table."""
    graph = Graph("look_ups")
    shape = (symbol("batch"), symbol("seq"))
    ids, kinds = (graph.add_input(name, DType.I64, shape) for name in ("ids", "kinds"))
    tables = [
        graph.add_constant(rng.standard_normal((rows, CHANNELS)).astype(np.float32), name)
        for name, rows in (("words", WORDS), ("types", KINDS))
    ]
    total = graph.add("embedding", [ids, tables[0], kinds, tables[1]], name="look_up")
    graph.outputs, graph.output_names = [total], ["y"]
    return graph


def feed(rng: np.random.Generator) -> dict[str, Any]:
    return {"ids": rng.integers(0, WORDS, (3, 7)), "kinds": rng.integers(0, KINDS, (3, 7))}


def only_node(graph: Graph) -> Node:
    (node,) = graph.nodes
    return node


def apply(graph: Graph, **options: Any) -> str:
    """Runs the pass; returns its notes."""
    (record,) = PassManager([QuantizeTables(**{"large_bytes": LARGE, **options})]).run(graph)
    return "\n".join(record["notes"])


def test_the_large_table_is_int8_and_off_by_half_a_step(
    graph: Graph, rng: np.random.Generator
) -> None:
    words = next(v.data for v in graph.constants() if v.name == "words")
    assert words is not None
    inputs = feed(rng)
    before = run(graph, inputs)["y"]
    assert "%words is stored in int8" in apply(graph)
    node = only_node(graph)
    assert node.op == "embedding_int8"
    stored = [v.type.dtype for v in node.inputs if v is not None and v.is_constant]
    assert stored == [DType.F32, DType.I8, DType.F32]  # types; words and their scale
    step = np.abs(words).max(axis=1)[inputs["ids"]] / 127
    # Half a step, and the rounding of sums below 16 in fp32.
    assert (np.abs(run(graph, inputs)["y"] - before) <= step[..., None] / 2 + 1e-6).all()


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"large_bytes": LARGE + 1}, ""),
        ({"keep_fp32": ("look*",)}, "%words stays fp32: look_up: its name matches 'look*'"),
        ({"fallback": frozenset({"look_up"})}, "%words stays fp32: in int8 it loses more than"),
        ({"supported": lambda node: False}, "no kernel computes look_up"),
        ({"only_own": True}, "%words stays fp32: all roundings are those of the file"),
    ],
)
def test_what_stays_fp32(graph: Graph, options: dict[str, Any], note: str) -> None:
    notes = apply(graph, **options)
    assert note in notes
    assert (notes == "") == (note == "")
    assert only_node(graph).op == "embedding"


def test_a_table_that_something_else_reads_stays_fp32(graph: Graph) -> None:
    words = only_node(graph).input(1)
    graph.outputs.append(graph.add("neg", [words], name="other"))
    graph.output_names.append("z")
    assert "%words stays fp32: other reads it too" in apply(graph)


def test_a_table_that_is_not_finite_stays_fp32(graph: Graph) -> None:
    words = only_node(graph).input(1)
    assert words.data is not None
    data = words.data.copy()
    data[3, 4] = np.inf
    graph.replace_input(only_node(graph), 1, graph.add_constant(data, "words"))
    assert "it is not finite" in apply(graph)


def test_a_table_of_two_look_ups_is_stored_once(graph: Graph) -> None:
    node = only_node(graph)
    again = graph.add("embedding", [node.input(2), node.input(1)], name="again")
    graph.outputs.append(again)
    graph.output_names.append("z")
    apply(graph)
    assert [n.op for n in graph.nodes] == ["embedding_int8"] * 2
    assert sum(v.type.dtype is DType.I8 for v in graph.constants()) == 1


@pytest.mark.parametrize("zero_point", [0, 3, 100, 128, 150, 255])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_table_of_bytes_keeps_its_numbers(
    zero_point: int, per_row: bool, rng: np.random.Generator
) -> None:
    scale = rng.uniform(1e-3, 2e-3, WORDS if per_row else 1).astype(np.float32)
    stored = rng.integers(0, 256, (WORDS, CHANNELS)).astype(np.uint8)
    stored[0, :2] = 0, 255
    real = (stored.astype(np.int64) - zero_point).astype(np.float32) * scale[:, None]
    graph = Graph("g")
    table = graph.add_constant(real, "words")
    params = QuantParams(
        tuple(map(float, scale)), (zero_point,) * scale.size, 0 if per_row else None
    )
    graph.set_type(table, replace(table.type, quant=params))
    data, scales, own = numbers(table)
    assert (data.dtype, scales.shape) == (np.int8, (WORDS,))
    again = (data.astype(np.int64) - own).astype(np.float32) * scales[:, None]
    np.testing.assert_array_equal(again, real)


def test_keep_fp32_may_name_an_embedding_and_must_name_something(graph: Graph) -> None:
    assert quantized_values(graph, ("look*",)) == []
    with pytest.raises(InvalidInput, match="or embedding is named like 'lok'"):
        quantized_values(graph, ("lok",))
