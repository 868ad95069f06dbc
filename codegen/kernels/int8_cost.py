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
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.codegen.isa.int8 import TILES, Int8Isa
from sparsec.codegen.kernels.int8_pack import QUAD
from sparsec.codegen.kernels.panels import WIDTH
from sparsec.target import Target

L2_LINE_CYCLES = 1.25
STRIP_CYCLES = 30.0  # to fill and drain the pipeline around the loop over steps
ROW_CYCLES = 14.0  # epilogue
UNPACKS = 8


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
    steps = k / QUAD * density + (0.5 if form.cols == 1 else 0.0)
    in_l1 = k * WIDTH <= target.l1d_bytes
    first = _step(form, isa, first=True, in_l1=in_l1)
    other = _step(form, isa, first=False, in_l1=steps * QUAD * WIDTH <= target.l1d_bytes)
    per_block = steps * (first + (strips - 1) * other) + strips * STRIP_CYCLES
    copy = 0.0 if form.cols == 1 else k / QUAD * UNPACKS
    return copy + blocks * (per_block + form.rows * ROW_CYCLES)


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
