"""Speed of single kernels on one core, as a share of the measured fused-multiply-add peak.

    taskset -c 0 python benchmarks/bench_kernels.py [--isa avx512] [--only dense_gemm]

Every round calls all candidates of a shape in turn, ONNX Runtime's MatMul among them when it is
installed, so that noise of the machine hits all alike. Printed are the best and the median call.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from single_kernels import Candidate, Library, floats, measure, peak_rate

from sparsec.codegen.isa import VECTOR_ISAS, by_name, vector_isas
from sparsec.codegen.kernels import FAMILIES
from sparsec.codegen.kernels.attention import Attention, AttentionFamily
from sparsec.codegen.kernels.dense_gemm import DenseGemm, DenseGemmFamily
from sparsec.codegen.kernels.embedding import Embedding
from sparsec.codegen.kernels.int8_gemm import Int8Gemm
from sparsec.codegen.kernels.layer_norm import RESULTS, LayerNorm
from sparsec.codegen.kernels.layout_change import LayoutChange
from sparsec.codegen.kernels.panels import GROUP, WIDTH
from sparsec.codegen.kernels.pointwise import CHUNK, Pointwise
from sparsec.codegen.kernels.quantize import CHUNK as QUANTIZE_CHUNK
from sparsec.codegen.kernels.quantize import Requantise
from sparsec.codegen.probes import Probe, product_probes
from sparsec.codegen.program import Kernel
from sparsec.ir.schedule import Workload
from sparsec.ir.types import DType
from sparsec.target import Isa, Target

Array = np.ndarray[Any, Any]
# The families that `cases` has; int8 products and attention have benchmarks of their own.
TIMED = (
    "dense_gemm",
    "attention",
    "layout_change",
    "embedding",
    "layer_norm",
    "quantize",
    "pointwise",
)
GEMM_SHAPES = [  # m, k, tokens
    (256, 256, 128), (768, 256, 128), (1024, 256, 128), (256, 1024, 128),
    (384, 1536, 128), (1536, 384, 128),
    (768, 768, 128), (2304, 768, 128), (3072, 768, 128), (768, 3072, 128),
    (768, 768, 32), (768, 3072, 32), (3072, 768, 384), (768, 3072, 384), (768, 768, 1024),
    (768, 768, 1), (768, 768, 7),
]  # fmt: skip
ATTENTION_SHAPES = [  # batch, seq, heads, head_size
    (1, 128, 4, 64), (1, 128, 12, 32), (1, 128, 12, 64), (1, 384, 12, 64), (1, 384, 12, 32),
    (1, 512, 12, 64), (8, 33, 12, 64), (1, 32, 12, 64), (32, 16, 12, 64),
]  # fmt: skip


def gemm(
    library: Library, kernel: DenseGemm, size: tuple[int, int, int], kc: int, group: int
) -> Candidate:
    m, k, tokens = size
    panels = -(-tokens // WIDTH)
    rows = -(-m // kernel.rows) * kernel.rows
    weight, bias = floats(rows * k), floats(rows)
    args = [floats(panels, k, WIDTH), weight, bias, floats(panels, m, WIDTH)]
    items = -(-m // kernel.rows) * panels
    call = library.bind(kernel, [*args, tokens, m, k, kc, group], items)
    return Candidate(
        f"{kernel.strips}x{kernel.mr}x{kernel.nv} kc{kc} group{group}", call, m * k * tokens, []
    )


def matmul_of_onnxruntime(m: int, k: int, tokens: int) -> Candidate | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(floats(k, m), "w")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in
            (("x", [tokens, k]), ("y", [tokens, m])))  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = {"x": floats(tokens, k)}
    return Candidate("onnxruntime", lambda: session.run(None, feed), m * k * tokens)


def attention(library: Library, kernel: Attention, size: tuple[int, int, int, int]) -> Candidate:
    batch, seq, heads, head_size = size
    tokens, channels = batch * seq, heads * head_size
    panels = -(-tokens // WIDTH)
    merged = floats(panels, 3 * channels, WIDTH)
    offsets = [x for i in range(3) for x in (3 * channels, i * channels)]
    pointers = [merged] * 3 + ([floats(batch, seq)] if kernel.mask == "key" else [])
    steps = [seq, 0, 0] if kernel.mask == "key" else []
    args = [*pointers, floats(panels, channels, WIDTH), tokens, seq, heads, head_size, *offsets]
    scratch = 4 * -(-seq // GROUP) * GROUP * WIDTH
    call = library.bind(kernel, [*args, *steps, head_size**-0.5], panels * heads, scratch)
    work = 2 * batch * heads * seq * seq * head_size
    return Candidate(f"{kernel.rows}x{kernel.groups * GROUP} {kernel.mask}", call, work)


def cases(isa: str, library: Library) -> Iterator[tuple[str, str, list[Candidate]]]:
    """Family, title and candidates of each shape."""
    for size in GEMM_SHAPES:
        family = DenseGemmFamily()
        m, k, tokens = size
        work = Workload("linear", (("m", m), ("k", k)), "f32")
        found = []
        for schedule in family.schedules(work, Target.host()):
            if schedule.isa == isa:
                mr, strips, nv, kc, group = (v for _, v in schedule.params)
                kernel = DenseGemm(by_name(isa), mr, strips, nv, "none", False)
                found.append(gemm(library, kernel, size, kc, group))
        peer = matmul_of_onnxruntime(m, k, tokens)
        yield "dense_gemm", f"{m}x{k}x{tokens}", [*found, *([peer] if peer else [])]
    for shape in ATTENTION_SHAPES:
        kernels = [k for k in AttentionFamily().variants() if isinstance(k, Attention)]
        found = [attention(library, k, shape) for k in kernels
                 if (k.isa, k.result) == (isa, "f32") and k.mask in ("none", "key")]  # fmt: skip
        yield "attention", "batch{} seq{} heads{} size{}".format(*shape), found
    yield from small_cases(isa, library)


def small_cases(isa: str, library: Library) -> Iterator[tuple[str, str, list[Candidate]]]:
    """Kernels that move or map elements: G/s are elements."""
    for channels in (256, 768):
        rows = floats(128, channels)
        x = floats(2, channels, WIDTH)
        for op, args in (("to_panels", [rows, x]), ("from_panels", [x, rows])):
            change = LayoutChange(by_name(isa), op, "float32")
            call = library.bind(change, [*args, 128, channels], 128 // GROUP)
            yield (
                "layout_change",
                f"{op} {channels}x128",
                [Candidate("", call, channels * 128)],
            )
        tables = [floats(30522, channels), floats(512, channels), floats(2, channels)]
        ids = [np.random.default_rng(0).integers(0, len(t), 128) for t in tables]
        parts = [v for i, t in zip(ids, tables, strict=True) for v in (i, t, len(t), 128, 1)]
        embedding = Embedding(by_name(isa), (DType.I64,) * 3)
        call = library.bind(embedding, [*parts, x, 128, 128, channels], 128 // GROUP)
        yield "embedding", f"3 tables {channels}x128", [Candidate("", call, channels * 128)]
        norms = [LayerNorm(by_name(isa), residual, True, result, in_place=over)
                 for residual in (False, True) for result in RESULTS for over in (False, True)
                 if result != "u8" or not over]  # fmt: skip
        found = [layer_norm(library, kernel, channels) for kernel in norms]
        yield "layer_norm", f"{channels}x128", found
        count = 128 * channels
        stored = floats(count // 4).view(np.uint8)
        for op, ends in (("quantize", [x, stored]), ("dequantize", [stored, x])):
            requantise = Requantise(by_name(isa), op, "uint8")
            items = -(-count // QUANTIZE_CHUNK)
            call = library.bind(requantise, [*ends, count, 50.0, 128], items)
            yield "quantize", f"{op} {channels}x128", [Candidate("", call, count)]
    for op in ("gelu", "gelu_tanh", "tanh", "exp", "sigmoid", "erf"):
        count = 16 * CHUNK
        kernel = Pointwise(by_name(isa), op)
        call = library.bind(kernel, [floats(count), floats(count), count], 16)
        yield "pointwise", f"{op} {count}", [Candidate("", call, count)]


def layer_norm(library: Library, kernel: LayerNorm, channels: int) -> Candidate:
    """128 tokens."""
    x, residual, y = (floats(2, channels, WIDTH) for _ in range(3))
    args = [x, *[residual] * kernel.has_residual, floats(channels), floats(channels)]
    args += [y] * kernel.has_y
    stored = floats(128 * channels // 4).view(np.uint8)
    numbers: list[Any] = [channels, 1e-5]
    if kernel.has_bytes:
        numbers = [stored, 128, *numbers, 50.0, 128]
    items = 2 if kernel.has_bytes else 128 // GROUP
    call = library.bind(kernel, [*args, *numbers], items)
    name = f"{'residual ' * kernel.has_residual}to {kernel.result}{' in place' * kernel.in_place}"
    return Candidate(name, call, channels * 128)


def kernels_of(isa: str) -> list[Kernel]:
    kernels: list[Kernel] = [peak(isa)]
    for family in dict.fromkeys(FAMILIES.values()):
        for kernel in family.variants():
            if isinstance(kernel, Int8Gemm):  # see bench_int8.py
                continue
            plain = not isinstance(kernel, DenseGemm) or (
                kernel.activation == "none" and not kernel.has_residual
            )
            if kernel.isa == isa and plain:
                kernels.append(kernel)
    return kernels


def peak(isa: str) -> Probe:
    """Nothing but independent multiply-adds in registers."""
    return product_probes(frozenset())[f"f32.{isa}"]


def peak_of(library: Library, isa: str) -> float:
    """Multiply-accumulates per second."""
    return peak_rate(library, peak(isa), floats(1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=[v.name for v in VECTOR_ISAS])
    parser.add_argument("--only", choices=TIMED)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    isa = options.isa or vector_isas(Target.host())[0].name
    with tempfile.TemporaryDirectory() as folder:
        library = Library(kernels_of(isa), Isa(isa), Path(folder))
        most = peak_of(library, isa)
        print(
            f"{isa}, {len(os.sched_getaffinity(0))} cores allowed, FMA peak {most / 1e9:.1f} G/s"
        )
        for family, title, candidates in cases(isa, library):
            if options.only not in (None, family):
                continue
            measure(candidates, options.rounds)
            most = max(most, peak_of(library, isa))
            for c in candidates:
                best, middle = c.work / min(c.seconds), c.work / median(c.seconds)
                print(
                    f"{family:11} {title:32} {c.name:26} best {best / 1e9:7.2f} G/s"
                    f" ({best / most:4.0%} of peak)  median {middle / 1e9:7.2f}"
                    f"  {min(c.seconds) * 1e6:9.1f} us"
                )


if __name__ == "__main__":
    main()
