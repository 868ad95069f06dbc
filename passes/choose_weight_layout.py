"""Find the blocks in which the zeros of weights lie, and choose a layout by them.

linear(x, w in rows)   ->   linear(x, w in bsr16x1)    when few 16x1 blocks are not zero

The same for linear_int8 and linear_bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.layouts import ROW_MAJOR, Bsr, Layout
from sparsec.ir.op_spec import Array
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult
from sparsec.sparse.bsr import BLOCK_SHAPES, block_zeros

Block = tuple[int, int]
LayoutChoice = Callable[[Node, Sequence[tuple[Layout, float]]], Layout]

# Blocks that were pruned hold zeros alone; those that were not lose a few per cent of their
# values when small weights round to zero. Unstructured zeros are further off: at a share p of
# values that are not zero, 1 - (1 - p)**4 of blocks of four are not.
TOLERANCE = 0.1
NO_ZEROS = 0.98  # a greater share of values that are not zero is rounding, not pruning
DENSE_ABOVE = 0.6  # share of non-zero blocks from which dense kernels are faster
PRODUCTS = ("linear", "linear_int8", "linear_bf16")
KERNEL_TYPES = (DType.F32, DType.I8, DType.I16, DType.BF16)
SMALLEST_BLOCK = 4  # values; whether smaller ones pay, only costs can say


@dataclass(frozen=True, slots=True)
class Structure:
    """`block` is the coarsest one that the zeros fill; `shares` are of non-zero blocks."""

    block: Block | None
    shares: Mapping[Block, float]

    def __str__(self) -> str:
        if self.block is None:
            return f"{self.shares[1, 1]:.0%} of its values are not zero: dense"
        rows, cols = self.block
        kind = "unstructured zeros" if self.block == (1, 1) else f"blocks of {rows}x{cols}"
        return f"{kind}, {self.shares[self.block]:.1%} of them not zero"

    @property
    def candidates(self) -> list[tuple[Layout, float]]:
        """Dense, the structure's own block, then all others that leave anything out, from small to
        large."""
        sparse = [b for b, share in self.shares.items() if share <= NO_ZEROS]
        others = sorted(sparse, key=lambda b: (b[0] * b[1], -b[0]))
        blocks = [self.block] if self.block else []
        blocks += [b for b in others if b != self.block]
        return [(ROW_MAJOR, 1.0), *((Bsr(*b), self.shares[b]) for b in blocks)]


def find_structure(w: Array) -> Structure:
    """Which blocks the zeros of `w[m, k]` form."""
    values = 1.0 - block_zeros(w, [(1, 1)])[1, 1]
    if values > NO_ZEROS:
        return Structure(None, {(1, 1): values})
    shares = {block: 1.0 - zeros for block, zeros in block_zeros(w, BLOCK_SHAPES).items()}
    fitting = [b for b, share in shares.items() if share <= values * (1.0 + TOLERANCE)]
    coarsest = max(fitting, key=lambda b: (b[0] * b[1], -shares[b], b[0]))
    return Structure(coarsest if shares[coarsest] <= NO_ZEROS else None, shares)


def by_density(node: Node, candidates: Sequence[tuple[Layout, float]]) -> Layout:
    """The first block shape with few enough blocks that are not zero, else dense."""
    for layout, share in candidates:
        large = isinstance(layout, Bsr) and layout.rows * layout.cols >= SMALLEST_BLOCK
        if large and share <= DENSE_ABOVE:
            return layout
    return ROW_MAJOR


def _is_for_kernels(graph: Graph, weight: Value) -> bool:
    """Whether products alone read a weight: other ops know rows."""
    read = all(n.op in PRODUCTS and i == 1 for n, i in weight.uses)
    return read and weight.type.dtype in KERNEL_TYPES and weight not in graph.outputs


@dataclass(frozen=True, slots=True)
class ChooseWeightLayout:
    """After the passes that change precision: it counts the zeros that they leave.

    `choose` takes a layout; which kernel computes it, the family decides by their costs.
    """

    choose: LayoutChoice = by_density
    name: str = "choose_weight_layout"

    def run(self, graph: Graph) -> PassResult:
        chosen: dict[Value, str] = {}
        changed = 0
        for node in graph.nodes:
            if node.op not in PRODUCTS or node.input(1) in chosen:
                continue
            weight = node.input(1)
            if weight.data is None or not _is_for_kernels(graph, weight):
                continue
            structure = find_structure(weight.data)
            layout = self.choose(node, structure.candidates)
            changed += layout != weight.type.layout
            graph.set_type(weight, weight.type.with_layout(layout))
            chosen[weight] = f"{node.name}: {structure}; {layout}"
        return PassResult(changed, tuple(chosen.values()))
