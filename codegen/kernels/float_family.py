"""`linear` in fp32 and `linear_bf16`: which kernel computes a layer, dense or by its blocks.

Tiles of AMX do not replace the vectors of AVX512-BF16: few rows or tokens leave tiles half empty.
Their schedules are ranked together.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.codegen.isa.bf16 import AMX_BF16
from sparsec.codegen.isa.numbers import BF16_NUMBERS, F32_NUMBERS, NUMBERS, Numbers, numbers_of
from sparsec.codegen.isa.polynomials import ACTIVATIONS
from sparsec.codegen.kernels import dense_cost
from sparsec.codegen.kernels.base import Binder
from sparsec.codegen.kernels.counts import total_cycles
from sparsec.codegen.kernels.dense_gemm import DENSE, DenseGemmFamily, pack_bias
from sparsec.codegen.kernels.float_cost import cycles
from sparsec.codegen.kernels.float_gemm import FloatEpilogue, FloatGemm
from sparsec.codegen.kernels.float_pack import (
    PackedFloats,
    pack_dense_bf16,
    pack_dense_tiles,
    pack_sparse,
    pack_sparse_tiles,
)
from sparsec.codegen.kernels.float_tiles import TileFloatGemm
from sparsec.codegen.kernels.panels import LEAST_MACS, WIDTH, grain_of
from sparsec.codegen.kernels.weight_blocks import block_of, layout_and_density
from sparsec.codegen.program import Arg, Kernel, KernelCall
from sparsec.ir.dims import ceildiv
from sparsec.ir.graph import Node
from sparsec.ir.layouts import Panels
from sparsec.ir.op_spec import Array
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

FAMILY = "float_gemm"
PARAMS = ("sparse", "strip", "strips", "nv", "group")
# (strip, strips, nv) per level; fp32 has dense kernels of its own.
DENSE_BLOCKS = {"avx512bf16": ((6, 2, 4),), "amx": ((32, 1, 2),)}
SPARSE_BLOCKS = {
    "avx2": ((4, 1, 2), (1, 4, 4)),
    "avx512": ((4, 1, 4), (1, 4, 4)),
    "avx512bf16": ((4, 1, 4), (1, 4, 4)),
    "amx": ((16, 1, 4), (32, 1, 2)),
}
MOST_PANELS = 8  # of a group
MAX_STEPS = 65536  # rows of a panel that a 16-bit index can name


@dataclass(frozen=True, slots=True)
class Block:
    """`strips` strips of `strip` rows by `nv` vectors; a `sparse` one reads lists of channels."""

    sparse: bool
    strip: int
    strips: int
    nv: int

    @property
    def rows(self) -> int:
        return self.strip * self.strips


class FloatGemmFamily:
    """fp32 and bf16 on token panels. Any kernel computes any weight; the order is by cost."""

    ops = ("linear", "linear_bf16")

    def workload(self, node: Node) -> Workload:
        m, k = node.input(1).type.shape
        assert isinstance(m, int), node
        assert isinstance(k, int), node
        epilogue = _epilogue(node)
        end = " ".join([epilogue.activation, *["residual"] * epilogue.has_residual])
        end += " bf16" if epilogue.result == "bf16" else ""
        layout, density = layout_and_density(node.input(1))
        dtype = str(node.input(0).type.dtype)
        return Workload("linear", (("m", m), ("k", k)), dtype, layout, end, density)

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        table = {str(DType.F32): F32_NUMBERS, str(DType.BF16): BF16_NUMBERS}
        usable = [n for n in table.get(workload.dtype, ()) if target.has(n.vector.isa)]
        if not usable or workload.epilogue.split()[0] not in ACTIVATIONS:
            return []
        is_f32 = workload.dtype == str(DType.F32)
        dense = DenseGemmFamily().schedules(workload, target) if is_f32 else []
        own = [
            _schedule(block, numbers, workload, target)
            for numbers in (usable[-1:] if is_f32 else usable)
            for block in _blocks(numbers, workload)
        ]
        costs = [(cycles(workload, schedule, target), schedule) for schedule in own]
        if dense:  # in their own order, all at the place of their first for any number of tokens
            first = next(s for s in dense if s.family == DENSE)
            most = total_cycles(dense_cost.counts(workload, first, WIDTH, target), target)
            costs = [*((most, s) for s in dense), *costs]
        return [schedule for _, schedule in sorted(costs, key=lambda pair: pair[0])]

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        if schedule.family != FAMILY:
            return DenseGemmFamily().lower(node, schedule, binder)
        x, weight, y = node.input(0), node.input(1), node.output
        bias, residual = node.optional_input(2), node.optional_input(3)
        assert weight.data is not None, node
        assert isinstance(x.type.layout, Panels), node
        kernel = _kernel(node, schedule)
        numbers, strip = kernel.numbers, kernel.strip
        m, k = weight.data.shape
        packed = pack(kernel, weight.data)
        args: list[Arg] = [binder.ref(x)]
        for part, array in packed.named.items():
            end = "" if part == "words" else f".{part}"
            args += [binder.weight(f"{weight.name}.{numbers.name}{end}", array)]
        share = 1.0 if packed.starts is None else packed.words.size * numbers.per_lane / (m * k)
        bias_data = None if bias is None else bias.data
        args += [binder.weight(f"{node.name}.bias", pack_bias(bias_data, m, kernel.rows))]
        args += [] if residual is None else [binder.ref(residual)]
        tokens, group = x.type.tokens, schedule.param("group")
        args += [binder.ref(y), tokens, m, k // numbers.per_lane, group]
        kind = f"strips of {strip} rows, {share:.0%} stored" if kernel.is_sparse else "dense"
        return [
            KernelCall(
                kernel,
                tuple(args),
                ceildiv(ceildiv(tokens, WIDTH), group) * -(-m // kernel.rows),
                f"{node.name}: y[{m}] = w[{m}][{k}] x[{k}], {kind}, {kernel.epilogue.activation}",
                scratch_bytes=kernel.scratch_bytes,
                grain=grain_of(round(kernel.rows * k * share), tokens, LEAST_MACS["fp32"]),
                macs=tokens * round(m * k * share),
            )
        ]

    def variants(self) -> list[Kernel]:
        own = [
            _kind(numbers)(numbers, b.sparse, b.strip, b.strips, b.nv, epilogue)
            for numbers in NUMBERS
            for b in _all_blocks(numbers)
            for epilogue in _epilogues(numbers)
        ]
        return [*DenseGemmFamily().variants(), *own]


def pack(kernel: FloatGemm, w: Array) -> PackedFloats:
    """A weight `[m, k]` as the kernel reads it."""
    if isinstance(kernel, TileFloatGemm):
        return (pack_sparse_tiles if kernel.is_sparse else pack_dense_tiles)(w, kernel.strip)
    if kernel.is_sparse:
        return pack_sparse(w, kernel.strip, kernel.strips, kernel.numbers.per_lane)
    return pack_dense_bf16(w, kernel.strip, kernel.strips)


def _kind(numbers: Numbers) -> type[FloatGemm]:
    return TileFloatGemm if numbers.vector is AMX_BF16 else FloatGemm


def _all_blocks(numbers: Numbers) -> list[Block]:
    level = numbers.vector.name
    dense = [Block(False, *b) for b in DENSE_BLOCKS.get(level, ())]
    return [*dense, *(Block(True, *b) for b in SPARSE_BLOCKS[level])]


def _blocks(numbers: Numbers, workload: Workload) -> list[Block]:
    """Those that make sense for a weight; one without zeros has no sparse ones."""
    fits = block_of(workload.layout) and workload.size("k") // numbers.per_lane <= MAX_STEPS
    return [b for b in _all_blocks(numbers) if fits or not b.sparse]


def _schedule(block: Block, numbers: Numbers, workload: Workload, target: Target) -> Schedule:
    # Half of L2 for the group's activations; the rest is for weights and results.
    panel_bytes = workload.size("k") // numbers.per_lane * WIDTH * 4
    group = min(MOST_PANELS, max(1, target.l2_bytes // 2 // panel_bytes))
    values = (int(block.sparse), block.strip, block.strips, block.nv, group)
    return Schedule(FAMILY, numbers.vector.name, tuple(zip(PARAMS, values, strict=True)))


def _kernel(node: Node, schedule: Schedule) -> FloatGemm:
    name = "bf16" if node.op == "linear_bf16" else "f32"
    sparse, strip, strips, nv, _ = (schedule.param(n) for n in PARAMS)
    numbers = numbers_of(name, schedule.isa)
    return _kind(numbers)(numbers, bool(sparse), strip, strips, nv, _epilogue(node))


def _epilogue(node: Node) -> FloatEpilogue:
    result = "bf16" if node.output.type.dtype is DType.BF16 else "f32"
    return FloatEpilogue(str(node.attrs["activation"]), node.optional_input(3) is not None, result)


def _epilogues(numbers: Numbers) -> list[FloatEpilogue]:
    """All that `_epilogue` gives: use_bf16 stores no result with a residual as bf16."""
    found = [FloatEpilogue(a, residual) for a in ACTIVATIONS for residual in (False, True)]
    if numbers.per_lane == 2:
        found += [FloatEpilogue(a, result="bf16") for a in ACTIVATIONS]
    return found
