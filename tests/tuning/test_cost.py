"""The cost model's arithmetic, and the choices that follow from it; nothing is timed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparsec.codegen.kernels.attention_cost import query_runs
from sparsec.codegen.kernels.costs import COUNTS, Shape
from sparsec.codegen.kernels.counts import Counts, Loop, cycles, seconds, streaming_seconds
from sparsec.codegen.kernels.dense_gemm import DenseGemmFamily
from sparsec.codegen.kernels.float_family import FloatGemmFamily
from sparsec.codegen.kernels.int8_family import Int8GemmFamily
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Node
from sparsec.ir.layouts import ROW_MAJOR, Bsr
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.passes.manager import PassManager
from sparsec.passes.quantize import Quantize
from sparsec.rates import Ports, Rates, product_of
from sparsec.target import Isa, Target
from sparsec.tuning.cost import CheapestLayout, expected_seconds, fp32_is_faster

PORTS = Ports(1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 0.5, 10.0)
RATES = Rates(
    "made up", 1e9, (("f32.avx512", 16.0),), ((512, PORTS),), (64e9, 32e9, 16e9, 8e9), 5e-6, 0.0
)
TARGET = Target("made up", tuple(Isa), 2, 1 << 15, 1 << 20, 1 << 24, RATES)
VNNI = Target.named("icelake-server")
AMX = Target.named("sapphirerapids")


def counts(*loops: Loop, **given: object) -> Counts:
    return replace(Counts("f32.avx512", 512, loops, 4), **given)


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        (Loop(1, macs=160), 10),
        (Loop(1, macs=160, shuffles=2), 12),  # beside multiply-adds
        (Loop(1, macs=16, shuffles=2), 8),  # on their own port
        (Loop(1, macs=160, others=2), 11),
        (Loop(1, others=10), 20),
        (Loop(1, loads=3, broadcasts=2), 7),
        (Loop(1, stores=2), 6),
        (Loop(1, divides=2), 20),
        (Loop(1, macs=16, l2_bytes=64), 2),
        (Loop(1, macs=16, chain_cycles=4), 4),
        (Loop(10, macs=16, fixed_cycles=2), 30),
        (Loop(0, macs=160), 0),
    ],
)
def test_a_loop_takes_what_its_busiest_part_takes(loop: Loop, expected: float) -> None:
    assert cycles(loop, counts(loop), TARGET) == pytest.approx(expected)


def test_products_on_a_unit_of_their_own_leave_the_ports_free() -> None:
    loop = Loop(1, macs=160, shuffles=2, others=2)
    assert cycles(loop, counts(loop, has_own_unit=True), TARGET) == pytest.approx(10)


def test_weights_stream_beside_the_loops() -> None:
    loop = Loop(1000, macs=16)  # 1 us
    assert seconds(counts(loop), TARGET) == pytest.approx(1e-6)
    few, many = ((1000.0, 4e6),), ((64000.0, 4e6),)  # from L3 at 16 GB/s
    assert seconds(counts(loop, streams=few), TARGET) == pytest.approx(1e-6)
    assert seconds(counts(loop, streams=many), TARGET) == pytest.approx(4e-6)


@pytest.mark.parametrize(
    ("items", "grain", "share"), [(4, 1, 0.5), (5, 1, 0.6), (1, 1, None), (4, 4, None)]
)
def test_threads_share_items_and_pay_a_barrier(items: int, grain: int, share: float) -> None:
    work = counts(Loop(100_000, macs=16), items=items, grain=grain)  # 100 us
    expected = 100e-6 if share is None else share * 100e-6 + RATES.barrier_seconds
    assert seconds(work, TARGET, threads=2) == pytest.approx(expected)


@pytest.mark.parametrize(("nbytes", "bandwidth"), [(1 << 14, 64e9), (1 << 19, 32e9),
                                                  (1 << 23, 16e9), (1 << 24, 8e9)])  # fmt: skip
def test_bytes_come_from_the_cache_that_holds_them(nbytes: int, bandwidth: float) -> None:
    assert streaming_seconds(nbytes, TARGET, 1) == pytest.approx(nbytes / bandwidth)


@pytest.mark.parametrize(
    ("op", "isa", "name"),
    [
        ("linear", "avx2", "f32.avx2"),
        ("linear", "avx512", "f32.avx512"),
        ("exp", "avx512vnni", "f32.avx512"),
        ("linear_int8", "avx512vnni", "u8s8.avx512vnni"),
        ("attention_int8", "amx", "u8s8.amx"),
        ("linear", "amx", "bf16.amx"),
    ],
)
def test_what_a_kernel_multiplies_by(op: str, isa: str, name: str) -> None:
    assert product_of(op, isa) == name
    assert TARGET.rates.product(name) > 0  # by default where it was not measured


def linear_int8(layout: str, density: float, m: int = 768, k: int = 768) -> Workload:
    return Workload("linear_int8", (("m", m), ("k", k)), "u8s8", layout, "none u8", density)


def macs_of(workload: Workload, schedule: Schedule, tokens: int) -> float:
    found = COUNTS[schedule.family](workload, schedule, Shape(1, tokens), VNNI)
    return sum(loop.times * loop.macs for loop in found.loops)


@pytest.mark.parametrize("tokens", [64, 128, 512])
def test_multiply_accumulates_of_whole_panels_are_those_of_the_blocks(tokens: int) -> None:
    dense = linear_int8("dense", 1.0)
    for schedule in Int8GemmFamily().schedules(dense, VNNI):
        assert macs_of(dense, schedule, tokens) == 768 * 768 * tokens
    sparse = linear_int8("bsr16x4", 0.25)
    by_quads = next(s for s in Int8GemmFamily().schedules(sparse, VNNI)
                    if s.params[:2] == (("rows", 16), ("cols", 4)))  # fmt: skip
    assert macs_of(sparse, by_quads, tokens) == pytest.approx(768 * 768 * tokens / 4)
    plain = Workload("linear", (("m", 768), ("k", 768)), "f32", epilogue="none")
    for found in DenseGemmFamily().schedules(plain, VNNI):
        assert macs_of(plain, found, tokens) == 768 * 768 * tokens


@pytest.mark.parametrize("tokens", [64, 512])
def test_multiply_accumulates_of_float_products_are_those_of_the_blocks(tokens: int) -> None:
    for dtype in ("f32", "bf16"):
        work = Workload("linear", (("m", 768), ("k", 768)), dtype, "bsr4x4", "none", 0.25)
        sparse = {s.param("strip"): s for s in FloatGemmFamily().schedules(work, AMX)
                  if s.family == "float_gemm" and s.param("sparse")}[4]  # fmt: skip
        assert macs_of(work, sparse, tokens) == pytest.approx(768 * 768 * tokens / 4)
    plain = replace(work, layout="dense", density=1.0)
    both = FloatGemmFamily().schedules(plain, AMX)
    assert [s.isa for s in both] == ["amx", "avx512bf16"]
    for dense in both:
        assert macs_of(plain, dense, tokens) == 768 * 768 * tokens


@pytest.mark.parametrize("strip", [16, 32])
def test_float_tiles_multiply_whole_steps(strip: int) -> None:
    """The 48 pairs that a strip of 768 channels has left are three tiles; 49 would be four."""
    for density, steps in ((0.125, 3), (0.128, 4)):
        work = Workload("linear", (("m", 768), ("k", 768)), "bf16", "bsr32x4", "none", density)
        found = FloatGemmFamily().schedules(work, AMX)
        schedule = next(s for s in found if s.isa == "amx" and s.param("sparse")
                        and s.param("strip") == strip)  # fmt: skip
        assert macs_of(work, schedule, 64) == pytest.approx(768 * 64 * 32 * steps)


@pytest.mark.parametrize("strip", [8, 16, 32])
def test_tiles_multiply_whole_rows(strip: int) -> None:
    """The last step of a block of rows is half full on average, and is multiplied as a whole."""
    work = linear_int8(f"bsr{strip}x4", 0.25)
    by_tiles = (s for s in Int8GemmFamily().schedules(work, AMX) if s.isa == "amx")
    schedule = next(s for s in by_tiles if s.params[:2] == (("rows", strip), ("cols", 4)))
    steps = 768 / 64 * 0.25 + 0.5
    assert macs_of(work, schedule, 64) == pytest.approx(768 * 64 * 64 * steps)
    dense = linear_int8("dense", 1.0)
    schedule = Int8GemmFamily().schedules(dense, AMX)[0]
    assert schedule.isa == "amx"
    for tokens in (32, 64):
        assert macs_of(dense, schedule, tokens) == 768 * 768 * tokens


def test_few_tokens_take_the_narrow_form() -> None:
    """Half of a panel costs less than a whole one, for dense and for sparse weights."""
    for workload in (linear_int8("dense", 1.0), linear_int8("bsr16x1", 0.2)):
        schedule = Int8GemmFamily().schedules(workload, VNNI)[0]
        few, many = (expected_seconds(workload, schedule, Shape(1, n), VNNI) for n in (32, 64))
        assert few is not None
        assert many is not None
        assert 0.4 * many < few < 0.75 * many


def test_time_grows_with_density() -> None:
    schedule = Int8GemmFamily().schedules(linear_int8("bsr16x1", 0.1), VNNI)[0]
    times = [
        expected_seconds(linear_int8("bsr16x1", d), schedule, Shape(1, 128), VNNI) or 0
        for d in (0.1, 0.2, 0.4, 0.8)
    ]
    assert times == sorted(times)
    assert len(set(times)) == len(times)


@pytest.mark.parametrize(
    ("batch", "seq", "sizes", "expected"),
    [
        (1, 128, (4,), {4: 2}),
        (1, 32, (4, 2), {2: 1}),
        (1, 40, (4, 2), {2: 1, 1: 1}),
        (1, 16, (), {1: 1}),
        (4, 16, (4,), {1: 4}),
        (2, 33, (4,), {1: 6}),  # 33 tokens end in the third group: two sequences touch it
        (1, 1, (4,), {1: 1}),
    ],
)
def test_runs_of_queries(
    batch: int, seq: int, sizes: tuple[int, ...], expected: dict[int, int]
) -> None:
    assert query_runs(batch, seq, sizes) == expected


def test_families_without_a_count_have_no_time() -> None:
    schedule = Schedule("pointwise", "avx512")
    assert expected_seconds(Workload("exp", (), "f32"), schedule, Shape(1, 1), VNNI) is None


def int8_node(m: int = 256, k: int = 256) -> Graph:
    graph = Graph("layer")
    x = graph.add_input("x", DType.F32, (symbol("batch"), symbol("seq"), k))
    w = np.random.default_rng(0).standard_normal((m, k)).astype(np.float32)
    operands = [x, graph.add_constant(w, "w"), None, None]
    graph.add_output("y", graph.add("linear", operands, {"activation": "none"}, name="dense"))
    PassManager([Quantize({"x": (-1.0, 1.0)})]).run(graph)
    return graph


@pytest.mark.parametrize("target", ["icelake-server", "haswell"])
def test_the_cheapest_layout_is_chosen(target: str) -> None:
    (node,) = (n for n in int8_node().nodes if n.op == "linear_int8")
    choose = CheapestLayout(Target.named(target))
    full = [(ROW_MAJOR, 1.0), (Bsr(16, 1), 0.97), (Bsr(4, 1), 0.95)]
    assert choose(node, full) == ROW_MAJOR
    some = [(ROW_MAJOR, 1.0), (Bsr(4, 1), 0.93)]
    assert choose(node, some) == ROW_MAJOR
    sparse = [(ROW_MAJOR, 1.0), (Bsr(16, 1), 0.1), (Bsr(4, 1), 0.099), (Bsr(32, 1), 0.19)]
    assert choose(node, sparse) in (Bsr(16, 1), Bsr(4, 1))
    considered = choose.considered["dense"]
    assert len(considered) == len(sparse)
    assert [c.seconds for c in considered] == sorted(c.seconds for c in considered)


@pytest.mark.parametrize("target", ["icelake-server", "znver4"])
def test_unstructured_zeros_need_no_blocks(target: str) -> None:
    (node,) = (n for n in int8_node().nodes if n.op == "linear_int8")
    choose = CheapestLayout(Target.named(target))
    candidates = [(ROW_MAJOR, 1.0), (Bsr(1, 1), 0.1), (Bsr(4, 1), 0.344), (Bsr(1, 4), 0.344)]
    assert choose(node, candidates) == Bsr(1, 1)
    best = choose.considered["dense"][0].schedule
    assert [best.param(n) for n in ("rows", "cols")] == [1, 1]


@pytest.mark.parametrize(
    ("op", "target"), [("linear", "sapphirerapids"), ("linear_bf16", "znver4")]
)
def test_float_weights_have_the_cheapest_layout_too(op: str, target: str) -> None:
    graph = Graph("layer")
    dtype = DType.F32 if op == "linear" else DType.BF16
    x = graph.add_input("x", dtype, (symbol("batch"), symbol("seq"), 256))
    w = np.random.default_rng(0).standard_normal((256, 256)).astype(dtype.numpy)
    graph.add_output("y", graph.add(op, [x, graph.add_constant(w, "w"), None, None],
                                    {"activation": "none"}, name="dense"))  # fmt: skip
    (node,) = graph.nodes
    choose = CheapestLayout(Target.named(target))
    assert choose(node, [(ROW_MAJOR, 1.0), (Bsr(4, 1), 0.2), (Bsr(1, 4), 0.2)]) == Bsr(4, 1)
    assert choose(node, [(ROW_MAJOR, 1.0), (Bsr(4, 1), 0.97)]) == ROW_MAJOR


def test_a_target_without_int8_kernels_keeps_the_layout() -> None:
    (node,) = (n for n in int8_node().nodes if n.op == "linear_int8")
    none = Target("none", (), 1, 1 << 15, 1 << 20, 1 << 23)
    assert CheapestLayout(none)(node, [(ROW_MAJOR, 1.0), (Bsr(4, 1), 0.1)]) == ROW_MAJOR


def attention_pair(head_size: int) -> tuple[Node, Node]:
    """The same attention in fp32 and in int8, with a mask of keys and 12 heads."""
    graph, batch, seq = Graph("g"), symbol("batch"), symbol("seq")
    mask = graph.add_input("mask", DType.F32, (batch, 1, 1, seq))
    offsets = {f"{n}_offset": 0 for n in "qkv"}
    attrs = {"heads": 12, "head_size": head_size, "scale": 0.1, **offsets}
    made = []
    for op, dtype, more in (
        ("attention", DType.F32, {}),
        ("attention_int8", DType.U8, {f"{n}_scale": 0.1 for n in "qkv"}),
    ):
        x = graph.add_input(op, dtype, (batch, seq, 12 * head_size))
        made.append(graph.add_node(op, [x, x, x, mask], {**attrs, **more}))
    return made[0], made[1]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("haswell", Shape(1, 128), False),
        ("haswell", Shape(1, 384), False),
        ("skylake-avx512", Shape(1, 128), True),  # int8 runs on AVX2 there
        ("skylake-avx512", Shape(1, 384), True),
        ("icelake-server", Shape(1, 128), False),
        ("sapphirerapids", Shape(1, 128), False),
    ],
)
@pytest.mark.parametrize("head_size", [32, 64])
def test_where_attention_is_expected_to_be_faster_in_fp32(
    name: str, shape: Shape, expected: bool, head_size: int
) -> None:
    said = fp32_is_faster(*attention_pair(head_size), shape, Target.named(name))
    assert (said is not None) == expected
    assert said is None or "us for 1 x" in said
