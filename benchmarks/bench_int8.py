"""Speed of the int8 kernels on one core, as a share of the measured multiply-add peak.

    taskset -c 0 python benchmarks/bench_int8.py [--isa amx] [--shape 768x768] [--all]

Useful is what the stored blocks need; dense-equivalent is what a dense weight of that size would.
Weights of all candidates of a shape are called in turn, so each finds its own weights in L3 at
best, as in a model; the activations are shared. Printed are the best and the median call.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from single_kernels import Candidate, Library, aligned, measure, peak_rate

from sparsec.codegen.isa.amx import ALL_FULL
from sparsec.codegen.isa.coarse import COARSE
from sparsec.codegen.isa.int8 import AMX_INT8, INT8_ISAS, Int8Isa, int8_isa
from sparsec.codegen.isa.pieces import may_take_pieces, piece_table
from sparsec.codegen.kernels.int8_cost import Form
from sparsec.codegen.kernels.int8_epilogue import SCALED, ActivationForm, Epilogue
from sparsec.codegen.kernels.int8_family import PARAMS, Int8GemmFamily, kernel_of, pack
from sparsec.codegen.kernels.int8_gemm import Int8Gemm
from sparsec.codegen.kernels.int8_pack import pack_rows
from sparsec.codegen.kernels.panels import WIDTH
from sparsec.codegen.probes import Probe, product_probes
from sparsec.codegen.program import Kernel
from sparsec.ir.schedule import Schedule, Workload, buckets
from sparsec.sparse.bsr import block_zeros
from sparsec.target import Isa, Target, required_flags

Array = np.ndarray[Any, Any]
SHAPES = ["768x768", "3072x768", "768x3072", "256x1024", "1024x256"]
SPARSE = [  # block, share of zero blocks
    ((1, 1), 0.8), ((1, 1), 0.9),
    ((4, 1), 0.8), ((4, 1), 0.9), ((16, 1), 0.8), ((16, 1), 0.9), ((32, 1), 0.8), ((32, 1), 0.9),
    ((1, 4), 0.8), ((4, 4), 0.8), ((4, 4), 0.9), ((16, 4), 0.8), ((16, 4), 0.9),
]  # fmt: skip
OUT_SCALE = 1.0
LEVELS = {
    Isa.AVX2: "haswell", Isa.AVX512_VNNI: "icelake-server", Isa.AMX: "sapphirerapids"
}  # fmt: skip


def u8_epilogue(activation: str, isa: Int8Isa) -> Epilogue:
    """As the family has it for results of OUT_SCALE."""
    forms: dict[ActivationForm, bool] = {
        "pieces": may_take_pieces(activation, isa.lanes),
        "coarse": activation in COARSE,
        "steps": activation == "none",
        "exact": True,
    }
    form = next(form for form, fits in forms.items() if fits)
    return Epilogue(activation, to_u8=True, form=form, is_bounded=True)


@dataclass
class Shape:
    """Sizes, and the activations that all candidates read and write."""

    m: int
    k: int
    tokens: int
    epilogue: Epilogue
    x: Array = field(init=False)
    y: Array = field(init=False)

    def __post_init__(self) -> None:
        panels = -(-self.tokens // WIDTH)
        rng = np.random.default_rng(1)
        self.x = aligned(rng.integers(0, 256, (panels, self.k, WIDTH)).astype(np.uint8))
        result = np.uint8 if self.epilogue.to_u8 else np.float32
        self.y = aligned(np.zeros((panels, self.m, WIDTH), result))

    def weight(self, block: tuple[int, int] | None, sparsity: float) -> Array:
        rng = np.random.default_rng(2)
        w = rng.integers(1, 128, (self.m, self.k)).astype(np.int8)
        if block is None:
            return w
        kept = rng.random((-(-self.m // block[0]), -(-self.k // block[1]))) >= sparsity
        return w * np.repeat(np.repeat(kept, block[0], 0), block[1], 1)[: self.m, : self.k]

    def candidate(self, library: Library, kernel: Int8Gemm, form: Form, w: Array, group: int,
                  title: str) -> Candidate:  # fmt: skip
        packed = pack(w, form, kernel.hooks)
        one = np.ones(self.m, np.float32)
        rows = [np.zeros(self.m, np.int32), one * np.float32(1e-4), one]
        weights = [*packed.arrays.values(), *(pack_rows(r, form.rows) for r in rows)]
        sizes = [self.tokens, self.m, self.k, group, *([form.rows // form.strip] * kernel.tall)]
        numbers = [] if self.epilogue.form in SCALED else [1 / OUT_SCALE]
        numbers = [*numbers, 128] if self.epilogue.to_u8 else []
        if self.epilogue.form == "pieces":
            table = piece_table(self.epilogue.activation, OUT_SCALE)
            assert table is not None
            weights.append(table)
        args = [self.x, *(aligned(a) for a in weights), self.y, *sizes, *numbers]
        items = -(-self.m // form.rows) * len(self.x)
        scratch = kernel.scratch_bytes(self.k, group, packed.most_steps)
        work = np.count_nonzero(w) * self.tokens
        return Candidate(title, library.bind(kernel, args, items, scratch), work)


def candidates(shape: Shape, library: Library, isa: Int8Isa, every: bool) -> list[Candidate]:
    """For each weight the family's choice, or all of its schedules in their order."""
    level = Target.named(LEVELS[isa.isa])
    found = []
    for block, sparsity in [(None, 0.0), *SPARSE]:
        calls = of_weight(shape, library, isa, level, block, sparsity)
        found += [call for _, _, call in islice(calls, None if every else 1)]
    return found


def of_weight(
    shape: Shape, library: Library, isa: Int8Isa, target: Target,
    block: tuple[int, int] | None, sparsity: float,
) -> Iterator[tuple[Workload, Schedule, Candidate]]:  # fmt: skip
    """A weight's schedules for `isa` in the order of the family, with a call of each."""
    w = shape.weight(block, sparsity)
    layout = "dense" if block is None else f"bsr{block[0]}x{block[1]}"
    density = 1.0 if block is None else 1.0 - block_zeros(w, (block,))[block]
    sizes, end = (("m", shape.m), ("k", shape.k)), f"{shape.epilogue.activation} u8"
    bucket = next(b for b in buckets() if shape.tokens in b)
    work = Workload("linear_int8", sizes, "u8s8", layout, end, density, bucket)
    for schedule in (s for s in Int8GemmFamily().schedules(work, target) if s.isa == isa.name):
        rows, cols, strip, group, most = (schedule.param(n) for n in PARAMS)
        form = Form(rows, cols, strip)
        kernel = kernel_of(form, isa, shape.epilogue, most)
        title = f"{layout:8} {sparsity:3.0%} zero by {kernel.form:8} {rows:2}"
        yield work, schedule, shape.candidate(library, kernel, form, w, group, title)


def peak_of(library: Library, isa: Int8Isa) -> float:
    """Multiply-accumulates per second."""
    x = aligned(ALL_FULL) if isa is AMX_INT8 else aligned(np.ones(1024, np.float32))
    return peak_rate(library, peak_probe(isa), x)


def peak_probe(isa: Int8Isa) -> Probe:
    """Nothing but independent multiply-adds in registers."""
    return product_probes(required_flags(isa.isa))[f"u8s8.{isa.name}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=[i.name for i in INT8_ISAS])
    parser.add_argument("--shape", action="append", help="m x k, such as 768x3072")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--activation", default="none")
    parser.add_argument("--f32", action="store_true", help="fp32 results instead of u8")
    parser.add_argument("--all", action="store_true", help="all schedules, not only the first")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    host = Target.host()
    best = next(i.name for i in reversed(INT8_ISAS) if host.has(i.isa))
    isa = int8_isa(options.isa or best)
    epilogue = (
        Epilogue(options.activation) if options.f32 else u8_epilogue(options.activation, isa)
    )
    kernels: list[Kernel] = [k for k in Int8GemmFamily().variants()
                             if isinstance(k, Int8Gemm) and k.isa == isa.name
                             and k.epilogue == epilogue]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        library = Library([peak_probe(isa), *kernels], isa.isa, Path(folder))
        peak = peak_of(library, isa)
        print(f"{isa.name}, {epilogue.result}, peak {peak / 1e9:.1f} GMAC/s")
        for text in options.shape or SHAPES:
            m, k = (int(n) for n in text.split("x"))
            shape = Shape(m, k, options.tokens, epilogue)
            found = candidates(shape, library, isa, options.all)
            measure(found, options.rounds)
            peak = max(peak, peak_of(library, isa))
            for c in found:
                useful, middle = c.work / min(c.seconds), c.work / median(c.seconds)
                equivalent = m * k * options.tokens / min(c.seconds)
                print(
                    f"{text:9} {c.name:36} useful {useful / 1e9:6.1f} GMAC/s"
                    f" ({useful / peak:4.0%} of peak, median {middle / peak:4.0%})"
                    f"  dense-equivalent {equivalent / 1e9:7.1f}  {min(c.seconds) * 1e6:8.1f} us"
                )


if __name__ == "__main__":
    main()
