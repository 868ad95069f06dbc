"""The blocks that zeros form, through quantisation, and the layout chosen by them."""

from __future__ import annotations

import numpy as np
import pytest

from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph
from sparsec.ir.layouts import ROW_MAJOR, Bsr, Layout
from sparsec.ir.types import DType
from sparsec.passes.choose_weight_layout import ChooseWeightLayout, by_density, find_structure
from sparsec.passes.manager import PassManager
from sparsec.passes.quantize import Quantize, quantize_weight
from sparsec.sparse.bsr import BLOCK_SHAPES, block_mask


def pruned(
    rng: np.random.Generator,
    block: tuple[int, int],
    sparsity: float,
    shape: tuple[int, int] = (128, 96),
) -> np.ndarray:
    w = rng.standard_normal(shape).astype(np.float32)
    return w * block_mask(w, *block, sparsity)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("block", BLOCK_SHAPES)
def test_pruned_blocks_are_found_after_quantisation(rng, block, sparsity):
    data, _ = quantize_weight(pruned(rng, block, sparsity))
    structure = find_structure(data)
    assert structure.block == block
    assert structure.shares[block] == pytest.approx(1 - sparsity, abs=0.03)


@pytest.mark.parametrize("shape", [(100, 96), (30, 7), (1, 5)])
def test_sizes_that_blocks_do_not_divide(rng, shape):
    """Blocks over the edge are smaller: the shares, not the answer, may be off."""
    structure = find_structure(quantize_weight(pruned(rng, (1, 1), 0.5, shape))[0])
    assert set(structure.shares) == set(BLOCK_SHAPES)


def test_heavy_tails_round_to_zero_and_are_still_dense(rng):
    w = rng.standard_normal((128, 96)).astype(np.float32)
    w[:, 0] *= 3
    assert find_structure(quantize_weight(w)[0]).block is None


def test_all_zeros_and_no_values():
    assert find_structure(np.zeros((64, 64), np.int8)).candidates[1] == (Bsr(32, 4), 0.0)
    assert find_structure(np.ones((64, 64), np.int8)).candidates == [(ROW_MAJOR, 1.0)]


def graph_of(w: np.ndarray) -> Graph:
    graph = Graph("layer")
    x = graph.add_input("x", DType.F32, (symbol("batch"), symbol("seq"), w.shape[1]))
    operands = [x, graph.add_constant(w, "w"), None, None]
    graph.add_output("y", graph.add("linear", operands, {"activation": "none"}, name="dense"))
    PassManager([Quantize({"x": (-1.0, 1.0)})]).run(graph)
    return graph


def layout_of(graph: Graph) -> Layout:
    (node,) = (n for n in graph.nodes if n.op == "linear_int8")
    return node.input(1).type.layout


CASES = [
    ((16, 1), 0.8, Bsr(16, 1), "blocks of 16x1, 20.1% of them not zero; bsr16x1"),
    ((16, 4), 0.9, Bsr(16, 4), "blocks of 16x4"),
    ((32, 1), 0.3, ROW_MAJOR, "blocks of 32x1, 70.1% of them not zero; rows"),
    ((1, 1), 0.5, ROW_MAJOR, "unstructured zeros"),
    ((1, 1), 0.95, Bsr(4, 1), "unstructured zeros"),
    ((1, 1), 0.0, ROW_MAJOR, "of its values are not zero: dense; rows"),
]


@pytest.mark.parametrize(("block", "sparsity", "layout", "note"), CASES)
def test_the_default_choice(rng, block, sparsity, layout, note):
    graph = graph_of(pruned(rng, block, sparsity))
    (record,) = PassManager([ChooseWeightLayout()]).run(graph)
    assert layout_of(graph) == layout
    (found,) = record["notes"]
    assert found.startswith("dense: ")
    assert note in found
    assert record["changed"] == (layout != ROW_MAJOR)


def test_the_choice_is_the_callers(rng):
    graph = graph_of(pruned(rng, (16, 4), 0.8))
    seen = []

    def choose(node, candidates):
        seen.append((node.op, candidates[0], candidates[1][0], len(candidates)))
        return Bsr(4, 4)

    PassManager([ChooseWeightLayout(choose)]).run(graph)
    assert seen == [("linear_int8", (ROW_MAJOR, 1.0), Bsr(16, 4), 1 + len(BLOCK_SHAPES))]
    assert layout_of(graph) == Bsr(4, 4)


def test_a_shared_weight_is_looked_at_once(rng):
    graph = Graph("shared")
    x = graph.add_input("x", DType.F32, (symbol("batch"), symbol("seq"), 96))
    w = graph.add_constant(pruned(rng, (16, 1), 0.8))
    y = [graph.add("linear", [x, w, None, None], {"activation": "none"}) for _ in range(2)]
    graph.add_output("y", graph.add("add", y))
    records = PassManager([Quantize({"x": (-1.0, 1.0)}), ChooseWeightLayout()]).run(graph)
    assert len(records[1]["notes"]) == 1


def test_density_takes_the_first_that_is_sparse_enough():
    candidates = [(ROW_MAJOR, 1.0), (Bsr(1, 1), 0.5), (Bsr(4, 1), 0.7), (Bsr(1, 4), 0.6)]
    assert by_density(None, candidates) == Bsr(1, 4)
    assert by_density(None, candidates[:3]) == ROW_MAJOR


def test_a_weight_of_hardly_any_zeros_is_offered_dense_alone(rng: np.random.Generator) -> None:
    w = rng.integers(-127, 128, (64, 64)).astype(np.int8)  # every 255th is 0
    assert find_structure(w).candidates == [(ROW_MAJOR, 1.0)]
