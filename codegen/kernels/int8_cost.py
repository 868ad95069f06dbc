"""What a kernel of int8_gemm issues.

Counted per step (four channels) of a strip of rows and per panel of 64 tokens:

    AVX512-VNNI             multiply-adds   unpacks    loads
    dense, 6 rows           24              -          4 quads, 6 weights
    quads, r rows           4 r             -          4 quads, r weights, 1 index
    channels, first strip   4 r             8          4 channels, r weights, 4 indices
    channels, other strips  4 r             -          4 quads, r weights

AVX2 halves the tokens of a vector and multiplies in two steps of two instructions, after it has
split the quads in two. Quads that are not in L1 come from L2.

AMX multiplies 16 quads in a step, in passes of up to four products (int8_tiles). Counted per step
and panel:

                            products    rows of one         unpacks   stores
    dense, 32 rows          8           16                  -         -
    quads, r rows           4 or 8      those of a tile,    -         64
    channels, first strip   4 or 8      but at least 8      128       64
    other strips            8           16                  -         -

A product is one instruction for the port of the shuffles, but keeps a unit of its own busy for a
cycle per row. Tiles are loaded row by row, beside what is fetched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsec.codegen.isa.amx import ROWS, SUMS
from sparsec.codegen.isa.int8 import AVX512_VNNI, TILES, Int8Isa, int8_isa
from sparsec.codegen.isa.pieces import may_take_pieces
from sparsec.codegen.isa.work import activation_work
from sparsec.codegen.kernels.counts import (
    LINE_BYTES,
    PASS_CYCLES,
    Counts,
    Loop,
    strip_cycles,
    total_cycles,
)
from sparsec.codegen.kernels.int8_bitmap import CASES, CELL, GROUPS
from sparsec.codegen.kernels.int8_bitmap import ROWS as BITMAP_ROWS
from sparsec.codegen.kernels.int8_pack import QUAD, TILE_QUADS
from sparsec.codegen.kernels.panels import LEAST_MACS, WIDTH, grain_at
from sparsec.codegen.kernels.weight_blocks import block_of
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Isa, Target

# Weights of i16, up to 255 on either side: the sum of i8 parts. The density of a dense one is the
# share of numbers that are one part.
WIDE = "u8s9"
STRIP_CYCLES = 40.0  # to start and end the loop over steps: sums in, sums out, one misprediction
INDEX_LOADS = QUAD / 2  # what the loads of four scalars cost, in loads of vectors
UNPACKS = {4: 8, 2: 8, 1: 5}  # shuffles and joins that make quads of four channels, by tiles
TILE_UNPACKS = {4: 8, 2: 4}  # for AMX: two tiles are permuted
EXPAND_SHUFFLES = 3  # a mask into its register and the two steps of an expansion
EXPAND_CYCLES = 1.5  # of it that nothing overlaps with, measured on Zen 4
LEAST_PRODUCT_ROWS = 8  # a product of tiles with fewer rows takes as long


@dataclass(frozen=True, slots=True)
class Form:
    """Blocks of `rows` by `cols`, in strips of `strip` rows; 0 columns: all channels."""

    rows: int
    cols: int
    strip: int


def block_density(density: float, block: tuple[int, int], form: Form) -> float:
    """Share of the form's blocks that are stored, for a weight whose `block`s are at random."""
    if form.cols == 0:
        return 1.0
    covered = max(1, form.rows // block[0]) * max(1, form.cols // block[1])
    return float(1.0 - (1.0 - density) ** covered)


def stored_density(workload: Workload, form: Form) -> float:
    """Share of the form's blocks that are stored: of a dense wide weight more than all."""
    block = block_of(workload.layout)
    if block is None and workload.dtype == WIDE:
        return 1.0 + block_density(1.0 - workload.density, (1, 1), form)
    return block_density(workload.density, block or (1, 1), form)


def cycles(
    form: Form, sizes: tuple[int, int], density: float, isa: Int8Isa, target: Target
) -> float:
    """For `sizes` m and k and one panel; `density` is the share of the form's blocks."""
    return total_cycles(_counts(form, sizes, density, isa, target, WIDTH, 1, "none u8"), target)


def counts(workload: Workload, schedule: Schedule, tokens: int, target: Target) -> Counts:
    """Of a schedule of Int8GemmFamily."""
    form = Form(*(schedule.param(n) for n in ("rows", "cols", "strip")))
    density, sizes = stored_density(workload, form), (workload.size("m"), workload.size("k"))
    isa, group, most = int8_isa(schedule.isa), schedule.param("group"), schedule.param("most")
    if most:  # a kernel of that narrow form alone
        isa = replace(isa.form_for(most), narrow=None)
    return _counts(form, sizes, density, isa, target, tokens, group, workload.epilogue)


def bitmap_counts(workload: Workload, tokens: int, target: Target) -> Counts:
    """Of int8_bitmap. Stored values are at most those of the stored blocks."""
    m, k = workload.size("m"), workload.size("k")
    hooks = AVX512_VNNI.form_for(tokens)
    most = next(n for n in CASES if n >= tokens)
    together, groups, quads = CASES[most], -(-m // BITMAP_ROWS) * GROUPS, -(-k // QUAD)
    cells = groups * quads
    step = Loop(
        cells,
        macs=CELL * most,
        shuffles=EXPAND_SHUFFLES,
        others=1,
        loads=3,  # a mask, and values across two lines
        broadcasts=most / together,
        fixed_cycles=EXPAND_CYCLES,
    )
    blocks = groups // together
    loops = [_copy(k, hooks, 1), step, Loop(blocks, fixed_cycles=STRIP_CYCLES)]
    weights = cells * (CELL / 8 + CELL * workload.density)
    return Counts(
        product=f"u8s8.{hooks.name}",
        bits=32 * hooks.lanes,
        loops=(*loops, *_epilogue(hooks, hooks.chunk, m, workload.epilogue)),
        items=-(-m // BITMAP_ROWS),
        grain=grain_at(BITMAP_ROWS * k, tokens, LEAST_MACS["int8"]),
        streams=((weights, max(weights, target.l2_bytes)),),
    )


def _counts(
    form: Form, sizes: tuple[int, int], density: float, isa: Int8Isa, target: Target,
    tokens: int, group: int, epilogue: str,
) -> Counts:  # fmt: skip
    m, k = sizes
    blocks, panels = -(-m // form.rows), -(-tokens // WIDTH)
    groups = -(-panels // group)
    quads = -(-k // QUAD) * density
    if isa.isa is Isa.AMX:
        steps, step_quads = quads / TILE_QUADS + (0.5 if form.cols else 0.0), TILE_QUADS
    else:
        steps, step_quads = quads + (0.5 if form.cols == 1 else 0.0), 1
    loops: list[Loop] = []
    whole, left = divmod(tokens, WIDTH)
    parts = [(isa, whole, WIDTH)] if whole else []
    if left:
        parts.append(_last_panel(isa, left))
    for hooks, times, width in parts:
        rounds = blocks * times
        if form.cols != 1:
            loops.append(_copy(k, hooks, times * (width // hooks.chunk)))
        if isa.isa is Isa.AMX:
            loops += _tile_panel(form, k, (steps, quads), hooks, target, rounds)
        else:
            loops += _panel(form, k, steps, hooks, target, width, rounds)
        loops += _epilogue(hooks, width, m * times, epilogue)
    words = steps * step_quads * form.rows * isa.words_per_quad * 4 * blocks
    indices = steps * step_quads * blocks * {0: 0, 1: 2 * QUAD, QUAD: 2}[form.cols]
    weights = words + indices
    return Counts(
        product=f"u8s8.{isa.name}",
        bits=32 * isa.lanes,
        loops=tuple(loops),
        items=blocks * panels,
        grain=grain_at(round(form.rows * k * density), tokens, LEAST_MACS["int8"]),
        streams=((weights * groups, max(weights, target.l2_bytes)),),
        has_own_unit=isa.isa is Isa.AMX,
    )


def _last_panel(isa: Int8Isa, tokens: int) -> tuple[Int8Isa, int, int]:
    """The hooks of a panel that is not full, how many there are, and the tokens it computes."""
    if isa.narrow is not None:
        narrow = tokens <= isa.narrow.chunk
        return (isa.narrow, 1, isa.narrow.chunk) if narrow else (isa, 1, WIDTH)
    return isa, 1, -(-tokens // isa.chunk) * isa.chunk


def _copy(k: int, isa: Int8Isa, chunks: int) -> Loop:
    """The quads of all channels of `chunks` chunks."""
    return Loop(-(-k // QUAD) * chunks, shuffles=UNPACKS[isa.tiles], loads=QUAD, stores=isa.tiles,
                l2_bytes=QUAD * isa.chunk)  # fmt: skip


def _panel(
    form: Form, k: int, steps: float, isa: Int8Isa, target: Target, width: int, blocks: int
) -> list[Loop]:
    """The sums of `blocks` blocks of rows, each for a panel of `width` tokens."""
    chunks, strips = width // isa.chunk, form.rows // form.strip
    together = min(strips, TILES // isa.tiles)  # strips in one register block
    turns = -(-strips // together)
    rounds = blocks * chunks
    in_l1 = k * isa.chunk <= target.l1d_bytes // 2
    kept_in_l1 = steps * QUAD * isa.chunk <= target.l1d_bytes // 2
    loops = []
    first = _step(form, isa, together, first=True, in_l1=in_l1)
    other = _step(form, isa, together, first=False, in_l1=kept_in_l1)
    gathers = form.cols == 1 and isa.columns < isa.tiles  # a loop of its own before all strips
    if gathers:
        in_l2 = 0 if in_l1 else QUAD * isa.chunk
        loops.append(Loop(rounds * steps, shuffles=UNPACKS[isa.tiles], loads=2 * QUAD,
                          stores=isa.tiles, l2_bytes=in_l2))  # fmt: skip
        first = other
    loops.append(replace(first, times=rounds * steps))
    if turns > 1:
        loops.append(replace(other, times=rounds * steps * (turns - 1)))
    passes, ends = isa.tiles // isa.columns, strip_cycles(STRIP_CYCLES, form.strip)
    loops.append(Loop(rounds * turns * passes, fixed_cycles=ends))
    return loops


def _step(form: Form, isa: Int8Isa, together: int, *, first: bool, in_l1: bool) -> Loop:
    """One step of one register block of one chunk, all of its column passes."""
    rows, passes, words = form.strip * together, isa.tiles // isa.columns, isa.words_per_quad
    unpacks = form.cols == 1 and first and isa.columns == isa.tiles
    channels = QUAD * max(0.5, isa.chunk / LINE_BYTES)  # half vectors or less: two loads at once
    return Loop(
        1,
        macs=isa.chunk * QUAD * rows,
        shuffles=UNPACKS[isa.tiles] if unpacks else 0,
        others=0 if words == 1 else 2 * isa.tiles,
        loads=INDEX_LOADS + channels if unpacks else isa.tiles + passes * (form.cols == QUAD),
        broadcasts=rows * words * passes,
        stores=isa.tiles if unpacks and form.rows > form.strip else 0,
        l2_bytes=0 if in_l1 else isa.chunk * QUAD,
        chain_cycles=4.0 * passes if rows * isa.columns < 8 else 0.0,
    )


def _tile_panel(
    form: Form, k: int, depth: tuple[float, float], isa: Int8Isa, target: Target, blocks: int
) -> list[Loop]:
    """The same by tiles, for a chunk of a panel; `depth` is in steps and in quads."""
    steps, quads = depth
    strips, weight_bytes = form.rows // form.strip, quads * QUAD * form.rows
    in_l1 = k * WIDTH + weight_bytes <= target.l1d_bytes
    kept_in_l1 = quads * QUAD * isa.chunk + weight_bytes <= target.l1d_bytes
    passes = isa.tiles // _columns(form, isa)
    first = _tile_step(form, isa, quads / steps if form.cols else 0.0, in_l1=in_l1)
    other = _tile_step(form, isa, 0.0, in_l1=kept_in_l1)
    return [
        replace(first, times=blocks * steps),
        replace(other, times=blocks * steps * (strips - 1)),
        Loop(blocks * strips * passes, fixed_cycles=PASS_CYCLES),
    ]


def _columns(form: Form, isa: Int8Isa) -> int:
    """Tiles of quads in a pass: as many as there are sums for."""
    return min(isa.tiles, SUMS // max(1, form.strip // ROWS))


def _tile_step(form: Form, isa: Int8Isa, quads: float, *, in_l1: bool) -> Loop:
    """One step of one strip, all of its passes; `quads` are fetched."""
    rows, passes = min(form.strip, ROWS), isa.tiles // _columns(form, isa)
    products = isa.tiles * form.strip // rows
    # Channels are read in every pass, and so are indices, one or four of them.
    by_channels = form.cols == 1
    loads = (QUAD + QUAD) * passes if by_channels else isa.tiles + passes
    lines = QUAD * passes if by_channels else isa.tiles
    tiles = isa.tiles * (0 if quads else TILE_QUADS)  # rows that are multiplied where they lie
    return Loop(
        1,
        macs=products * max(rows, LEAST_PRODUCT_ROWS) * isa.lanes * TILE_QUADS * QUAD,
        shuffles=products + TILE_UNPACKS[isa.tiles] * quads * by_channels,
        loads=passes * form.strip + isa.tiles * TILE_QUADS + loads * quads,
        stores=isa.tiles * quads,
        l2_bytes=0 if in_l1 else LINE_BYTES * (tiles + lines * quads + form.strip),
    )


def _epilogue(isa: Int8Isa, width: int, rows: int, epilogue: str) -> list[Loop]:
    """Per row of a chunk: scale and bias, activation, residual, u8; sums through L1 if need be."""
    words = epilogue.split()
    activation, residual, to_u8 = words[0], "residual" in words, words[-1] == "u8"
    in_pieces = not residual and may_take_pieces(activation, isa.lanes)
    form = ("pieces" if in_pieces else "coarse") if to_u8 else "exact"
    work = activation_work(activation, form)
    tiles = isa.tiles
    in_l1 = 0 if isa.columns == tiles and isa.isa is not Isa.AMX else tiles
    others = tiles * (2 + work.others)  # to float, scale and bias
    others += tiles * (2 if to_u8 else 0) + (2 if to_u8 else 0)  # limit, to int; zero point
    others += tiles * residual
    swaps = tiles * 2 * (residual or not to_u8)
    return [
        Loop(
            rows * (width // isa.chunk),
            others=others,
            divides=tiles * work.divides,
            shuffles=swaps + (3 if to_u8 else 0),
            loads=in_l1 + tiles * residual + 2,
            stores=in_l1 + (1 if to_u8 else tiles),
            fixed_cycles=4.0,
        )
    ]
