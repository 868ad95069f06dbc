"""bf16 GEMM, and sparse GEMM in fp32 and bf16, over token panels against float64 NumPy."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels.dense_gemm import pack_bias
from sparsec.codegen.kernels.float_family import FloatGemmFamily, pack
from sparsec.codegen.kernels.float_gemm import FloatGemm
from sparsec.codegen.kernels.float_pack import pack_sparse
from sparsec.ir.graph import Graph, Node
from sparsec.ir.layouts import Bsr
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType
from sparsec.sparse.bsr import block_mask
from sparsec.target import Target

Array = np.ndarray[Any, Any]
ALL = [k for k in FloatGemmFamily().variants() if isinstance(k, FloatGemm)]
# The activations' code is that of the other kernels: the exact ones are tested with them.
VARIANTS = [k for k in ALL if k.epilogue.activation in ("none", "gelu")]
SOME = [k for k in VARIANTS if k.epilogue.suffix in ("_f32", "_bf16")]
EPS = float(np.finfo(np.float32).eps)
BF16 = DType.BF16.numpy
TOKENS = [1, 16, 17, 33, 48, 64, 130]
M = [2, 4, 12, 14, 64]
K = [2, 6, 64]


def stored(kernel: FloatGemm, x: Array) -> Array:
    return x.astype(BF16) if kernel.numbers.per_lane == 2 else x


def call(run: Any, kernel: FloatGemm, data: dict[str, Array], group: int) -> Array:
    (tokens, k), (m, _) = data["x"].shape, data["w"].shape
    x = stored(kernel, data["x"])
    panels = run.to_pairs(x) if kernel.numbers.per_lane == 2 else run.to_panels(x)
    packed = pack(kernel, data["w"])
    to_bf16 = kernel.epilogue.result == "bf16"
    size = (panels.shape[0], m // 2 if to_bf16 else m, 64)
    y = np.full(size, 99, np.int32) if to_bf16 else np.full(size, np.nan, np.float32)
    pointers = [panels, *packed.named.values()]
    pointers.append(pack_bias(data["bias"], m, kernel.rows))
    pointers += [run.to_panels(data["residual"])] if kernel.epilogue.has_residual else []
    items = -(-size[0] // group) * -(-m // kernel.rows)
    numbers = [tokens, m, k // kernel.numbers.per_lane, group]
    assert run(kernel, *pointers, y, *numbers, output=y, items=items,
               scratch_bytes=kernel.scratch_bytes) == 0  # fmt: skip
    return np.asarray(run.from_pairs(y, tokens) if to_bf16 else run.from_panels(y, tokens))


def check(
    run: Any, kernel: FloatGemm, sizes: tuple[int, int, int], *, zeros: float = 0.0,
    block: tuple[int, int] = (4, 1), group: int = 2,
) -> None:  # fmt: skip
    tokens, m, k = sizes
    rng = np.random.default_rng([tokens, m, k])
    shapes = {"x": (tokens, k), "w": (m, k), "bias": (m,), "residual": (tokens, m)}
    data = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    data["w"] *= block_mask(data["w"], *block, zeros)
    y = call(run, kernel, data, group)
    x, w = (stored(kernel, data[n]).astype(np.float64) for n in "xw")
    residual = data["residual"].astype(np.float64) if kernel.epilogue.has_residual else None
    operands = [x, w, data["bias"].astype(np.float64), residual]
    attrs = {"activation": kernel.epilogue.activation}
    (expected,) = OPS["linear"].evaluate(operands, attrs, {})
    # As for dense fp32: sums of k exact products in any order, and the activation's own error.
    # Denormal products of bf16 are lost, and they are below 1e-38. A bf16 result is off by 2**-8.
    size = np.abs(x) @ np.abs(w).T + np.abs(data["bias"])
    bound = (1.13 * (k + 2) * EPS + 1e-6) * size + 1e-6 + 2 * EPS * np.abs(expected)
    if kernel.epilogue.result == "bf16":
        bound += 2.0**-8 * (np.abs(expected) + bound)
    assert (np.abs(y.astype(np.float64) - expected) <= bound).all(), (sizes, zeros, block)


@pytest.mark.parametrize("tokens", TOKENS)
def test_sizes_at_the_edges_of_blocks(some_kernel: FloatGemm, run: Any, tokens: int) -> None:
    for m, k in product(M, K):
        check(run, some_kernel, (tokens, m, k), zeros=0.5)


def test_epilogues_and_groups(kernel: FloatGemm, run: Any) -> None:
    for group in (1, 2, 5):
        check(run, kernel, (200, 26, 64), zeros=0.7, group=group)


@pytest.mark.parametrize("block", [(1, 1), (1, 4), (4, 1), (4, 4), (16, 1)])
@pytest.mark.parametrize("zeros", [0.0, 0.8, 1.0])
def test_blocks(some_kernel: FloatGemm, run: Any, block: tuple[int, int], zeros: float) -> None:
    check(run, some_kernel, (40, 36, 130), zeros=zeros, block=block)


def layer(dtype: DType, block: tuple[int, int] | None, zeros: float, rows: int) -> Node:
    """`rows` by 768 with zeros in blocks, for 128 tokens."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((rows, 768)).astype(np.float32)
    graph = Graph("g")
    weight = graph.add_constant((w if block is None else w * block_mask(w, *block, zeros)).astype(
        dtype.numpy), "w")  # fmt: skip
    if block is not None:
        graph.set_type(weight, weight.type.with_layout(Bsr(*block)))
    x = graph.add_input("x", DType.F32, (1, 128, 768))
    if dtype is DType.BF16:
        x = graph.add("to_bf16", [x])
    op = "linear" if dtype is DType.F32 else "linear_bf16"
    return graph.add_node(op, [x, weight, None, None], {"activation": "none"})


@pytest.mark.parametrize("block", [None, (32, 1)])
def test_tiles_and_vectors_are_ranked_together(block: tuple[int, int] | None) -> None:
    family = FloatGemmFamily()
    workload = family.workload(layer(DType.BF16, block, 0.8, 768))
    found = family.schedules(workload, Target.named("sapphirerapids"))
    assert found[0].isa == "amx"
    assert {s.isa for s in found} == {"amx", "avx512bf16"}


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize(
    ("block", "zeros", "sparse", "strip"),
    [
        ((4, 1), 0.8, 1, 4),
        ((32, 4), 0.9, 1, 4),
        ((1, 4), 0.9, 1, 1),
        ((4, 1), 0.05, 0, None),  # more lists than multiply-adds saved
        (None, 0.0, 0, None),
    ],
)
def test_the_cheapest_kernel_comes_first(
    dtype: DType, block: tuple[int, int] | None, zeros: float, sparse: int, strip: int | None
) -> None:
    node = layer(dtype, block, zeros, 768)
    family = FloatGemmFamily()
    first = family.schedules(family.workload(node), Target.named("znver4"))[0]
    params = dict(first.params)
    assert params.get("sparse", 0) == sparse
    assert strip is None or params["strip"] == strip


def test_a_list_of_channels_pairs_even_with_odd() -> None:
    """Four of each: four steps, though no two are neighbours."""
    w = np.zeros((4, 20), np.float32)
    w[:, [0, 4, 8, 12, 3, 7, 11, 15]] = 1
    packed = pack_sparse(w, 4, 1, 2)
    assert packed.starts is not None
    assert packed.starts.tolist() == [0, 4]
    w[:, [16, 18]] = 1
    packed = pack_sparse(w, 4, 1, 2)
    assert packed.starts is not None
    assert packed.starts.tolist() == [0, 6]
