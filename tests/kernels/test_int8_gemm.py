"""int8 GEMM over u8 panels against exact integer sums and one rounding to fp32."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.isa import pieces
from sparsec.codegen.isa.coarse import COARSE, MAX_ERROR
from sparsec.codegen.isa.int8 import INT8_ISAS
from sparsec.codegen.isa.polynomials import ACTIVATIONS
from sparsec.codegen.kernels.int8_bitmap import MOST_TOKENS, BitmapGemm, pack_bitmap
from sparsec.codegen.kernels.int8_cost import Form
from sparsec.codegen.kernels.int8_dots import DotGemm
from sparsec.codegen.kernels.int8_epilogue import SCALED, Epilogue
from sparsec.codegen.kernels.int8_family import Int8GemmFamily, forms, kernel_of, limits, pack
from sparsec.codegen.kernels.int8_gemm import Int8Gemm
from sparsec.codegen.kernels.int8_pack import pack_rows
from sparsec.target import Target

Array = np.ndarray[Any, Any]
ALL = [k for k in Int8GemmFamily().variants() if isinstance(k, Int8Gemm)]
# The loops and the epilogue are independent: every loop nest with these epilogues, and every
# epilogue with one loop nest.
EXACT = [
    Epilogue(has_residual=True, in_place=True),
    Epilogue("relu", has_residual=True, to_u8=True),
    Epilogue(to_u8=True, form="steps", is_bounded=True),
]
VARIANTS = [k for k in ALL if k.epilogue in EXACT and k.isa != "amx"]
# How scales by token are read depends on the instruction set and the height of a block alone.
BY_TOKEN = Epilogue(by_token=True)
VARIANTS += [
    k for k in ALL
    if isinstance(k, DotGemm) and k.epilogue == BY_TOKEN
    and (k.form == "dense" or (k.tall and k._gathers))
]  # fmt: skip
# Emulated tiles are slow: every loop nest of AMX with one of these epilogues, in turn.
NESTS = dict.fromkeys((k.form, k.strip, k.tall) for k in ALL if k.isa == "amx")
TURNS = [*EXACT, BY_TOKEN]
VARIANTS += [
    k
    for i, nest in enumerate(NESTS)
    for k in ALL
    if (k.form, k.strip, k.tall, k.isa, k.epilogue) == (*nest, "amx", TURNS[i % len(TURNS)])
]
# AMX shares the code of its epilogues with AVX512-VNNI.
SOME = [k for k in ALL if k.form == "dense" and k.isa != "amx" and k.most_tokens is None]
SIZES = [1, 3, 4, 5, 6, 7, 31, 32, 33, 64]
TOKENS = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 130]
DENSITIES = [0.0, 0.1, 0.5, 1.0]


@dataclass
class Layer:
    """Everything that `linear_int8` is given. `block` is where the zeros of w lie."""

    size: tuple[int, int, int]
    density: float = 1.0
    block: tuple[int, int] = (1, 1)
    zero_point: int = 119
    out_scale: float = 0.37
    out_zero_point: int = 101
    seed: int = 0
    arrays: dict[str, Array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tokens, m, k = self.size
        rng = np.random.default_rng([*self.size, int(self.density * 10), self.seed])
        rows, cols = self.block
        kept = rng.random((-(-m // rows), -(-k // cols))) < self.density
        mask = np.repeat(np.repeat(kept, rows, 0), cols, 1)[:m, :k]
        self.arrays = {
            "x": rng.integers(0, 256, (tokens, k)).astype(np.uint8),
            "w": (rng.integers(-128, 128, (m, k)) * mask).astype(np.int8),
            "multiplier": rng.uniform(0.001, 0.003, m).astype(np.float32),
            "bias": rng.standard_normal(m).astype(np.float32),
            "residual": (10 * rng.standard_normal((tokens, m))).astype(np.float32),
            "token_scale": rng.uniform(0.1, 1.5, (tokens, 1)).astype(np.float32),
        }

    def sums(self) -> Array:
        a = self.arrays
        total = (a["x"].astype(np.int64) - self.zero_point) @ a["w"].astype(np.int64).T
        return np.asarray(total)

    def linear(self, by_token: bool = False, factor: float = 1.0) -> Array:
        """sum * multiplier + bias, rounded once: the 64 bits of a long double hold it all.

        Both are multiplied by `factor` before.
        """
        sums = self.sums().astype(np.float32)
        sums = sums * self.arrays["token_scale"] if by_token else sums
        multiplier, bias = (self.arrays[n] * np.float32(factor) for n in ("multiplier", "bias"))
        y = sums.astype(np.longdouble) * multiplier + bias
        return np.asarray(y.astype(np.float32))

    def in_pieces(self, table: Array) -> Array:
        """The result of an epilogue in pieces, to the bit."""
        units = np.rint(self.linear(factor=pieces.units(table, self.out_scale)))
        steps = pieces.evaluate(np.clip(units, -(2**15), 2**15 - 1), table)
        return np.clip(steps + self.out_zero_point, 0, 255).astype(np.uint8)

    def result(self, epilogue: Epilogue) -> Array:
        if epilogue.form == "steps":
            return self.clipped(self.linear(factor=self.inverse))
        wide = self.linear(epilogue.by_token).astype(np.float64)
        y = REFERENCES[epilogue.activation](wide).astype(np.float32)
        if epilogue.has_residual:
            y = y + self.arrays["residual"]
        return self.stored(y) if epilogue.to_u8 else np.asarray(y)

    def table(self, epilogue: Epilogue) -> Array | None:
        if epilogue.form != "pieces":
            return None
        return pieces.piece_table(epilogue.activation, self.out_scale)

    def factor(self, epilogue: Epilogue) -> np.float32:
        """What the kernel's multiplier and bias are multiplied by."""
        table = self.table(epilogue)
        if table is not None:
            return np.float32(pieces.units(table, self.out_scale))
        return self.inverse if epilogue.form == "steps" else np.float32(1)

    def stored(self, y: Array) -> Array:
        return self.clipped(y * self.inverse)

    def clipped(self, steps: Array) -> Array:
        return np.asarray(np.clip(np.rint(steps) + self.out_zero_point, 0, 255).astype(np.uint8))

    @property
    def inverse(self) -> np.float32:
        return np.float32(1) / np.float32(self.out_scale)


_erf = np.vectorize(math.erf, otypes=[np.float64])
REFERENCES = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def fitting(kernel: Int8Gemm, tokens: int) -> int:
    """As many tokens as the kernel takes, up to `tokens`."""
    return min(tokens, kernel.most_tokens or tokens)


def rows_of(kernel: Int8Gemm) -> int:
    return kernel.strip * (3 if kernel.tall else 1)


def form_of(kernel: Int8Gemm) -> Form:
    cols = {"dense": 0, "channels": 1, "quads": 4}[kernel.form]
    return Form(rows_of(kernel), cols, kernel.strip)


def call(run: Any, kernel: Int8Gemm, layer: Layer, *, group: int = 2, splits: int = 3) -> Array:
    (tokens, m, k), a, rows = layer.size, layer.arrays, rows_of(kernel)
    is_bitmap = isinstance(kernel, BitmapGemm)
    packed = pack_bitmap(a["w"]) if is_bitmap else pack(a["w"], form_of(kernel), kernel.hooks)
    offset = (-layer.zero_point * a["w"].astype(np.int64).sum(1)).astype(np.int32)
    panels = -(-tokens // 64)
    epilogue = kernel.epilogue
    y = np.full((panels, m, 64), 99, np.uint8 if epilogue.to_u8 else np.float32)
    y = run.to_panels(a["residual"]) if epilogue.in_place else y
    table = layer.table(epilogue)
    factor = layer.factor(epilogue)
    per_row = [offset, a["multiplier"] * factor, a["bias"] * factor]
    residual = [run.to_panels(a["token_scale"])] if epilogue.by_token else []
    if epilogue.has_residual and not epilogue.in_place:
        residual.append(run.to_panels(a["residual"]))
    residual += [] if table is None else [table]
    sizes = [tokens, m, k, *([] if is_bitmap else [group])]
    sizes += [rows // kernel.strip] if kernel.tall else []
    numbers = [] if epilogue.form in SCALED else [float(layer.inverse)]
    numbers = [*numbers, layer.out_zero_point] if epilogue.to_u8 else []
    starts = [pack_rows(v, rows) for v in per_row]
    pointers = [run.to_panels(a["x"]), *packed.arrays.values(), *starts, *residual, y]
    status = run(
        kernel, *pointers, *sizes, *numbers,
        output=y, items=-(-m // rows) * panels, splits=splits,
        scratch_bytes=kernel.scratch_bytes(k, group, 0 if is_bitmap else packed.most_steps),
    )  # fmt: skip
    assert status == 0
    if not (epilogue.has_residual or epilogue.by_token):
        assert np.isfinite(y).all(), "lanes past the last token"
    return np.asarray(run.from_panels(y, tokens))


def check(run: Any, kernel: Int8Gemm, layer: Layer, **options: int) -> None:
    expected = layer.result(kernel.epilogue)
    np.testing.assert_array_equal(call(run, kernel, layer, **options), expected, str(layer))


def test_sizes_at_the_edges_of_blocks(kernel: Int8Gemm, run: Any) -> None:
    """Every pair of m and k, and over them every number of tokens and density."""
    block = (rows_of(kernel), 4 if kernel.form == "quads" else 1)
    for (a, m), (b, k) in product(enumerate(SIZES), enumerate(SIZES)):
        tokens = fitting(kernel, TOKENS[(3 * a + b) % len(TOKENS)])
        density = DENSITIES[(a + b // 2) % len(DENSITIES)]
        check(run, kernel, Layer((tokens, m, k), density, block), group=1 + (a + b) % 2)


@pytest.mark.isa("avx512vbmi2")
@pytest.mark.parametrize("epilogue", [BY_TOKEN, EXACT[1]], ids=["bytoken", "u8"])
def test_bitmaps_take_every_number_of_tokens(epilogue: Epilogue, run: Any) -> None:
    """A last block of rows that is not full, and in it a group that is not."""
    for tokens in range(1, MOST_TOKENS + 1):
        check(run, BitmapGemm.of(epilogue), Layer((tokens, 80 + tokens, 83), 0.2))


def test_a_model_sized_layer(kernel: Int8Gemm, run: Any) -> None:
    block = (rows_of(kernel), 4 if kernel.form == "quads" else 1)
    layer = Layer((fitting(kernel, 200), 100, 384), 0.2, block)
    layer.arrays["w"][24:48] = 0  # block rows without a block
    check(run, kernel, layer, group=3)


def test_item_splits_give_the_same_bits(kernel: Int8Gemm, run: Any) -> None:
    layer = Layer((fitting(kernel, 300), 70, 50), 0.4, (4, 1))
    parts = [call(run, kernel, layer, splits=n, group=g) for n, g in ((1, 2), (2, 5), (7, 1))]
    for part in parts[1:]:
        np.testing.assert_array_equal(part, parts[0])


def test_extreme_operands_are_exact(kernel: Int8Gemm, run: Any) -> None:
    """Sums at the ends of what u8 and int8 can make: pairs of products leave int16."""
    layer = Layer((fitting(kernel, 20), 36, 64), zero_point=255)
    for x, w in product((0, 255), (-128, 127)):
        layer.arrays["x"][...], layer.arrays["w"][...] = x, w
        check(run, kernel, layer)


@pytest.mark.parametrize("out_zero_point", [0, 128, 255])
def test_ties_and_clamps(kernel: Int8Gemm, run: Any, out_zero_point: int) -> None:
    """Scales are powers of two, so that an eighth of the results lies between two steps."""
    layer = Layer((fitting(kernel, 65), 24, 33), 0.5, out_scale=0.5, out_zero_point=out_zero_point)
    a = layer.arrays
    a["multiplier"][:] = 2.0**-4 / 64
    a["bias"][:] = np.arange(24) / 4
    a["residual"][...] = np.round(a["residual"])
    a["x"][:, 1:] = layer.zero_point  # sums of one product each: multiples of 64
    a["w"][:, 0] = 64
    scaled = layer.linear() * layer.inverse
    assert ((scaled * 2 % 2) == 1).mean() > 0.05, "no ties"
    a["bias"][18], a["bias"][19] = 2e6, -2e6  # results outside int16
    if not kernel.epilogue.is_bounded:
        a["multiplier"][20] = 1e12  # results outside int32, both signs
        a["multiplier"][21] = 2.0**100
        a["bias"][22], a["bias"][23] = 1e38, -1e38
    check(run, kernel, layer)


def test_large_sums_round_once_on_the_way_to_fp32(kernel: Int8Gemm, run: Any) -> None:
    layer = Layer((fitting(kernel, 17), 5, 1500), zero_point=0)
    layer.arrays["w"][...] = np.abs(layer.arrays["w"].astype(int)) // 2 + 63
    assert (layer.sums() > 2**24).any()
    check(run, kernel, layer)


def test_every_epilogue(some_kernel: Int8Gemm, run: Any) -> None:
    layer = Layer((70, 13, 40), out_scale=0.043, out_zero_point=17)
    epilogue, y = some_kernel.epilogue, call(run, some_kernel, layer)
    expected = layer.result(epilogue)
    if (table := layer.table(epilogue)) is not None:
        np.testing.assert_array_equal(y, layer.in_pieces(table))
    elif epilogue.to_u8:
        # The kernel's activation is not rounded as the reference's: a step apart, and seldom.
        apart = np.abs(y.astype(int) - expected.astype(int))
        assert apart.max() <= (0 if epilogue.activation in ("none", "relu") else 1)
        assert (apart > 0).mean() < 0.01
    else:
        # Activations are good to 1e-6 max(1, |x|); adding the residual rounds once more.
        size = np.abs(layer.linear(epilogue.by_token))
        bound = 2e-6 * np.maximum(1, size) + 2e-7 * np.abs(expected)
        assert (np.abs(y - expected) <= bound).all()


def test_variants_are_all_that_schedules_ask_for() -> None:
    names = {k.name for k in ALL}
    assert len(names) == len(ALL)
    for isa in INT8_ISAS:
        asked = [f for block in (None, (1, 1), (4, 1), (32, 1), (16, 4), (7, 3))
                 for f in forms(block, isa)]  # fmt: skip
        for form, activation, most in product(asked, ACTIVATIONS, (0, *limits(isa))):
            assert kernel_of(form, isa, Epilogue(activation), most).name in names


def test_coarse_activations_stay_in_their_bound(run: Any) -> None:
    """As fp32 results, which no schedule asks for."""
    k = 64
    for isa, activation in product(INT8_ISAS, COARSE):
        if not Target.host().has(isa.isa):
            continue
        layer = Layer((3000, 1, k), zero_point=128)
        layer.arrays["w"][...] = 0
        layer.arrays["w"][0, :2] = 127, 1
        layer.arrays["multiplier"][:] = 9 / 2**14
        layer.arrays["bias"][:] = 0
        (form,) = forms(None, isa)
        y = call(run, kernel_of(form, isa, Epilogue(activation, form="coarse")), layer)
        exact = REFERENCES[activation](layer.linear().astype(np.float64))
        assert np.abs(layer.linear()).max() > 8
        assert np.abs(y - exact).max() < MAX_ERROR
