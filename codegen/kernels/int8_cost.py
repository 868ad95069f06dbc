"""What a kernel of int8_gemm issues.

Counted per step (four channels) of a strip of rows and per panel of 64 tokens:

    AVX512-VNNI             multiply-adds   unpacks    loads
    dense, 6 rows           24              -          4 quads, 6 weights
    quads, r rows           4 r             -          4 quads, r weights, 1 index
    channels, first strip   4 r             8          4 channels, r weights, 4 indices
    channels, other strips  4 r             -          4 quads, r weights

AVX2 halves the tokens of a vector and multiplies in two steps of two instructions, after it has
split the quads in two. Quads that are not in L1 come from L2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsec.codegen.isa.int8 import TILES, Int8Isa, int8_isa
from sparsec.codegen.isa.work import activation_work
from sparsec.codegen.kernels.counts import Counts, Loop, total_cycles
from sparsec.codegen.kernels.int8_pack import QUAD
from sparsec.codegen.kernels.panels import WIDTH
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Target

STRIP_CYCLES = 40.0  # to start and end the loop over steps: sums in, sums out, one misprediction
UNPACKS = 8
GRAIN_MACS = 1 << 15  # per token: about 10 us on one core


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


def grain(form: Form, k: int, density: float) -> int:
    """Least number of items worth a worker."""
    return max(1, int(GRAIN_MACS / max(1.0, form.rows * k * density)))


def cycles(
    form: Form, sizes: tuple[int, int], density: float, isa: Int8Isa, target: Target
) -> float:
    """For `sizes` m and k and one panel; `density` is the share of the form's blocks."""
    return total_cycles(_counts(form, sizes, density, isa, target, WIDTH, 1, "none u8"), target)


def counts(workload: Workload, schedule: Schedule, tokens: int, target: Target) -> Counts:
    """Of a schedule of Int8GemmFamily."""
    form = Form(*(schedule.param(n) for n in ("rows", "cols", "strip")))
    density = block_density(workload.density, block_of(workload.layout) or (1, 1), form)
    sizes = (workload.size("m"), workload.size("k"))
    isa, group = int8_isa(schedule.isa), schedule.param("group")
    return _counts(form, sizes, density, isa, target, tokens, group, workload.epilogue)


def block_of(layout: str) -> tuple[int, int] | None:
    """`bsr16x4` as (16, 4)."""
    if not layout.startswith("bsr"):
        return None
    rows, cols = layout.removeprefix("bsr").split("x")
    return int(rows), int(cols)


def _counts(
    form: Form, sizes: tuple[int, int], density: float, isa: Int8Isa, target: Target,
    tokens: int, group: int, epilogue: str,
) -> Counts:  # fmt: skip
    m, k = sizes
    blocks, panels = -(-m // form.rows), -(-tokens // WIDTH)
    groups = -(-panels // group)
    steps = -(-k // QUAD) * density + (0.5 if form.cols == 1 else 0.0)
    loops: list[Loop] = []
    whole, left = divmod(tokens, WIDTH)
    parts = [(isa, whole, WIDTH)] if whole else []
    if left:
        parts.append(_last_panel(isa, left))
    for hooks, times, width in parts:
        loops += [*_panel(form, k, steps, hooks, target, width, blocks, times)]
        loops += _epilogue(hooks, width, m * times, epilogue)
    words = steps * form.rows * isa.words_per_quad * 4 * blocks
    indices = steps * blocks * {0: 0, 1: 2 * QUAD, QUAD: 2}[form.cols]
    weights = words + indices
    return Counts(
        product=f"u8s8.{isa.name}",
        bits=32 * isa.lanes,
        loops=tuple(loops),
        items=blocks * groups,
        grain=grain(form, k, density),
        streams=((weights * groups, max(weights, target.l2_bytes)),),
    )


def _last_panel(isa: Int8Isa, tokens: int) -> tuple[Int8Isa, int, int]:
    """The hooks of a panel that is not full, how many there are, and the tokens it computes."""
    if isa.narrow is not None:
        narrow = tokens <= isa.narrow.chunk
        return (isa.narrow, 1, isa.narrow.chunk) if narrow else (isa, 1, WIDTH)
    return isa, 1, -(-tokens // isa.chunk) * isa.chunk


def _panel(
    form: Form, k: int, steps: float, isa: Int8Isa, target: Target, width: int,
    blocks: int, panels: int,
) -> list[Loop]:  # fmt: skip
    """The sums of all blocks of rows for `panels` panels of `width` tokens."""
    chunks, strips = width // isa.chunk, form.rows // form.strip
    together = min(strips, TILES // isa.tiles)  # strips in one register block
    turns = -(-strips // together)
    rounds = blocks * panels * chunks
    in_l1 = k * isa.chunk <= target.l1d_bytes // 2
    kept_in_l1 = steps * QUAD * isa.chunk <= target.l1d_bytes // 2
    loops = []
    if form.cols != 1:
        quads = -(-k // QUAD)
        loops.append(Loop(quads * panels * chunks, shuffles=UNPACKS, loads=QUAD,
                          stores=isa.tiles, l2_bytes=QUAD * isa.chunk))  # fmt: skip
    first = _step(form, isa, together, first=True, in_l1=in_l1)
    other = _step(form, isa, together, first=False, in_l1=kept_in_l1)
    gathers = form.cols == 1 and isa.columns < isa.tiles  # a loop of its own before all strips
    if gathers:
        loops.append(Loop(rounds * steps, shuffles=UNPACKS, loads=2 * QUAD, stores=isa.tiles,
                          l2_bytes=0 if in_l1 else QUAD * isa.chunk))  # fmt: skip
        first = other
    loops.append(replace(first, times=rounds * steps))
    if turns > 1:
        loops.append(replace(other, times=rounds * steps * (turns - 1)))
    passes = isa.tiles // isa.columns
    loops.append(Loop(rounds * turns * passes, fixed_cycles=STRIP_CYCLES))
    return loops


def _step(form: Form, isa: Int8Isa, together: int, *, first: bool, in_l1: bool) -> Loop:
    """One step of one register block of one chunk, all of its column passes."""
    rows, passes, words = form.strip * together, isa.tiles // isa.columns, isa.words_per_quad
    unpacks = form.cols == 1 and first and isa.columns == isa.tiles
    return Loop(
        1,
        macs=isa.chunk * QUAD * rows,
        shuffles=UNPACKS if unpacks else 0,
        others=0 if words == 1 else 2 * isa.tiles,
        loads=isa.tiles + {0: 0, 1: QUAD if unpacks else 0, QUAD: passes}[form.cols],
        broadcasts=rows * words * passes,
        stores=isa.tiles if unpacks and form.rows > form.strip else 0,
        l2_bytes=0 if in_l1 else isa.chunk * QUAD,
        chain_cycles=4.0 * passes if rows * isa.columns < 8 else 0.0,
    )


def _epilogue(isa: Int8Isa, width: int, rows: int, epilogue: str) -> list[Loop]:
    """Per row of a chunk: sums through L1, scale and bias, activation, residual, u8."""
    words = epilogue.split()
    activation, residual, to_u8 = words[0], "residual" in words, words[-1] == "u8"
    work = activation_work(activation, coarse=to_u8)
    tiles = isa.tiles
    others = tiles * (2 + work.others)  # to float, scale and bias
    others += tiles * (3 if to_u8 else 0) + (2 if to_u8 else 0)  # scale, limit, to int; zero point
    others += tiles * residual
    swaps = tiles * 2 * (residual or not to_u8)
    return [
        Loop(
            rows * (width // isa.chunk),
            others=others,
            divides=tiles * work.divides,
            shuffles=swaps + (3 if to_u8 else 0),
            loads=tiles * (1 + residual) + 2,
            stores=tiles + (1 if to_u8 else tiles),
            fixed_cycles=4.0,
        )
    ]
