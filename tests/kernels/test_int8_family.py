"""`linear_int8` nodes through the family: every schedule, and the order in which they come."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparsec.codegen.isa.int8 import AMX_INT8, INT8_ISAS
from sparsec.codegen.kernels import family_for, schedule_for
from sparsec.codegen.kernels.int8_pack import pack_channels, pack_dense, pack_quads, pack_tiles
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.layouts import ROW_MAJOR, Bsr, Layout, Panels
from sparsec.ir.ops import OPS
from sparsec.ir.schedule import Bucket, Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Isa, Target

Array = np.ndarray[Any, Any]
BATCH, SEQ = symbol("batch"), symbol("seq")
ENV = {"batch": 3, "seq": 43}
TARGETS = {
    "avx2": Target.named("haswell"),
    "avx512": Target.named("skylake-avx512"),
    "avx512vnni": Target.named("icelake-server"),
    "amx": Target.named("sapphirerapids"),
}
LAYOUTS = [ROW_MAJOR, *(Bsr(*b) for b in ((1, 1), (1, 4), (4, 1), (8, 1), (16, 4), (6, 2)))]


def example(
    layout: Layout, *, m: int = 24, k: int = 40, full: bool = True, out_scale: float | None = 0.11,
    wide: bool = False,
) -> Node:  # fmt: skip
    """A node with all operands, and u8 result unless its scale is None, or the bare one.

    A `wide` weight has numbers of three parts: 255 is 127 + 127 + 1.
    """
    rng = np.random.default_rng(3)
    rows, cols = (layout.rows, layout.cols) if isinstance(layout, Bsr) else (1, 1)
    kept = rng.random((-(-m // rows), -(-k // cols))) < (0.3 if isinstance(layout, Bsr) else 1)
    numbers = rng.choice([-255, -129, 128, 255, 3], (m, k)) if wide else (
        rng.integers(-128, 128, (m, k)))  # fmt: skip
    w = numbers * np.repeat(np.repeat(kept, rows, 0), cols, 1)[:m, :k]
    g = Graph("g")
    x = g.add_input("x", DType.U8, (BATCH, SEQ, k))
    g.set_type(x, x.type.with_layout(Panels()))
    weight = g.add_constant(w.astype(np.int16 if wide else np.int8), "weight")
    g.set_type(weight, weight.type.with_layout(layout))
    operands: list[Value | None] = [
        x, weight, g.add_constant(rng.uniform(0.01, 0.02, m).astype(np.float32), "scale")
    ]  # fmt: skip
    attrs = {"activation": "none", "x_scale": 0.02, "x_zero_point": 7}
    if not full:
        node = g.add_node("linear_int8", operands, {**attrs, "out_scale": None,
                                                    "out_zero_point": 0})  # fmt: skip
        g.set_type(node.output, node.output.type.with_layout(Panels()))
        return node
    residual = g.add_input("residual", DType.F32, (BATCH, SEQ, m))
    g.set_type(residual, residual.type.with_layout(Panels()))
    operands += [g.add_constant(rng.standard_normal(m).astype(np.float32), "bias"), residual]
    attrs |= {"activation": "relu", "out_scale": out_scale, "out_zero_point": 5}
    node = g.add_node("linear_int8", operands, attrs)
    g.set_type(node.output, node.output.type.with_layout(Panels()))
    return node


@pytest.mark.parametrize("full", [True, False], ids=["full", "bare"])
@pytest.mark.parametrize(
    ("level", "layout"),
    [
        pytest.param(i.name, layout, marks=pytest.mark.isa(i.name), id=f"{i.name}-{layout}")
        for i in INT8_ISAS
        # For AMX scattered weights have the schedules of 4 x 1 and 16 x 4, and emulation is slow.
        for layout in (LAYOUTS if i is not AMX_INT8 else [ROW_MAJOR, *LAYOUTS[3:]])
    ],
)
def test_every_schedule_of_a_node_computes_it(
    level: str, layout: Layout, full: bool, run: Any
) -> None:
    node = example(layout, full=full)
    family = family_for(node)
    assert family is not None
    schedules = family.schedules(family.workload(node), TARGETS[level])
    assert schedules[0] == schedule_for(node, TARGETS[level])
    assert {s.isa for s in schedules} == ({level, "avx512vnni"} if level == "amx" else {level})
    check(node, [s for s in schedules if s.isa == level], ENV, run)


@pytest.mark.parametrize("layout", [ROW_MAJOR, Bsr(1, 1), Bsr(16, 4)], ids=str)
@pytest.mark.parametrize(
    "level", [pytest.param(i.name, marks=pytest.mark.isa(i.name)) for i in INT8_ISAS]
)
def test_every_schedule_of_a_wide_weight_computes_it(level: str, layout: Layout, run: Any) -> None:
    """Lists of blocks take it, dense kernels and bitmaps do not."""
    node = example(layout, full=False, wide=True)
    family = family_for(node)
    assert family is not None
    workload = family.workload(node)
    assert workload.dtype == "u8s9"
    few = family.schedules(replace(workload, bucket=Bucket(most=4)), TARGETS[level])
    schedules = family.schedules(workload, TARGETS[level])
    assert schedules
    assert all(s.family == "int8_gemm" and s.param("cols") for s in (*schedules, *few))
    check(node, [s for s in schedules if s.isa == level], ENV, run)


@pytest.mark.parametrize("level", ["avx2", "avx512vnni"])
def test_the_more_numbers_are_wide_the_lower_the_blocks(level: str) -> None:
    """Each costs its block once more."""
    family = family_for(example(ROW_MAJOR))
    assert family is not None
    sizes = (("m", 768), ("k", 768))
    narrow = (1.0, 0.9999, 0.995)
    works = [Workload("linear_int8", sizes, "u8s9", "dense", "none u8", d) for d in narrow]
    found = [family.schedules(work, TARGETS[level])[0] for work in works]
    assert [s.param("rows") for s in found] == [16, 16, 4]


@pytest.mark.parametrize("level", [pytest.param("avx2", marks=pytest.mark.isa("avx2"))])
@pytest.mark.parametrize("layout", [ROW_MAJOR, Bsr(16, 4)], ids=str)
def test_a_result_that_lies_where_its_residual_lies(level: str, layout: Layout, run: Any) -> None:
    node = example(layout, out_scale=None)
    family = family_for(node)
    assert family is not None
    check(node, family.schedules(family.workload(node), TARGETS[level]), ENV, run, over=True)


@pytest.mark.isa("avx512vbmi2")
@pytest.mark.parametrize("full", [True, False], ids=["full", "bare"])
@pytest.mark.parametrize("batch", [1, 4])
def test_few_tokens_by_bitmaps(batch: int, full: bool, run: Any) -> None:
    node = example(Bsr(4, 1), full=full)
    family = family_for(node)
    assert family is not None
    work = replace(family.workload(node), bucket=Bucket(8, 16))
    found = [s for s in family.schedules(work, TARGETS["avx512vnni"]) if s.isa == "avx512vbmi2"]
    assert [s.family for s in found] == ["int8_bitmap"]
    check(node, found, {"batch": batch, "seq": 4}, run)


def check(
    node: Node, schedules: list[Schedule], env: dict[str, int], run: Any, *, over: bool = False
) -> None:
    """That all of them give what the op's meaning gives; `over`: where the residual lies."""
    rng = np.random.default_rng(9)
    tokens = env["batch"] * env["seq"]
    logical = {"x": rng.integers(0, 256, (tokens, 40)).astype(np.uint8),
               "residual": rng.standard_normal((tokens, 24)).astype(np.float32)}  # fmt: skip
    operands = [
        None if v is None else (logical[v.name] if v.data is None else v.data) for v in node.inputs
    ]
    operands += [None] * (5 - len(operands))
    (expected,) = OPS["linear_int8"].evaluate(operands, node.attrs, env)
    family = family_for(node)
    assert family is not None
    for schedule in schedules:
        output = np.full((-(-tokens // 64), 24, 64), 99, expected.dtype)
        arrays = {n: run.to_panels(a) for n, a in logical.items()}
        output = arrays["residual"] if over else output
        run.node(node, schedule, {**arrays, node.output.name: output}, env)
        np.testing.assert_array_equal(run.from_panels(output, tokens), expected, str(schedule))


def first(layout: str, density: float, level: str, k: int = 768) -> tuple[int, int]:
    """Rows and columns of the blocks of the heuristic's choice; 0 columns is dense."""
    node = example(ROW_MAJOR)
    family = family_for(node)
    assert family is not None
    work = Workload("linear_int8", (("m", 768), ("k", k)), "u8s8", layout, "none f32", density)
    schedule = family.schedules(work, TARGETS[level])[0]
    return schedule.param("rows"), schedule.param("cols")


@pytest.mark.parametrize("level", ["avx2", "avx512vnni", "amx"])
def test_the_choice_follows_the_density(level: str) -> None:
    dense = first("dense", 1.0, level)
    assert dense[1] == 0
    for layout in ("bsr4x1", "bsr16x1", "bsr32x1", "bsr16x4", "bsr1x4", "bsr1x1"):
        assert first(layout, 1.0, level) == dense
        # Scattered: 8 x 1 blocks of them are a third full, 16 x 1 more than half.
        if (layout, level) != ("bsr1x1", "amx"):
            assert first(layout, 0.05, level) != dense, layout
    assert first("bsr32x1", 0.2, level)[1] == 1
    assert first("bsr16x4", 0.2, level)[1] == 4
    assert first("bsr4x1", 0.2, level) == (dense if level == "amx" else (4, 1))


def test_levels_that_have_no_kernels_of_their_own_use_those_below() -> None:
    node = example(ROW_MAJOR)
    found = {n: schedule_for(node, target) for n, target in TARGETS.items()}
    assert {n: s.isa for n, s in found.items() if s is not None} == {
        "avx2": "avx2", "avx512": "avx2", "avx512vnni": "avx512vnni", "amx": "amx"
    }  # fmt: skip
    none = Target("none", (), 1, 1 << 15, 1 << 20, 1 << 23)
    assert schedule_for(node, none) is None
    assert Isa.AVX512_VNNI in TARGETS["amx"].isas


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("isa", INT8_ISAS, ids=lambda i: i.name)
def test_packed_weights_hold_every_weight_once(isa: Any, density: float, rng: Any) -> None:
    w = (rng.integers(1, 128, (23, 30)) * (rng.random((23, 30)) < density)).astype(np.int8)
    packs = [pack_dense(w, 6, isa.words), pack_quads(w, 8, 4, isa.words),
             pack_channels(w, 8, 4, isa.words)]  # fmt: skip
    if isa is AMX_INT8:
        packs = [pack_tiles(w, *f) for f in ((32, 0, 32), (8, 1, 8), (16, 4, 16), (64, 1, 32))]
    for packed in packs:
        stored = packed.words.view(np.int8 if isa.words_per_quad == 1 else np.int16)
        assert sorted(stored[stored != 0]) == sorted(w[w != 0])
        assert packed.words.dtype == np.int32
        if packed.starts is not None and packed.indices is not None:
            assert (packed.starts.dtype, packed.indices.dtype) == (np.int32, np.uint16)
            assert packed.indices.max() < 30
