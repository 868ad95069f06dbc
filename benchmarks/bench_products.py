"""Our int8 products against oneDNN's dense one, layer by layer, on one pinned core.

    python benchmarks/bench_products.py [--quick] [--json FILE] [--without-amx]

A product is y[out][tokens] = w x + bias from u8 to u8, one scale per output channel: the whole
epilogue, in both engines. Ours is what the compiler chooses for the weight's blocks, the target
and the token count; oneDNN runs the dense weight, since zeros change nothing for it. All sides of
a product take turns; times are medians. Useful is what the blocks that are not zero need, as a
share of the peak of this core's VNNI multiply-adds, measured in registers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median
from time import perf_counter
from typing import Any

import numpy as np
from bench_int8 import peak_of, peak_probe
from onednn import WITHOUT_AMX, OneDnn, find_onednn
from rich.table import Table
from single_kernels import Library, aligned

from sparsec.codegen.isa.int8 import AMX_INT8, INT8_ISAS
from sparsec.codegen.lower import family_of, schedule_of
from sparsec.codegen.program import BufferRef, KernelCall, Region
from sparsec.errors import CompilerError, InvalidInput
from sparsec.ir.dims import evaluate
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.layouts import Panels
from sparsec.ir.types import DType
from sparsec.passes.choose_weight_layout import ChooseWeightLayout
from sparsec.target import Isa, Target, cpu_fields
from sparsec.tools.console import console
from sparsec.tools.turns import Function, in_turns

Array = np.ndarray[Any, Any]
SHAPES = "256x256,1024x256,256x1024,768x768,3072x768,768x3072,1024x1024,4096x1024,1024x4096"
FULL = {"shapes": SHAPES, "tokens": "32,128,384,1024", "zeros": "70,75,80,85,90",
        "blocks": "4x1,16x1,32x1,4x4,16x4"}  # fmt: skip
QUICK = {"shapes": "768x768,3072x768", "tokens": "32,128", "zeros": "80,90", "blocks": "4x1,16x1"}
SECONDS = 0.02  # of each side of each product, at least
X_SCALE, X_ZERO, Y_ZERO = 0.02, 128, 120
WIDTH = Panels().width


@dataclass(frozen=True, slots=True)
class Weight:
    """w[out][in] with `zeros` per cent of its blocks zero; without a block it is dense."""

    block: tuple[int, int] | None
    zeros: int
    data: Array

    @property
    def name(self) -> str:
        return "dense" if self.block is None else f"{self.block[0]}x{self.block[1]}"


@dataclass
class Binder:
    """Gives a kernel family arrays for values and constants."""

    arrays: dict[str, Array]
    bound: list[Array] = field(default_factory=list)

    def ref(self, value: Value) -> BufferRef:
        return self._add(value.name, self.arrays.get(value.name, value.data), value)

    def weight(self, name: str, data: Array) -> BufferRef:
        return self._add(name, aligned(data), None)

    def optional(self, value: Value | None) -> BufferRef | None:
        return None if value is None else self.ref(value)

    def _add(self, name: str, data: Any, value: Value | None) -> BufferRef:
        self.bound.append(data)
        type: Any = None if value is None else value.type
        return BufferRef(Region.ARENA, len(self.bound) - 1, type, name)


class Kernels:
    """Kernels by name; each is built when it is first called for."""

    def __init__(self, target: Target, folder: Path):
        self.target, self.folder = target, folder
        self._libraries: dict[str, Library] = {}

    def calls(self, node: Node, arrays: dict[str, Array]) -> Callable[[], None]:
        """A function that computes the node on the arrays of its values."""
        schedule = schedule_of(node, self.target)
        assert schedule is not None, node
        binder = Binder(arrays)
        lowered = family_of(node, self.target).lower(node, schedule, binder)
        bound = [self._bind(call, binder) for call in lowered]

        def run() -> None:
            for function in bound:
                if function() != 0:
                    raise InvalidInput(f"{node.name}: its kernel failed")

        return run

    def _bind(self, call: KernelCall, binder: Binder) -> Callable[[], int]:
        kernel = call.kernel
        if kernel.name not in self._libraries:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            self._libraries[kernel.name] = Library([kernel], Isa(kernel.isa), folder)
        args = [binder.bound[a.index] if isinstance(a, BufferRef) else a for a in call.args]
        items, scratch = evaluate(call.items, {}), evaluate(call.scratch_bytes, {})
        return self._libraries[kernel.name].bind(kernel, args, items, scratch)


class Product:
    """One shape and token count: the activations that all sides share."""

    def __init__(self, out: int, depth: int, tokens: int):
        self.out, self.depth, self.tokens = out, depth, tokens
        rng = np.random.default_rng(1)
        panels = -(-tokens // WIDTH)
        self.rows = aligned(rng.integers(0, 256, (tokens, depth)).astype(np.uint8))
        self.result_rows = aligned(np.zeros((tokens, out), np.uint8))
        padded = np.zeros((panels * WIDTH, depth), np.uint8)
        padded[:tokens] = self.rows
        self.x = aligned(padded.reshape(panels, WIDTH, depth).transpose(0, 2, 1))
        self.y = aligned(np.zeros((panels, out, WIDTH), np.uint8))
        self.scale = rng.uniform(0.5e-3, 1e-3, out).astype(np.float32)
        self.bias = rng.standard_normal(out).astype(np.float32)
        # A sum of `depth` random products of order 74 * 73: most results are inside u8.
        self.out_scale = float(np.float32(X_SCALE * 0.75e-3 * 74 * 73 * depth**0.5 / 40))

    @property
    def macs(self) -> int:
        return self.out * self.depth * self.tokens

    def weight(self, block: tuple[int, int] | None, zeros: int) -> Weight:
        rng = np.random.default_rng(2)
        w = rng.integers(1, 128, (self.out, self.depth)).astype(np.int8)
        w *= rng.choice(np.array([-1, 1], np.int8), w.shape)
        if block is not None:
            kept = rng.random((-(-self.out // block[0]), -(-self.depth // block[1])))
            mask = np.repeat(np.repeat(kept >= zeros / 100, block[0], 0), block[1], 1)
            w *= mask[: self.out, : self.depth]
        return Weight(block, zeros, w)

    def ours(self, kernels: Kernels, weight: Weight) -> Callable[[], None]:
        graph = Graph("product")
        x = graph.add_input("x", DType.U8, (1, self.tokens, self.depth))
        graph.set_type(x, x.type.with_layout(Panels()))
        operands = [x, graph.add_constant(weight.data, "w"), graph.add_constant(self.scale, "s")]
        attrs = {"activation": "none", "x_scale": X_SCALE, "x_zero_point": X_ZERO,
                 "out_scale": self.out_scale, "out_zero_point": Y_ZERO}  # fmt: skip
        node = graph.add_node(
            "linear_int8", [*operands, graph.add_constant(self.bias, "b"), None], attrs
        )
        graph.set_type(node.output, node.output.type.with_layout(Panels()))
        graph.add_output("y", node.output)
        ChooseWeightLayout().run(graph)
        return kernels.calls(node, {"x": self.x, node.output.name: self.y})

    def onednn(self, library: OneDnn, weight: Weight) -> tuple[Callable[[], Array], str]:
        scale = self.scale * np.float32(X_SCALE)
        operands = (self.rows, weight.data, scale, self.bias, self.result_rows)
        return library.matmul(*operands, self.out_scale, (X_ZERO, Y_ZERO))

    def result(self) -> Array:
        """Ours, as `[tokens, out]`."""
        return self.y.transpose(0, 2, 1).reshape(-1, self.out)[: self.tokens]


def main() -> int:
    """Measure, print and return the exit status."""
    options = parse_arguments()
    if options.without_amx:
        os.environ.setdefault(*WITHOUT_AMX)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # before any library's threads
    try:
        peer = find_peer()
        with tempfile.TemporaryDirectory() as folder:
            records, about = measure_all(options, peer, Path(folder))
    except CompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_tables(records, about)
    return 0


def find_peer() -> OneDnn | None:
    """oneDNN, or a line on standard error why not."""
    try:
        return find_onednn()
    except OSError as error:
        print(f"no peer: {error}", file=sys.stderr)
        return None


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    for name, default in FULL.items():
        add(f"--{name}", metavar="LIST", help=f"default {default}")
    add("--target", default="native", help="target to compile for; default: this machine")
    add("--without-amx", action="store_true", help="keep oneDNN from using AMX")
    add("--seconds", type=float, default=SECONDS, help="of each side of each product")
    add("--quick", action="store_true", help="a few products and blocks")
    add("--json", type=Path, metavar="FILE", help="append a JSON line per weight to this file")
    options = parser.parse_args()
    for name, default in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def measure_all(
    options: argparse.Namespace, peer: OneDnn | None, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A record per weight, and what they were measured with."""
    target = Target.named(options.target)
    missing = [i.value for i in target.isas if not Target.host().has(i)]
    if missing:
        raise InvalidInput(f"--target {options.target}: this machine lacks {', '.join(missing)}")
    vectors = [i for i in INT8_ISAS if i is not AMX_INT8]  # whose peak is the measure
    isa = next(i for i in reversed(vectors) if Target.host().has(i.isa))
    kernels = Kernels(target, folder)
    peak = peak_of(Library([peak_probe(isa)], isa.isa, folder), isa)
    about = {
        "cpu": cpu_fields().get("model name", "this CPU"),
        "isa": target.isas[-1].value,
        "peak_isa": isa.name,
        "onednn": None if peer is None else peer.version,
    }
    records = []
    shapes = [numbers(text, "x", "shapes", 2) for text in options.shapes.split(",")]
    for (out, depth), tokens in product(shapes, numbers(options.tokens, ",", "tokens")):
        found = [{**r, **about} for r in measure(Product(out, depth, tokens), kernels, options,
                                                 peer, peak)]  # fmt: skip
        records += found
        if options.json is not None:
            with options.json.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in found)
        print(f"{out}x{depth}, {tokens} tokens", file=sys.stderr)
    about["implementation"] = ", ".join(sorted({r["implementation"] for r in records}))
    return records, about


def measure(
    one: Product, kernels: Kernels, options: argparse.Namespace, peer: OneDnn | None, peak: float
) -> Iterator[dict[str, Any]]:
    """Yield a record per weight of one product."""
    blocks = [numbers(text, "x", "blocks", 2) for text in options.blocks.split(",")]
    zeros = numbers(options.zeros, ",", "zeros")
    weights = [one.weight(None, 0)]
    weights += [one.weight((r, c), percent) for r, c in blocks for percent in zeros]
    runs: list[Callable[[], Any]] = [one.ours(kernels, w) for w in weights]
    name = ""
    if peer is not None:
        dense, name = one.onednn(peer, weights[0])
        runs[0]()
        check_equal(one, dense())
        runs.append(dense)
    engines = [Function(run, perf_counter) for run in runs]
    medians = [median(taken) for taken in in_turns(engines, options.seconds)]
    theirs = medians.pop() if peer is not None else None
    for weight, seconds in zip(weights, medians, strict=True):
        useful = np.count_nonzero(weight.data) * one.tokens / seconds
        yield {
            "out": one.out,
            "in": one.depth,
            "tokens": one.tokens,
            "block": weight.name,
            "zeros": weight.zeros,
            "sparsec_us": seconds * 1e6,
            "onednn_us": None if theirs is None else theirs * 1e6,
            "ratio": None if theirs is None else theirs / seconds,
            "useful_share": useful / peak,
            "implementation": name,
        }


def check_equal(one: Product, theirs: Array) -> None:
    """oneDNN rounds once more than ours: a result may be a step off."""
    apart = int(np.abs(one.result().astype(int) - theirs.astype(int)).max())
    if apart > 1:
        raise InvalidInput(f"{one.out}x{one.depth}: oneDNN and ours are {apart} steps apart")


def numbers(text: str, separator: str, what: str, count: int | None = None) -> list[int]:
    """Read `32,128` or `4x1`."""
    parts = text.split(separator)
    fits = count in (None, len(parts))
    if not fits or not all(part.isdecimal() and int(part) > 0 for part in parts):
        wanted = "AxB" if count else "numbers from 1 with commas between them"
        raise InvalidInput(f"--{what} {text!r}: wanted {wanted}")
    return [int(part) for part in parts]


def print_tables(records: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Print the tables for people on standard output."""
    out = console()
    peer = f"oneDNN {about['onednn']} {about['implementation']}" if about["onednn"] else "no peer"
    out.print(f"{about['cpu']}; one core; compiled for {about['isa']}; {peer}", highlight=False)
    has_peer = records[0]["ratio"] is not None
    columns = list(dict.fromkeys((r["block"], r["zeros"]) for r in records))
    shown = [c for c in columns if c[1] in (0, 80, 90)] or columns
    out.print(detail(records, shown, has_peer))
    if has_peer:
        out.print(means(records, "ratio", "geometric mean: oneDNN dense / sparsec", "{:.2f}x"))
        print("goals of the best block: 2.5x at 80 %, 5x at 90 % (AMX); of 4x1: 3x and 5x (VNNI)")
    title = f"geometric mean: useful share of the {about['peak_isa']} peak"
    out.print(means(records, "useful_share", title, "{:.0%}"))
    print("goals: 70 % for 4x4 in L2; on AMX, at 8 times this peak per clock, 50 % of its own for "
          "32x1 and 16x4, 80 % zeros, 3072 inputs or more")  # fmt: skip


def detail(records: list[dict[str, Any]], shown: list[tuple[str, int]], has_peer: bool) -> Table:
    """A row per product: oneDNN's time and our speed over it, or our times without it."""
    unit = "times the speed of oneDNN" if has_peer else "us"
    table = Table(title=f"int8 products, u8 results: {unit}")
    heads = ["out x in", "tokens", *["oneDNN\nus"] * has_peer]
    heads += [f"{block}\n{zeros} %" if zeros else block for block, zeros in shown]
    for head in heads:
        table.add_column(head, no_wrap=True)
    key = "ratio" if has_peer else "sparsec_us"
    for size in dict.fromkeys((r["out"], r["in"], r["tokens"]) for r in records):
        row = {(r["block"], r["zeros"]): r for r in records
               if (r["out"], r["in"], r["tokens"]) == size}  # fmt: skip
        first = [f"{next(iter(row.values()))['onednn_us']:.1f}"] if has_peer else []
        cells = [f"{row[column][key]:.2f}" for column in shown]
        table.add_row(f"{size[0]}x{size[1]}", str(size[2]), *first, *cells)
    return table


def means(records: list[dict[str, Any]], key: str, title: str, form: str) -> Table:
    """Blocks down, share of zeros across; the best block is chosen per product."""
    table = Table(title=title)
    levels = sorted({r["zeros"] for r in records if r["zeros"]})
    for column in ("block", "no zeros", *(f"{level} %" for level in levels)):
        table.add_column(column)
    for block in dict.fromkeys(r["block"] for r in records):
        cells = []
        for level in (0, *levels):
            values = [r[key] for r in records if (r["block"], r["zeros"]) == (block, level)]
            cells.append(form.format(geometric_mean(values)) if values else "")
        table.add_row(block, *cells)
    best = ["best block", ""]
    for level in levels:
        of_product: dict[tuple[int, int, int], float] = {}
        for r in records:
            if r["zeros"] == level:
                size = (r["out"], r["in"], r["tokens"])
                of_product[size] = max(r[key], of_product.get(size, 0.0))
        best.append(form.format(geometric_mean(of_product.values())))
    table.add_row(*best)
    return table


if __name__ == "__main__":
    sys.exit(main())
