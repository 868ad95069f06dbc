"""How long a kernel of int8_gemm takes, by counting what its inner loops issue.

Counted per step (four channels) of a strip of rows and per panel of 64 tokens:

    AVX512-VNNI             multiply-adds   unpacks    loads
    dense, 6 rows           24              -          4 quads, 6 weights
    quads, r rows           4 r             -          4 quads, r weights, 1 index
    channels, first strip   4 r             8          4 channels, r weights, 4 indices
    channels, other strips  4 r             -          4 quads, r weights

A 512-bit multiply-add goes to port 0 or 5, an unpack to port 5, and there are two loads a cycle
(Intel; on Zen 4 vector work takes twice as long and the order of the candidates is the same).
AVX2 halves the tokens of a vector and multiplies in two steps of two instructions, after it has
split the quads in two, on three ports. Quads that are not in L1 come from L2 at a line in
L2_LINE_CYCLES.

AMX multiplies 16 quads in a step, in passes of four products (int8_tiles). Counted per step:

                            products    cycles of one       unpacks   stores
    dense, 32 rows          8           16                  -         -
    quads, r rows           4 or 8      rows of a tile,     -         64
    channels, first strip   4 or 8      but at least 8      128       64
    other strips            8           16                  -         -

A product is one instruction for port 5, but keeps a unit of its own busy. Tiles are loaded row by
row, beside what is fetched; there is one store of 64 bytes a cycle.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.codegen.isa.amx import ROWS, SUMS
from sparsec.codegen.isa.int8 import AMX_INT8, TILES, Int8Isa
from sparsec.codegen.kernels.int8_pack import QUAD, TILE_QUADS
from sparsec.codegen.kernels.panels import WIDTH
from sparsec.target import Target

L2_LINE_CYCLES = 1.25
STRIP_CYCLES = 30.0  # to fill and drain the pipeline around the loop over steps
ROW_CYCLES = 14.0  # epilogue
UNPACKS = 8
LEAST_PRODUCT_CYCLES = 8
PASS_CYCLES = (
    150.0  # the latency of loads, products and stores of tiles around the loop over steps
)


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


def cycles(
    form: Form, sizes: tuple[int, int], density: float, isa: Int8Isa, target: Target
) -> float:
    """For `sizes` m and k and one panel; `density` is the share of the form's blocks."""
    m, k = sizes
    blocks, strips = -(-m // form.rows), form.rows // form.strip
    if isa is AMX_INT8:
        return _tile_cycles(form, sizes, density, target)
    steps = k / QUAD * density + (0.5 if form.cols == 1 else 0.0)
    in_l1 = k * WIDTH <= target.l1d_bytes
    first = _step(form, isa, first=True, in_l1=in_l1)
    other = _step(form, isa, first=False, in_l1=steps * QUAD * WIDTH <= target.l1d_bytes)
    per_block = steps * (first + (strips - 1) * other) + strips * STRIP_CYCLES
    copy = 0.0 if form.cols == 1 else k / QUAD * UNPACKS
    return copy + blocks * (per_block + form.rows * ROW_CYCLES)


def _tile_cycles(form: Form, sizes: tuple[int, int], density: float, target: Target) -> float:
    m, k = sizes
    blocks, strips = -(-m // form.rows), form.rows // form.strip
    quads = k / QUAD * density
    steps = quads / TILE_QUADS + (0.5 if form.cols else 0.0)
    weight_bytes = quads * QUAD * form.rows
    in_l1 = k * WIDTH + weight_bytes <= target.l1d_bytes
    kept_in_l1 = quads * QUAD * WIDTH + weight_bytes <= target.l1d_bytes
    passes = max(1, form.strip // ROWS)
    first = _tile_step(form, quads / steps if steps else 0.0, fetches=form.cols > 0, in_l1=in_l1)
    other = _tile_step(form, 0.0, fetches=False, in_l1=kept_in_l1)
    per_block = steps * (first + (strips - 1) * other) + strips * passes * PASS_CYCLES
    copy = 0.0 if form.cols == 1 else k / QUAD * UNPACKS
    return copy + blocks * (per_block + form.rows * ROW_CYCLES)


def _tile_step(form: Form, quads: float, *, fetches: bool, in_l1: bool) -> float:
    """Cycles of one step of one strip, of which `quads` are fetched."""
    rows = min(form.strip, ROWS)
    weights = form.strip // rows
    products = SUMS * weights * max(rows, LEAST_PRODUCT_CYCLES)
    loads = float(weights * form.strip + TILES * TILE_QUADS)
    if not fetches:
        from_l2 = (TILES * TILE_QUADS + form.strip) * L2_LINE_CYCLES
        return max(products, loads / 2, 0.0 if in_l1 else from_l2)
    unpacks = UNPACKS * quads if form.cols == 1 else 0.0
    # Channels are read in every pass, and so are indices, one or four of them.
    per_quad = (QUAD + QUAD) * weights if form.cols == 1 else TILES + weights
    loads += per_quad * quads
    lines = TILES * quads * (weights if form.cols == 1 else 1) + form.strip
    traffic = max(loads / 2, TILES * quads, 0.0 if in_l1 else lines * L2_LINE_CYCLES)
    return max(products, unpacks + SUMS * weights, traffic)


def _step(form: Form, isa: Int8Isa, *, first: bool, in_l1: bool) -> float:
    """Cycles of one step of one strip."""
    chunks, passes = WIDTH // isa.chunk, TILES // isa.columns
    whole_register = isa.words_per_quad == 1
    dots = TILES * chunks * form.strip * (1 if whole_register else 4)
    splits = 0 if whole_register else 2 * TILES * chunks
    unpacks = UNPACKS * chunks if form.cols == 1 and first else 0
    indices = {0: 0, 1: QUAD if first else 0, QUAD: 1}[form.cols]
    words = form.strip * isa.words_per_quad * passes
    loads = chunks * (TILES + words + indices)
    vector = (dots + splits + unpacks) / (2 if whole_register else 3)
    lines = 0.0 if in_l1 else TILES * L2_LINE_CYCLES
    return max(vector, float(unpacks), loads / 2, lines)
