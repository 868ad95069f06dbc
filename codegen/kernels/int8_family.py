"""`linear_int8`: which kernel of int8_gemm computes a layer, and its weights in that form."""

from __future__ import annotations

import numpy as np

from sparsec.codegen.isa.int8 import (
    AMX_INT8,
    AVX512_VBMI2,
    INT8_ISAS,
    Int8Isa,
    int8_isa,
    int8_isas,
)
from sparsec.codegen.isa.polynomials import ACTIVATIONS
from sparsec.codegen.kernels.base import Binder
from sparsec.codegen.kernels.counts import seconds
from sparsec.codegen.kernels.int8_bitmap import MOST_TOKENS, ROWS, BitmapGemm, pack_bitmap
from sparsec.codegen.kernels.int8_cost import (
    WIDE,
    Form,
    bitmap_counts,
    block_density,
    counts,
    cycles,
    stored_density,
)
from sparsec.codegen.kernels.int8_dots import DotGemm
from sparsec.codegen.kernels.int8_epilogue import Epilogue
from sparsec.codegen.kernels.int8_gemm import Int8Gemm
from sparsec.codegen.kernels.int8_operands import (
    epilogue_of,
    epilogues,
    numbers,
    operands,
    plain_epilogue,
    row_values,
)
from sparsec.codegen.kernels.int8_pack import (
    QUAD,
    PackedWeight,
    pack_channels,
    pack_dense,
    pack_quads,
    pack_tiles,
)
from sparsec.codegen.kernels.int8_tiles import TileGemm
from sparsec.codegen.kernels.panels import LEAST_MACS, WIDTH, grain_of
from sparsec.codegen.kernels.weight_blocks import block_of, layout_and_density
from sparsec.codegen.program import Arg, BufferRef, Kernel, KernelCall
from sparsec.ir.dims import ceildiv
from sparsec.ir.graph import Node
from sparsec.ir.layouts import Panels
from sparsec.ir.op_spec import Array
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Target

OP = "linear_int8"
FORM_NAMES = {0: "dense", 1: "channels", QUAD: "quads"}
DENSE_STRIP = {8: 4, 16: 6}  # rows by tokens of a tile: as many sums as registers allow
BITMAP_BELOW = 0.6  # share of stored values or blocks from which masks save too little
STRIP = 4
TILE_STRIP = 32  # or less, for blocks of fewer rows
# The highest first: of forms that are counted alike, fewer blocks are as fast or faster: 16x4 on
# Zen 5 by 7 % at 32 tokens, with AVX2 by up to 30 %.
BLOCK_ROWS = (64, 32, 16, 8, 4)
# As which a dense wide weight is read: the higher one is 7 % faster at 32 tokens, unless it stores
# more of its blocks twice.
WIDE_BLOCKS, MOST_TWICE = ((16, QUAD), (4, QUAD)), 0.07
LEAST_TILE_ROWS = 8
MOST_PANELS = 8  # of a group
DTYPES = {np.dtype(np.int8): "u8s8", np.dtype(np.int16): WIDE}
PARAMS = ("rows", "cols", "strip", "group", "most")  # most tokens, or 0: any number


def kernel_of(form: Form, isa: Int8Isa, epilogue: Epilogue, most: int = 0) -> Int8Gemm:
    kind = TileGemm if isa is AMX_INT8 else DotGemm
    name, tall = FORM_NAMES[form.cols], form.rows > form.strip
    return kind(isa, name, form.strip, tall, epilogue, most or None)


def limits(isa: Int8Isa) -> tuple[int, ...]:
    """The numbers of tokens that kernels for few tokens in all are made for, most first.

    With AMX the loops over panels cost little beside a block of rows.
    """
    return () if isa is AMX_INT8 else isa.limits


def pack(w: Array, form: Form, isa: Int8Isa) -> PackedWeight:
    """The int8 weight as the kernel of `form` reads it."""
    if isa is AMX_INT8:
        return pack_tiles(w, form.rows, form.cols, form.strip)
    if form.cols == 0:
        return pack_dense(w, form.strip, isa.words)
    pack_blocks = pack_channels if form.cols == 1 else pack_quads
    return pack_blocks(w, form.rows, form.strip, isa.words)


def forms_of(workload: Workload, isa: Int8Isa) -> list[Form]:
    """All that can compute a weight: lists alone name a channel twice, as wide ones need it."""
    block = block_of(workload.layout)
    if workload.dtype != WIDE:
        return forms(block, isa)
    high, low = WIDE_BLOCKS
    is_low = stored_density(workload, Form(*high, STRIP)) > 1.0 + MOST_TWICE
    return [form for form in forms(block or (low if is_low else high), isa) if form.cols]


def forms(block: tuple[int, int] | None, isa: Int8Isa) -> list[Form]:
    """All that make sense for a weight of i8 with this block; None for a dense one."""
    if isa is AMX_INT8:
        return _tile_forms(block)
    dense = DENSE_STRIP[isa.lanes]
    found = [Form(dense, 0, dense)]
    if block is None:
        return found
    rows, cols = block
    sizes = [r for r in BLOCK_ROWS if rows % r == 0] or [STRIP]
    found += [Form(r, 1, STRIP) for r in sizes]
    if cols % QUAD == 0 or rows < STRIP:
        found += [Form(r, QUAD, STRIP) for r in sizes]
        found.append(Form(1, QUAD, 1))
    if rows * cols < QUAD:  # unpacking for one row pays where its channels are not its neighbours'
        found.append(Form(1, 1, 1))
    return found


def _tile_forms(block: tuple[int, int] | None) -> list[Form]:
    """Lower blocks may be seen as higher ones: products of few rows cost as much as those of 8."""
    found = [Form(TILE_STRIP, 0, TILE_STRIP)]
    if block is None:
        return found
    rows, cols = block
    sizes = [r for r in BLOCK_ROWS if r >= LEAST_TILE_ROWS and 0 in (rows % r, r % rows)]
    widths = [1, QUAD] if cols % QUAD == 0 else [1]
    return found + [Form(r, c, min(r, TILE_STRIP)) for c in widths for r in sizes]


def _limits_of(isa: Int8Isa, tokens: int | None) -> list[int]:
    """The `limits` that are not below the tokens, and 0: the kernel for any number."""
    return [*(n for n in limits(isa) if tokens is not None and tokens <= n), 0]


def _most(isa: Int8Isa, tokens: int | None) -> int:
    """The heuristic's choice of `_limits_of`: the least, which has the smallest code."""
    return min((n for n in _limits_of(isa, tokens) if n), default=0)


def _group(isa: Int8Isa, k: int, target: Target) -> int:
    """Panels that each block of rows is multiplied by before the next.

    With vectors a panel takes longer than its weights take from L3, and one alone stays in L1.
    With tiles it does not: half of L2 is for activations, the rest for weights and results.
    """
    if isa is not AMX_INT8:
        return 1
    return min(MOST_PANELS, max(1, target.l2_bytes // 2 // (k * WIDTH)))


def _groups(usual: int, tokens: int | None) -> list[int]:
    """Numbers of panels in a group that differ for so many tokens, the heuristic's first."""
    panels = MOST_PANELS * 2 if tokens is None else -(-tokens // WIDTH)
    others = [n for n in (1, 2, 4, 8, 16) if n < 2 * panels]
    return [usual, *others]


def _schedule(form: Form, isa: Int8Isa, group: int, most: int) -> Schedule:
    values = (form.rows, form.cols, form.strip, group, most)
    return Schedule("int8_gemm", isa.name, tuple(zip(PARAMS, values, strict=True)))


def _with_bitmap(workload: Workload, target: Target, ordered: list[Schedule]) -> list[Schedule]:
    """The bitmap kernel before or after the first of the others, where it makes sense."""
    tokens = workload.bucket.most
    sparse = workload.density <= BITMAP_BELOW and workload.dtype != WIDE
    if tokens is None or tokens > MOST_TOKENS or not sparse or not target.has(AVX512_VBMI2.isa):
        return ordered
    usual, *others = ordered
    found = Schedule("int8_bitmap", AVX512_VBMI2.name)
    cost = seconds(bitmap_counts(workload, tokens, target), target)
    is_first = cost < seconds(counts(workload, usual, tokens, target), target)
    return [found, usual, *others] if is_first else [usual, found, *others]


class Int8GemmFamily:
    """`linear_int8` on planar u8 panels. Any kernel computes any weight; the order is by cost."""

    ops = (OP,)

    def workload(self, node: Node) -> Workload:
        weight = node.input(1)
        m, k = weight.type.shape
        assert isinstance(m, int), node
        assert isinstance(k, int), node
        epilogue = plain_epilogue(node)
        flags = [*["bytoken"] * epilogue.by_token, *["residual"] * epilogue.has_residual]
        end = " ".join([epilogue.activation, *flags])
        name, density = layout_and_density(weight)
        assert weight.data is not None, node
        dtype = DTYPES[weight.data.dtype]
        if name == "dense":
            density = _share_in_i8(weight.data) if dtype == WIDE else _share_of_values(weight.data)
        sizes = (("m", m), ("k", k))
        return Workload(OP, sizes, dtype, name, f"{end} {epilogue.result}", density)

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        activation = workload.epilogue.partition(" ")[0]
        if activation not in ACTIVATIONS:
            return []
        tokens = workload.bucket.most
        sizes = workload.size("m"), workload.size("k")
        block = block_of(workload.layout) or (1, 1)

        def cost(candidate: tuple[Form, Int8Isa]) -> float:
            form, isa = candidate
            density = block_density(workload.density, block, form)
            return cycles(form, sizes, density, isa, target)

        isas = int8_isas(target)
        group = {isa.name: _group(isa, sizes[1], target) for isa in isas}
        found = [(form, isa) for isa in isas for form in forms_of(workload, isa)]
        ordered = sorted(found, key=cost)
        usual = [
            _schedule(form, isa, group[isa.name], _most(isa, tokens)) for form, isa in ordered
        ]
        others = [
            _schedule(form, isa, panels, most)
            for form, isa in ordered
            for panels in _groups(group[isa.name], tokens)
            for most in _limits_of(isa, tokens)
        ]
        return _with_bitmap(workload, target, list(dict.fromkeys([*usual, *others])))

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        x, weight, y = node.input(0), node.input(1), node.output
        assert weight.data is not None, node
        assert x.type.layout == y.type.layout == Panels(), node
        if schedule.family == "int8_bitmap":
            return [_bitmap_call(node, weight.data, binder)]
        rows, cols, strip, group, most = (schedule.param(n) for n in PARAMS)
        form, isa = Form(rows, cols, strip), int8_isa(schedule.isa)
        kernel = kernel_of(form, isa, epilogue_of(node, isa, binder), most)
        packed = pack(weight.data, form, isa)
        m, k = weight.data.shape
        tokens = x.type.tokens
        args: list[Arg] = [
            binder.ref(x),
            *_weights(node, packed, form, isa, binder),
            *row_values(node, rows, kernel.epilogue, binder),
            *operands(node, kernel.epilogue, binder),
            *(tokens, m, k, group, *([rows // strip] if kernel.tall else [])),
            *numbers(node, kernel.epilogue),
        ]
        blocks = -(-m // rows)
        density = 1.0 if cols == 0 else packed.quads * QUAD / (k * blocks)
        name = "dense" if cols == 0 else f"blocks of {rows}x{cols}, {density:.0%} stored"
        return [
            KernelCall(
                kernel,
                tuple(args),
                ceildiv(tokens, WIDTH) * blocks,
                f"{node.name}: y[{m}] = w[{m}][{k}] x[{k}], {name}, {kernel.epilogue.activation}",
                scratch_bytes=kernel.scratch_bytes(k, group, packed.most_steps),
                grain=grain_of(round(rows * k * density), tokens, LEAST_MACS["int8"]),
                macs=tokens * round(m * k * density),
                per_panel=blocks,
            )
        ]

    def variants(self) -> list[Kernel]:
        found: list[Kernel] = [
            kernel_of(form, isa, epilogue, most)
            for isa in INT8_ISAS
            for form in _distinct_forms(isa)
            for epilogue in epilogues(isa)
            for most in (0, *limits(isa))
        ]
        return [*found, *(BitmapGemm.of(epilogue) for epilogue in epilogues(AVX512_VBMI2))]


def _distinct_forms(isa: Int8Isa) -> list[Form]:
    """One for every kernel: all heights above a strip share one."""
    if isa is AMX_INT8:
        heights = ((8, 8), (16, 16), (TILE_STRIP, TILE_STRIP), (2 * TILE_STRIP, TILE_STRIP))
        return [*forms(None, isa), *(Form(r, c, strip) for c in (1, QUAD) for r, strip in heights)]
    tall = 2 * STRIP
    sparse = [Form(r, c, STRIP) for c in (1, QUAD) for r in (STRIP, tall)]
    return [*forms(None, isa), *sparse, Form(1, QUAD, 1), Form(1, 1, 1)]


def _share_of_values(w: Array) -> float:
    """Of those that are not zero; 1 where that is most of them, as masks would not pay."""
    share = round(np.count_nonzero(w) / max(1, w.size), 3)
    return share if share <= BITMAP_BELOW else 1.0


def _share_in_i8(w: Array) -> float:
    return round(np.count_nonzero((w >= -128) & (w <= 127)) / max(1, w.size), 4)


def _bitmap_call(node: Node, w: Array, binder: Binder) -> KernelCall:
    kernel, packed, tokens = (
        BitmapGemm.of(epilogue_of(node, AVX512_VBMI2, binder)),
        pack_bitmap(w),
        node.input(0).type.tokens,
    )
    m, k = w.shape
    name = f"{node.input(1).name}.bitmap"
    share = np.count_nonzero(w) / max(1, w.size)
    args: list[Arg] = [
        binder.ref(node.input(0)),
        *(binder.weight(f"{name}.{n}", array) for n, array in packed.arrays.items()),
        *row_values(node, ROWS, kernel.epilogue, binder),
        *operands(node, kernel.epilogue, binder),
        *(tokens, m, k),
        *numbers(node, kernel.epilogue),
    ]
    title = f"bitmap, {share:.0%} stored, {kernel.epilogue.activation}"
    return KernelCall(
        kernel,
        tuple(args),
        -(-m // ROWS),
        f"{node.name}: y[{m}] = w[{m}][{k}] x[{k}], {title}",
        scratch_bytes=kernel.scratch_bytes(k),
        grain=grain_of(ROWS * k, tokens, LEAST_MACS["int8"]),
        macs=tokens * round(m * k * share),
        per_panel=-(-m // ROWS),
    )


def _weights(
    node: Node, packed: PackedWeight, form: Form, isa: Int8Isa, binder: Binder
) -> list[BufferRef]:
    name = f"{node.input(1).name}.{form.rows}x{form.cols}.{isa.name}"
    return [binder.weight(f"{name}.{n}", array) for n, array in packed.arrays.items()]
