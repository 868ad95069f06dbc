"""From a node to kernel calls: the arguments, items and packed weights of every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsec.codegen.kernels import FAMILIES, KERNELS, family_for, schedule_for
from sparsec.codegen.program import BufferRef
from sparsec.ir.dims import Dim, evaluate, symbol
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.layouts import Panels
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType
from sparsec.target import Isa, Target

Array = np.ndarray[Any, Any]
BATCH, SEQ = symbol("batch"), symbol("seq")
ENV = {"batch": 3, "seq": 43}
# The first three have files of their own; whole models of tests/e2e lower the others.
ELSEWHERE = {"linear_int8", "attention_int8", "quantize_tokens"}
ELSEWHERE |= {"pack_tokens", "unpack_tokens", "gated", "rotary"}
BYTES = {"scale": 0.02, "zero_point": 3}
TARGETS = {
    name: Target(name, isas, 2, 32 * 1024, 1 << 20, 1 << 25)
    for name, isas in (
        ("avx2", (Isa.AVX2,)),
        ("avx512", (Isa.AVX2, Isa.AVX512)),
        ("avx512bf16", tuple(Isa)[:5]),
    )
}
BF16 = {"to_bf16", "linear_bf16", "attention_bf16"}


def example(op: str, g: Graph, rng: np.random.Generator) -> tuple[Node, dict[str, Array]]:
    """A node of `op` in `g` over values in panels, and logical arrays for the graph's inputs."""

    def constant(*shape: int) -> Value:
        return g.add_constant(rng.standard_normal(shape).astype(np.float32), "weight")

    def panels(name: str, channels: int) -> Value:
        return g.add("to_panels", [g.add_input(name, DType.F32, (BATCH, SEQ, channels))],
                     {"width": 64}, name=f"{name}_panels")  # fmt: skip

    def pairs(name: str, channels: int) -> Value:
        return g.add("to_bf16", [panels(name, channels)], name=f"{name}_pairs")

    offsets = {"q_offset": 0, "k_offset": 24, "v_offset": 48}
    match op:
        case "linear":
            operands = [panels("x", 40), constant(30, 40), constant(30), panels("r", 30)]
            node = g.add_node(op, operands, {"activation": "gelu"})
        case "attention":
            x, mask = panels("x", 72), g.add_input("mask", DType.F32, (BATCH, 1, 1, SEQ))
            attrs = {"heads": 3, "head_size": 8, "scale": 0.35, **offsets}
            node = g.add_node(op, [x, x, x, mask], attrs)
        case "linear_bf16":
            weight = g.add_constant(rng.standard_normal((30, 40)).astype(DType.BF16.numpy), "w16")
            operands = [pairs("x", 40), weight, constant(30), panels("r", 30)]
            node = g.add_node(op, operands, {"activation": "gelu"})
        case "attention_bf16":
            x, mask = pairs("x", 72), g.add_input("mask", DType.F32, (BATCH, 1, 1, SEQ))
            attrs = {"heads": 3, "head_size": 8, "scale": 0.35, **offsets}
            node = g.add_node(op, [x, x, x, mask], attrs)
        case "layer_norm":
            node = g.add_node(op, [panels("x", 40), constant(40), constant(40), panels("r", 40)],
                              {"epsilon": 1e-12})  # fmt: skip
        case "embedding":
            rows: dict[str, Dim] = {"words": BATCH, "places": 1, "kinds": BATCH}
            ids = [g.add_input(n, DType.I64, (count, SEQ)) for n, count in rows.items()]
            node = g.add_node(op, [v for i in ids for v in (i, constant(50, 40))])
            g.set_type(node.output, node.output.type.with_layout(Panels()))
        case "to_bf16":
            node = g.add_node(op, [panels("x", 40)])
        case "embedding_int8":
            ids = [g.add_input(n, DType.I64, (BATCH, SEQ)) for n in ("kinds", "words", "places")]
            tables = [constant(50, 40)]
            tables += [g.add_constant(rng.integers(-128, 128, (50, 40)).astype(np.int8), "table")
                       for _ in range(2)]  # fmt: skip
            scales = [None, *(g.add_constant(rng.random(50).astype(np.float32) / 100, "scale")
                              for _ in range(2))]  # fmt: skip
            parts = [v for part in zip(ids, tables, scales, strict=True) for v in part]
            node = g.add_node(op, parts, {"zero_points": (0, 0, -9)})
            g.set_type(node.output, node.output.type.with_layout(Panels()))
        case "to_panels":
            node = g.add_node(op, [g.add_input("x", DType.F32, (BATCH, SEQ, 40))], {"width": 64})
        case "from_panels":
            node = g.add_node(op, [panels("x", 40)])
        case "quantize":
            node = g.add_node(op, [panels("x", 40)], {**BYTES, "dtype": DType.U8})
        case "quantize_tokens":
            node = g.add_node(op, [panels("x", 40)], {"zero_point": 16})
        case "dequantize":
            x = g.add_input("x", DType.U8, (BATCH, SEQ, 40))
            node = g.add_node(op, [x], BYTES)
        case _:
            count = 2 if op in ("add", "sub", "mul", "div", "maximum", "minimum") else 1
            form = {"approximate": "none"} if op == "gelu" else {}
            node = g.add_node(op, [panels(n, 40) for n in "ab"[:count]], form)
    made = {v.name: _logical(v, rng) for v in g.inputs}
    rounded = {f"{n}_pairs": a.astype(DType.BF16.numpy) for n, a in made.items()}
    made |= {f"{n}_panels": a for n, a in made.items()} | rounded
    return node, made


def _logical(value: Value, rng: np.random.Generator) -> Array:
    shape = [evaluate(d, ENV) for d in value.type.shape]
    if value.type.dtype is DType.I64:
        return rng.integers(-50, 50, shape)
    if value.type.dtype is DType.U8:
        return rng.integers(0, 256, shape).astype(np.uint8)
    return rng.uniform(0.5, 2, shape).astype(np.float32)


def in_memory(run: Any, value: Value, data: Array) -> Array:
    """The array as it lies in the value's layout."""
    if isinstance(value.type.layout, Panels):
        lay_out = run.to_pairs if value.type.layout.form == "pairs" else run.to_panels
        return np.asarray(lay_out(data.reshape(-1, data.shape[-1])))
    return data


def cases() -> list[Any]:
    others = sorted(FAMILIES.keys() - ELSEWHERE - BF16)
    pairs = [(op, level) for op in others for level in ("avx2", "avx512")]
    pairs += [(op, "avx512bf16") for op in sorted(BF16)]
    return [pytest.param(*p, marks=pytest.mark.isa(p[1]), id="-".join(p)) for p in pairs]


@pytest.mark.parametrize(("op", "level"), cases())
def test_every_schedule_of_a_node_computes_it(
    op: str, level: str, run: Any, rng: np.random.Generator
) -> None:
    graph = Graph("g")
    node, logical = example(op, graph, rng)
    family = family_for(node)
    assert family is not None
    operands = [None if v is None else (v.data if v.data is not None else logical[v.name])
                for v in node.inputs]  # fmt: skip
    (expected,) = OPS[op].evaluate(operands, node.attrs, ENV)
    arrays = {v.name: in_memory(run, v, logical[v.name]) for v in node.inputs
              if v is not None and v.data is None}  # fmt: skip
    schedules = family.schedules(family.workload(node), TARGETS[level])
    assert schedules[0] == schedule_for(node, TARGETS[level])
    assert schedules[0].isa == level
    for schedule in schedules:
        output = np.full_like(in_memory(run, node.output, np.asarray(expected)), 99)
        run.node(node, schedule, {**arrays, node.output.name: output}, ENV)
        if isinstance(node.output.type.layout, Panels):
            tokens = ENV["batch"] * ENV["seq"]
            stored = np.asarray(expected).dtype == DType.BF16.numpy
            rows = (run.from_pairs if stored else run.from_panels)(output, tokens)
            output = rows.reshape(np.shape(expected))
        # Sums of at most 43 products of numbers around 1, and functions good to 1e-6. A
        # probability in bf16 may be rounded the other way, by 2**-7 of it.
        rtol = 2.0**-7 if op == "attention_bf16" else 2e-5
        np.testing.assert_allclose(
            output.astype(np.float32), np.asarray(expected, np.float32), rtol, 2e-5,
            err_msg=str(schedule),
        )  # fmt: skip


@pytest.mark.parametrize(
    "level", [pytest.param(n, marks=pytest.mark.isa(n)) for n in ("avx2", "avx512")]
)
@pytest.mark.parametrize("op", ["attention", "layer_norm", "layer_norm with a factor"])
@pytest.mark.parametrize("is_read", [True, False])  # the fp32 result of layer_norm
def test_quantised_results(
    op: str, is_read: bool, level: str, run: Any, rng: np.random.Generator
) -> None:
    graph = Graph("g")
    op, _, has_factor = op.partition(" ")
    first, logical = example(op, graph, rng)
    attrs = {**first.attrs, "out_scale": 0.02, "out_zero_point": 100}
    factor = graph.add_constant(rng.uniform(0.2, 2.0, 40).astype(np.float32), "factor")
    node = graph.add_node(op, [*first.inputs, *[factor] * bool(has_factor)], attrs)
    if is_read:
        graph.add("neg", [node.outputs[0]])
    family = family_for(node)
    assert family is not None
    operands = [None if v is None else (v.data if v.data is not None else logical[v.name])
                for v in node.inputs]  # fmt: skip
    expected = [np.asarray(y) for y in OPS[op].evaluate(operands, attrs, ENV)]
    schedule = family.schedules(family.workload(node), TARGETS[level])[0]
    arrays = {v.name: in_memory(run, v, logical[v.name]) for v in node.inputs
              if v is not None and v.data is None}  # fmt: skip
    results = [np.full_like(in_memory(run, v, y), 99)
               for v, y in zip(node.outputs, expected, strict=True)]  # fmt: skip
    arrays |= {v.name: y for v, y in zip(node.outputs, results, strict=True)}
    for call in run.node(node, schedule, arrays, ENV):
        bound = {a.name for a in call.args if isinstance(a, BufferRef)}
        written = bound & {v.name for v in node.outputs}
        assert len(written) == (len(results) if is_read else 1)
    stored = run.from_panels(results[-1], ENV["batch"] * ENV["seq"]).reshape(expected[-1].shape)
    assert stored.dtype == np.uint8
    # The numbers before the rounding differ by up to 2e-5, so a byte may be off by one, seldom.
    apart = np.abs(stored.astype(int) - expected[-1].astype(int))
    assert apart.max() <= 1
    assert apart.mean() < 0.01


def test_names_are_unique() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("dtype", [DType.F64, DType.I32])
def test_other_dtypes_have_no_schedule(dtype: DType) -> None:
    graph = Graph("g")
    a = graph.add_input("a", dtype, (BATCH, 8))
    assert schedule_for(graph.add_node("add", [a, a]), TARGETS["avx512"]) is None


def test_broadcasting_has_no_schedule() -> None:
    graph = Graph("g")
    a, b = (graph.add_input(n, DType.F32, s) for n, s in (("a", (BATCH, 8)), ("b", (8,))))
    assert schedule_for(graph.add_node("add", [a, b]), TARGETS["avx512"]) is None
    assert schedule_for(graph.add_node("add", [a, a]), TARGETS["avx512"]) is not None


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((BATCH, 1, 1, SEQ), "key"),
        ((1, 1, 1, SEQ), "key"),
        ((SEQ, SEQ), "full"),
        ((BATCH, 3, SEQ, SEQ), "full"),
        ((BATCH, 1, SEQ, 1), "other"),
    ],
)
def test_kinds_of_masks(shape: tuple[Dim, ...], kind: str) -> None:
    graph = Graph("g")
    x = graph.add_input("x", DType.F32, (BATCH, SEQ, 24))
    mask = graph.add_input("mask", DType.F32, shape)
    attrs = {"heads": 3, "head_size": 8, "scale": 1.0, "q_offset": 0, "k_offset": 0, "v_offset": 0}
    node = graph.add_node("attention", [x, x, x, mask], attrs)
    family = family_for(node)
    assert family is not None
    assert family.workload(node).epilogue == f"mask {kind}"
    assert (schedule_for(node, TARGETS["avx2"]) is None) == (kind == "other")


@pytest.mark.parametrize(
    "level", [pytest.param(n, marks=pytest.mark.isa(n)) for n in ("avx2", "avx512")]
)
def test_bytes_and_scales_of_tokens(level: str, run: Any, rng: np.random.Generator) -> None:
    node, logical = example("quantize_tokens", Graph("g"), rng)
    family = family_for(node)
    assert family is not None
    x = node.input(0)
    expected = OPS[node.op].evaluate([logical[x.name]], node.attrs, ENV)
    results = [np.full_like(in_memory(run, v, np.asarray(y)), 99)
               for v, y in zip(node.outputs, expected, strict=True)]  # fmt: skip
    arrays = {x.name: in_memory(run, x, logical[x.name])}
    arrays |= {v.name: y for v, y in zip(node.outputs, results, strict=True)}
    schedule = family.schedules(family.workload(node), TARGETS[level])[0]
    run.node(node, schedule, arrays, ENV)
    for got, wanted in zip(results, expected, strict=True):
        rows = run.from_panels(got, ENV["batch"] * ENV["seq"])
        np.testing.assert_array_equal(rows.reshape(wanted.shape), wanted)
