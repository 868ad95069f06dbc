"""How well the cost model predicts: expected against measured time over a sample of kernels.

    taskset -c 0 python benchmarks/bench_cost.py [--rounds 15] [--worst 12] [--isa avx2]

The machine is calibrated first. All kernels of a shape are called in turn; a time is the best
call. Printed are Spearman's rank correlation and the mean error |expected / measured - 1| per
family and over all, and where the model is most wrong. Goals: above 0.95, below 25 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import bench_attention_int8
import bench_int8
import bench_kernels
import numpy as np
from single_kernels import Library

from sparsec.codegen.isa import VECTOR_ISAS, vector_isas
from sparsec.codegen.isa.int8 import INT8_ISAS
from sparsec.codegen.kernels.attention import REGISTER_BLOCKS, Attention, AttentionFamily
from sparsec.codegen.kernels.attention_int8 import AttentionInt8, AttentionInt8Family
from sparsec.codegen.kernels.costs import Shape
from sparsec.codegen.kernels.dense_gemm import DenseGemm, DenseGemmFamily
from sparsec.codegen.kernels.int8_family import Int8GemmFamily
from sparsec.codegen.kernels.layer_norm import RESULTS, LayerNorm
from sparsec.ir.schedule import Schedule, Workload
from sparsec.models.compress.metrics import spearman
from sparsec.target import Isa, Target
from sparsec.tuning.cost import expected_seconds
from sparsec.tuning.machine import measure as measure_machine

INT8_SHAPES = [(768, 768), (3072, 768), (768, 3072), (256, 1024), (1024, 256)]
INT8_TOKENS = (32, 128, 384)
WEIGHTS = [  # block, share of zero blocks
    (None, 0.0), ((4, 1), 0.8), ((4, 1), 0.9), ((16, 1), 0.7), ((16, 1), 0.8), ((16, 1), 0.9),
    ((32, 1), 0.8), ((32, 1), 0.9), ((16, 4), 0.8), ((16, 4), 0.9),
]  # fmt: skip
ACTIVATIONS = ("none", "gelu")


@dataclass
class Sample:
    """A kernel on some data, and its expected time."""

    family: str
    title: str
    candidate: Any
    expected: float

    @property
    def measured(self) -> float:
        return float(min(self.candidate.seconds))


def expected(work: Workload, schedule: Schedule, shape: Shape, target: Target) -> float:
    found = expected_seconds(work, schedule, shape, target)
    assert found is not None, schedule
    return found


def int8_samples(target: Target, isa: Any, folder: Path) -> Iterator[list[Sample]]:
    for activation in ACTIVATIONS:
        end = bench_int8.u8_epilogue(activation, isa)
        kernels = [k for k in Int8GemmFamily().variants()
                   if (k.isa, getattr(k, "epilogue", None)) == (isa.name, end)]  # fmt: skip
        place = folder / activation
        place.mkdir()
        library = Library(kernels, isa.isa, place)
        for m, k in INT8_SHAPES if activation == "none" else INT8_SHAPES[:2]:
            for tokens in INT8_TOKENS:
                shape = bench_int8.Shape(m, k, tokens, end)
                yield [s for block, zeros in WEIGHTS
                       for s in int8_layer(target, isa, library, shape, block, zeros)]  # fmt: skip


def int8_layer(
    target: Target, isa: Any, library: Any, shape: Any, block: Any, zeros: float
) -> list[Sample]:
    """The first schedules of a weight, three at most."""
    found = []
    calls = bench_int8.of_weight(shape, library, isa, target, block, zeros)
    for work, schedule, candidate in islice(calls, 3):
        by = f"{schedule.param('rows')}x{schedule.param('cols')}"
        size = f"{shape.m}x{shape.k}x{shape.tokens}"
        title = f"{size} {work.layout} {zeros:.0%} {work.epilogue} by {by}"
        time = expected(work, schedule, Shape(1, shape.tokens), target)
        found.append(Sample("int8_gemm", title, candidate, time))
    return found


def f32_samples(target: Target, isa: str, folder: Path) -> Iterator[list[Sample]]:
    kernels = [k for k in bench_kernels.kernels_of(isa)
               if isinstance(k, DenseGemm | Attention | LayerNorm)]  # fmt: skip
    library = Library(kernels, Isa(isa), folder)
    for m, k, tokens in bench_kernels.GEMM_SHAPES:
        work = Workload("linear", (("m", m), ("k", k)), "f32", epilogue="none")
        found = []
        for s in DenseGemmFamily().schedules(work, target):
            if s.isa == isa:
                mr, strips, nv, kc, group = (v for _, v in s.params)
                kernel = DenseGemm(VECTORS[isa], mr, strips, nv, "none", False)
                candidate = bench_kernels.gemm(library, kernel, (m, k, tokens), kc, group)
                time = expected(work, s, Shape(1, tokens), target)
                title = f"{m}x{k}x{tokens} {candidate.name}"
                found.append(Sample("dense_gemm", title, candidate, time))
        yield found
    for shape in bench_kernels.ATTENTION_SHAPES:
        yield [attention_sample(target, isa, library, shape, mask, *block)
               for mask in ("none", "key")
               for block in REGISTER_BLOCKS[VECTORS[isa].lanes]]  # fmt: skip
    for channels in (256, 384, 768, 1024):
        yield [norm_sample(target, isa, library, channels, residual, result)
               for residual in (False, True) for result in RESULTS]  # fmt: skip


VECTORS = {v.name: v for v in VECTOR_ISAS}


def attention_sample(
    target: Target, isa: str, library: Any, size: Any, mask: str, groups: int, rows: int
) -> Sample:
    batch, seq, heads, head_size = size
    kernel = Attention(VECTORS[isa], groups, rows, mask)
    candidate = bench_kernels.attention(library, kernel, size)
    sizes = (("heads", heads), ("head_size", head_size))
    work = Workload("attention", sizes, "f32", epilogue=f"mask {mask}")
    schedule = next(
        s for s in AttentionFamily().schedules(work, target)
        if (s.isa, s.params) == (isa, (("groups", groups), ("rows", rows)))
    )  # fmt: skip
    title = "{}x{} {} heads of {}".format(*size) + f" mask {mask} {groups}x{rows}"
    time = expected(work, schedule, Shape(batch, seq), target)
    return Sample("attention", title, candidate, time)


def norm_sample(
    target: Target, isa: str, library: Any, channels: int, residual: bool, result: str
) -> Sample:
    kernel = LayerNorm(VECTORS[isa], residual, True, result)
    candidate = bench_kernels.layer_norm(library, kernel, channels)
    end = ["residual"] * residual + ["beta"] + ([] if result == "f32" else ["to", result])
    work = Workload("layer_norm", (("c", channels),), "f32", epilogue=" ".join(end))
    time = expected(work, Schedule("layer_norm", isa), Shape(1, 128), target)
    return Sample("layer_norm", f"{channels}x128 {work.epilogue}", candidate, time)


def int8_attention_samples(target: Target, isa: Any, folder: Path) -> Iterator[list[Sample]]:
    kernel = AttentionInt8(isa, "key", "u8")
    library = Library([kernel], isa.isa, folder)
    for size in bench_attention_int8.SHAPES:
        batch, seq, heads, head_size = size
        sizes = (("heads", heads), ("head_size", head_size))
        work = Workload("attention_int8", sizes, "u8", epilogue="mask key to u8")
        found = AttentionInt8Family().schedules(work, target)
        schedule = next(s for s in found if s.isa == isa.name)
        candidate = bench_attention_int8.candidate(library, kernel, size)
        time = expected(work, schedule, Shape(batch, seq), target)
        title = "{}x{} {} heads of {}".format(*size)
        yield [Sample("attention_int8", title, candidate, time)]


def samples(target: Target, folder: Path) -> Iterator[list[Sample]]:
    """Of the best instruction sets that the target has."""
    vector = vector_isas(target)[0]
    int8 = next(i for i in reversed(INT8_ISAS) if target.has(i.isa))
    for name, found in (
        ("int8", int8_samples), ("int8_attention", int8_attention_samples), ("f32", f32_samples),
    ):  # fmt: skip
        place = folder / name
        place.mkdir()
        yield from found(target, vector.name if name == "f32" else int8, place)


def measure(candidates: list[Any], rounds: int) -> None:
    """Fills in `seconds`, in turns: of this thread, so that a busy machine does not count."""
    for index in range(rounds + 1):
        for c in candidates:
            start = time.thread_time()
            c.call()
            if index:
                c.seconds.append(time.thread_time() - start)


def report(name: str, found: list[Sample]) -> None:
    times, guesses = [s.measured for s in found], [s.expected for s in found]
    ratios = np.array(guesses) / np.array(times)
    bias = float(np.exp(np.log(ratios).mean()))
    print(
        f"{name:15} {len(found):4} kernels  rank correlation {spearman(times, guesses):.3f}"
        f"  mean error {np.abs(ratios - 1).mean():4.0%}  expected / measured {bias:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--worst", type=int, default=12, help="how many to print")
    parser.add_argument("--isa", choices=[i.isa.value for i in INT8_ISAS], help="use no better")
    parser.add_argument("--only", help="a family")
    parser.add_argument("--dump", type=Path, help="a JSON file for all of them")
    options = parser.parse_args()
    host = Target.host()
    rates = measure_machine(host, lambda stage: None)
    limit = Isa(options.isa) if options.isa else None
    target = replace(host.limited(limit), rates=rates)
    print(f"{rates.hertz / 1e9:.2f} GHz, {dict(rates.products)}, GB/s "
          f"{[round(b / 1e9) for b in rates.bandwidth]}")  # fmt: skip
    for bits, ports in rates.ports:
        print(f"{bits} bits: {ports}")
    found: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        for group in samples(target, Path(folder)):
            group = [s for s in group if options.only in (None, s.family)]
            measure([s.candidate for s in group], options.rounds)
            found += group
    for family in dict.fromkeys(s.family for s in found):
        report(family, [s for s in found if s.family == family])
    report("all", found)
    if options.dump:
        rows = [[s.family, s.title, s.expected, s.measured] for s in found]
        options.dump.write_text(json.dumps(rows))
    wrong = sorted(found, key=lambda s: -abs(np.log(s.expected / s.measured)))
    for s in wrong[: options.worst]:
        print(
            f"  {s.family:14} {s.title:55} expected {s.expected * 1e6:9.1f} us"
            f"  measured {s.measured * 1e6:9.1f} us  ({s.expected / s.measured:.2f})"
        )


if __name__ == "__main__":
    main()
