"""Unstructured zeros and few tokens: the bitmap kernel against the dense one, on one core.

    taskset -c 0 python benchmarks/bench_bitmap.py [--calls 400] [--shape 768x768]

Each kernel goes through copies of its weights that together are many times L2, so that a call
finds them in L3 at best, as in a model. The kernels take turns; printed are the median times of a
call, in microseconds, and the median of the ratios of neighbouring calls.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_int8 import Shape
from single_kernels import Library, aligned

from sparsec.codegen.isa.int8 import AVX512_VNNI
from sparsec.codegen.kernels.int8_bitmap import ROWS, BitmapGemm, pack_bitmap
from sparsec.codegen.kernels.int8_cost import Form
from sparsec.codegen.kernels.int8_epilogue import Epilogue
from sparsec.codegen.kernels.int8_family import forms, kernel_of, pack
from sparsec.codegen.kernels.int8_pack import pack_rows
from sparsec.target import Isa, Target

SHAPES = ["768x768", "3072x768", "768x3072"]
TOKENS = (1, 4, 8, 12, 16)
ZEROS = (0.8, 0.9)
COPIES_BYTES = 12 << 20  # of all copies of a weight
Call = Callable[[], int]


def bitmap(library: Library, shape: Shape, w: Any) -> Call:
    return _calls(library, shape, BitmapGemm.of(shape.epilogue), pack_bitmap(w), ROWS, [], 0)


def usual(library: Library, shape: Shape, w: Any, form: Form) -> Call:
    kernel = kernel_of(form, AVX512_VNNI, shape.epilogue, 16)
    packed = pack(w, form, AVX512_VNNI)
    sizes = [1, *([form.rows // form.strip] if kernel.tall else [])]
    return _calls(library, shape, kernel, packed, form.rows, sizes, packed.most_steps)


def _calls(library: Library, shape: Shape, kernel: Any, packed: Any, rows: int,
           sizes: list[int], steps: int) -> Call:  # fmt: skip
    one = np.ones(shape.m, np.float32)
    per_row = [np.zeros(shape.m, np.int32), one * np.float32(1e-4), one]
    arrays = list(packed.arrays.values())
    copies = -(-COPIES_BYTES // sum(a.nbytes for a in arrays))
    scratch = kernel.scratch_bytes(shape.k, 1, steps)
    bound = []
    for _ in range(copies):
        args = [shape.x, *(aligned(a) for a in arrays), *(pack_rows(r, rows) for r in per_row),
                shape.y, shape.tokens, shape.m, shape.k, *sizes, 1.0, 128]  # fmt: skip
        bound.append(library.bind(kernel, args, -(-shape.m // rows), scratch))
    turns = cycle(bound)
    return lambda: next(turns)()


def seconds(call: Call) -> float:
    start = time.perf_counter()
    assert call() == 0
    return time.perf_counter() - start


def compare(library: Library, shape: Shape, zeros: float, calls: int) -> str:
    w = shape.weight((1, 1), zeros)
    found = {"bitmap": bitmap(library, shape, w)}
    for name, form in all_forms().items():
        found[name] = usual(library, shape, w, form)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(calls):
        for name, call in found.items():
            times[name].append(seconds(call))
    typical = {n: median(t) * 1e6 for n, t in times.items()}
    pairs = zip(times["dense"], times["bitmap"], strict=True)
    ratio = median(dense / other for dense, other in pairs)
    columns = "  ".join(f"{n} {t:7.1f}" for n, t in typical.items())
    size = f"{shape.m}x{shape.k}"
    return f"{size:>9}  {zeros:.0%} zeros  {shape.tokens:2} tokens  {columns}  {ratio:5.2f}x"


def all_forms() -> dict[str, Form]:
    """The dense form, and the best sparse ones for single values: of 1 x 4 and of 4 x 1."""
    dense = forms(None, AVX512_VNNI)[0]
    return {"dense": dense, "1x4": Form(1, 4, 1), "4x1": Form(4, 1, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--shape", action="append", help=f"m x k (default: {SHAPES})")
    args = parser.parse_args()
    if not Target.host().has(Isa.AVX512_VBMI2):
        raise SystemExit("this CPU lacks AVX512-VBMI2")
    epilogue = Epilogue(to_u8=True, is_bounded=True)
    kernels = [BitmapGemm.of(epilogue)]
    kernels += [kernel_of(f, AVX512_VNNI, epilogue, 16) for f in all_forms().values()]
    with tempfile.TemporaryDirectory() as folder:
        library = Library(kernels, Isa.AVX512_VBMI2, Path(folder))
        for size in args.shape or SHAPES:
            m, k = map(int, size.split("x"))
            for zeros in ZEROS:
                for tokens in TOKENS:
                    shape = Shape(m, k, tokens, epilogue)
                    print(compare(library, shape, zeros, args.calls), flush=True)


if __name__ == "__main__":
    main()
