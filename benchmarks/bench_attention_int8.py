"""Speed of attention with integer products beside fp32 attention, both with u8 results, one core.

    taskset -c 0 python benchmarks/bench_attention_int8.py [--isa avx2] [--mask full]

Every round calls all in turn, the AMX kernel too where the system permits it. Printed are the
best and the median call, the share of the instruction set's multiply-accumulate peak (4 times
the fp32 peak for VNNI, 32 times for AMX: Intel's numbers per cycle) that the best is, and the
median ratio of the fp32 call's time to this one's in the same round.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench_kernels import ATTENTION_SHAPES, peak, peak_of
from single_kernels import Candidate, Library, floats, measure

from sparsec.codegen.isa import AVX2, AVX512, amx
from sparsec.codegen.isa.int8 import AMX_INT8, AVX2_INT8, AVX512_VNNI
from sparsec.codegen.kernels.attention import REGISTER_BLOCKS, Attention
from sparsec.codegen.kernels.attention_int8 import AttentionInt8
from sparsec.codegen.kernels.attention_int8_block import Block
from sparsec.codegen.kernels.panels import WIDTH
from sparsec.ir.dims import evaluate
from sparsec.target import Isa, Target, may_use_tiles

SHAPES = [(1, 32, 4, 64), (1, 384, 4, 64), *ATTENTION_SHAPES]  # batch, seq, heads, head_size
ROUNDS = 60
PEAKS = {AVX512.name: 1, AVX512_VNNI.name: 4, AMX_INT8.name: 32}  # times that of fp32
INT8 = {AVX2.name: [AVX2_INT8], AVX512.name: [AVX512_VNNI, AMX_INT8]}


def candidate(library: Library, kernel: Any, shape: tuple[int, int, int, int]) -> Candidate:
    batch, seq, heads, head_size = shape
    tokens, channels = batch * seq, heads * head_size
    panels = -(-tokens // WIDTH)
    is_int8 = isinstance(kernel, AttentionInt8)
    merged = floats(panels, 3 * channels, WIDTH)
    if is_int8:
        merged = floats(panels * 3 * channels * WIDTH // 4).view(np.uint8)
        merged[...] = np.random.default_rng(0).integers(0, 256, merged.shape)
    y = floats(panels * channels * WIDTH // 4).view(np.uint8)
    offsets = [n for i in range(3) for n in (3 * channels, i * channels)]
    # Scores of about 3 for bytes that are spread evenly, as for the floats.
    scales = [3 / (74 * 74 * head_size**0.5), 0.013] if is_int8 else [head_size**-0.5]
    queries = seq if kernel.mask == "full" else 1
    mask, steps = np.zeros((batch, queries, seq), np.float32), [queries * seq, 0]
    if kernel.mask == "full" or not is_int8:
        steps.append(seq if kernel.mask == "full" else 0)
    sizes = [tokens, seq, heads, head_size, *offsets, *steps]
    args = [merged, merged, merged, mask, y, *sizes, *scales, 50.0, 128]
    if is_int8 and kernel.has_tiles:
        args.append(amx.ALL_FULL)
    block = kernel.block if is_int8 else Block  # which needs more than fp32 does
    scratch = evaluate(block.scratch_bytes(seq, head_size, kernel.mask), {})
    call = library.bind(kernel, args, panels * heads, scratch)
    name = f"{'int8' if is_int8 else 'fp32'} {kernel.isa}"
    return Candidate(name.ljust(15), call, 2 * batch * heads * seq * seq * head_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=INT8, default=AVX512.name, help="of the fp32 kernel")
    parser.add_argument("--mask", choices=("key", "full"), default="key")
    args = parser.parse_args()
    vector = AVX2 if args.isa == AVX2.name else AVX512
    tiles = Target.host().has(Isa.AMX) and may_use_tiles()
    kernels: list[Any] = [Attention(vector, *REGISTER_BLOCKS[vector.lanes][0], args.mask, "u8")]
    kernels += [
        AttentionInt8(isa, args.mask, "u8")
        for isa in INT8[vector.name]
        if tiles or isa is not AMX_INT8
    ]
    with tempfile.TemporaryDirectory() as folder:
        library = Library([peak(vector.name), *kernels], Isa(kernels[-1].isa), Path(folder))
        for shape in SHAPES:
            candidates = [candidate(library, k, shape) for k in kernels]
            measure(candidates, ROUNDS)
            fma = peak_of(library, vector.name)
            for c, kernel in zip(candidates, kernels, strict=True):
                best, most = min(c.seconds), PEAKS.get(kernel.isa, 1) * fma
                pairs = zip(candidates[0].seconds, c.seconds, strict=True)
                ratio = median(a / b for a, b in pairs)
                print(
                    "batch{} seq{} heads{} size{}".format(*shape).ljust(32),
                    f"{c.name}  best {best * 1e6:8.1f} us  median {median(c.seconds) * 1e6:8.1f}"
                    f"  {c.work / best / 1e9:6.1f} G/s ({c.work / best / most:4.0%} of peak)"
                    f"  {ratio:5.2f}x",
                )


if __name__ == "__main__":
    main()
