"""`sparsec advise`: what each layer would take in each block shape and sparsity.

Nothing is pruned and nothing is measured: times are those of a tuning log where it has them, else
those of the cost model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from sparsec.codegen.kernels import FAMILIES
from sparsec.codegen.kernels.costs import Shape
from sparsec.codegen.kernels.revision import revision
from sparsec.codegen.lower import lower
from sparsec.errors import InvalidInput
from sparsec.ir.dims import evaluate
from sparsec.ir.graph import Graph, Node
from sparsec.ir.layouts import Bsr
from sparsec.ir.schedule import EVERY, Schedule, Workload, bucket_of
from sparsec.options import CompileOptions
from sparsec.passes.choose_weight_layout import PRODUCTS
from sparsec.passes.plan_memory import plan_memory
from sparsec.stages import read_log, scheduled_graph
from sparsec.target import Target
from sparsec.tools.console import console
from sparsec.tuning.cost import (
    CheapestLayout,
    expected_layers,
    expected_seconds,
    shape_of,
    symbols_of,
    usual_shape,
)
from sparsec.tuning.log import Query, TuningLog, ranking
from sparsec.tuning.rates_file import with_known_rates
from sparsec.tuning.record import Machine
from sparsec.tuning.task import tokens_of

SCHEMA = 1  # of the JSON; fields may be added to it, none is taken away or changed
MOST_TOKENS = 1 << 24
MEASURED, MODELLED = "measured", "modelled"

Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class AdviseOptions:
    """Which block shapes (output x input channels) and shares of zero blocks to compare.

    `tokens` is batch x seq of a run, `latency_ms` the budget of one.
    """

    tokens: int = 128
    threads: int = 1
    blocks: tuple[Block, ...] = ((4, 1), (16, 1), (32, 1), (16, 4))
    sparsities: tuple[float, ...] = (0.7, 0.8, 0.9)
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise InvalidInput(f"--tokens {self.tokens}: wanted 1 to {MOST_TOKENS}")
        if self.threads < 1:
            raise InvalidInput(f"--threads {self.threads}: wanted at least 1")
        if not self.sparsities or not all(0.0 < s < 1.0 for s in self.sparsities):
            raise InvalidInput("--sparsities: wanted shares between 0 and 1, such as 0.7,0.8,0.9")
        if not self.blocks or not all(r > 0 and c > 0 for r, c in self.blocks):
            raise InvalidInput("--blocks: wanted output x input channels, such as 4x1,16x4")
        if self.latency_ms is not None and not 0 < self.latency_ms < math.inf:
            raise InvalidInput(f"--latency-ms {self.latency_ms:g}: wanted more than 0")


def advise(model: Path, compile_options: CompileOptions, options: AdviseOptions) -> dict[str, Any]:
    """What docs/advise.md describes. Raises CompilerError when the model cannot be compiled."""
    target, basis = with_known_rates(compile_options.target, compile_options.rates)
    target = target.limited(compile_options.isa)
    graph = scheduled_graph(model, compile_options)
    shape = _shape(graph, options.tokens)
    program = lower(graph, plan_memory(graph), target)
    rows = expected_layers(graph, program, CheapestLayout(target, shape, options.threads))
    as_is = {row["node"]: row["expected_us"] for row in rows}
    symbols = symbols_of(program, shape)
    log = read_log(compile_options)

    def timer(node: Node) -> _Timer:
        work = FAMILIES[node.op].workload(node)
        return _Timer(work, shape_of(node, symbols), target, log, options.threads)

    layers = [
        _layer(node, timer(node), options)
        for node in graph.nodes
        if _is_prunable(node) and evaluate(node.tokens, symbols) == shape.tokens
    ]
    if not layers:
        raise InvalidInput(f"{model}: no layer has a constant weight and works on every token")
    own = {layer["name"] for layer in layers}
    other_us = sum(us for name, us in as_is.items() if name not in own)
    models = _models(layers, other_us, options)
    return {
        "schema": SCHEMA,
        "model": str(model),
        "target": target.name,
        "isa": target.isas[-1].value,
        "precision": compile_options.precision or "fp32",
        "tokens": options.tokens,
        "threads": options.threads,
        "rates": basis,
        "latency_ms": options.latency_ms,
        "other_us": round(other_us, 3),
        "layers": layers,
        "models": models,
        "recommended": _recommended(models),
        "warnings": [str(broken) for broken in log.broken],
    }


@dataclass(frozen=True, slots=True)
class _Timer:
    """Times of one layer's product in any layout: `work` is the layer's as it is."""

    work: Workload
    shape: Shape
    target: Target
    log: TuningLog
    threads: int

    def time(self, block: Block | None, density: float) -> dict[str, Any] | None:
        """Microseconds and what they are of; None when no kernel takes the workload."""
        layout = "dense" if block is None else str(Bsr(*block))
        bucket = bucket_of(self.shape.tokens)
        work = replace(self.work, layout=layout, density=density, bucket=bucket)
        schedules = FAMILIES[work.op].schedules(work, self.target)
        if not schedules:
            return None
        if tokens_of(bucket) == self.shape.tokens:
            found = self._measured(replace(work, bucket=EVERY), schedules)
            if found is not None:
                return found
        seconds = expected_seconds(work, schedules[0], self.shape, self.target, self.threads)
        assert seconds is not None, schedules[0]
        return _timed(1e6 * seconds, MODELLED, schedules[0])

    def _measured(self, work: Workload, allowed: Sequence[Schedule]) -> dict[str, Any] | None:
        machine, code = Machine.of(self.target), revision(work.op) or ""
        query = Query(work, self.shape.tokens, self.threads, machine, code)
        records = [r for r in self.log.exact(query) if r.schedule in allowed]
        if not records:
            return None
        best, _ = ranking(records)[0]
        return _timed(median(r.trial.microseconds for r in records if r.schedule == best),
                      MEASURED, best)  # fmt: skip


def _timed(us: float, basis: str, schedule: Schedule) -> dict[str, Any]:
    return {"us": round(us, 3), "basis": basis, "schedule": str(schedule)}


def _shape(graph: Graph, tokens: int) -> Shape:
    """What the model is run on: a batch of 1, unless the model fixes its sizes."""
    usual = usual_shape(graph)
    sizes = next((v.type.shape[:2] for v in graph.inputs if v.type.rank > 1), ())
    fixed = [size for size in sizes if isinstance(size, int)]
    batch = usual.batch if sizes and isinstance(sizes[0], int) else 1
    if len(fixed) == 2 and usual.tokens != tokens:
        raise InvalidInput(
            f"--tokens {tokens}: the model is fixed to {usual.batch}x{usual.seq}; "
            f"give --tokens {usual.tokens}"
        )
    if tokens % batch:
        raise InvalidInput(f"--tokens {tokens}: wanted a multiple of the model's batch, {batch}")
    return Shape(batch, tokens // batch)


def _is_prunable(node: Node) -> bool:
    return node.op in PRODUCTS and node.input(1).data is not None


def _layer(node: Node, timer: _Timer, options: AdviseOptions) -> dict[str, Any]:
    rows, cols = timer.work.size("m"), timer.work.size("k")
    dense = timer.time(None, 1.0)
    assert dense is not None, node  # it was lowered, so there is a kernel
    found = []
    for block in options.blocks:
        if rows % block[0] or cols % block[1]:
            continue
        for sparsity in options.sparsities:
            time = timer.time(block, round(1.0 - sparsity, 3))
            if time is not None:
                found.append({"block": _name(block), "sparsity": sparsity, **time})
    return {
        "name": node.name,
        "op": node.op,
        "weight": node.input(1).name,
        "rows": rows,
        "cols": cols,
        "dense": dense,
        "options": found,
    }


def _models(
    layers: Sequence[dict[str, Any]], other_us: float, options: AdviseOptions
) -> list[dict[str, Any]]:
    """The whole model with all layers dense, and in each block shape and sparsity."""

    def whole(block: str | None, sparsity: float) -> dict[str, Any]:
        us = other_us + sum(_choice(layer, block, sparsity)["us"] for layer in layers)
        ms = round(us / 1e3, 4)
        meets = None if options.latency_ms is None else ms <= options.latency_ms
        return {"block": block, "sparsity": sparsity, "ms": ms, "meets": meets}

    combinations = itertools.product(options.blocks, options.sparsities)
    return [whole(None, 0.0), *(whole(_name(b), s) for b, s in combinations)]


def _choice(layer: dict[str, Any], block: str | None, sparsity: float) -> dict[str, Any]:
    """A layer that the block does not divide stays dense."""
    found = (o for o in layer["options"] if (o["block"], o["sparsity"]) == (block, sparsity))
    choice: dict[str, Any] = next(found, layer["dense"])
    return choice


def _recommended(models: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of those that meet the budget the least sparse, then the smallest block, then the fastest:
    in the order in which pruning costs accuracy."""
    meeting = [m for m in models if m["meets"]]
    return min(meeting, key=lambda m: (m["sparsity"], _area(m["block"]), m["ms"]), default=None)


def _area(block: str | None) -> int:
    return 0 if block is None else math.prod(int(n) for n in block.split("x"))


def _name(block: Block) -> str:
    return f"{block[0]}x{block[1]}"


def print_advice(advice: Mapping[str, Any]) -> None:
    """Tables: each kind of layer, then the whole model, then what meets the budget."""
    sparsities = sorted({m["sparsity"] for m in advice["models"] if m["block"]})
    table = Table(title=f"microseconds per layer, {advice['tokens']} tokens (* measured)")
    for name in ("layers", "op", "output x input", "dense", "block", *map(_percent, sparsities)):
        table.add_column(name)
    for layer, count in _kinds(advice["layers"]):
        first = (str(count), layer["op"], f"{layer['rows']}x{layer['cols']}", _us(layer["dense"]))
        for block in dict.fromkeys(o["block"] for o in layer["options"]):
            times = [_us(_choice(layer, block, s)) for s in sparsities]
            table.add_row(*first, block, *times)
            first = ("", "", "", "")
    console().print(table)
    whole = Table(title=f"milliseconds of the model, {advice['other_us'] / 1e3:.3f} ms of them "
                  "for all that is not pruned")  # fmt: skip
    for name in ("block", *map(_percent, sparsities)):
        whole.add_column(name)
    dense, *pruned = advice["models"]
    whole.add_row("dense", _ms(dense), *[""] * (len(sparsities) - 1))
    for block in dict.fromkeys(m["block"] for m in pruned):
        whole.add_row(block, *(_ms(m) for m in pruned if m["block"] == block))
    console().print(whole)
    print(f"rates: {advice['rates']}")
    if advice["latency_ms"] is not None:
        print(_verdict(advice))


def _kinds(layers: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """A layer of each kind, and how many there are of it."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        same = {k: v for k, v in layer.items() if k not in ("name", "weight")}
        kinds.setdefault(repr(same), []).append(layer)
    return ((group[0], len(group)) for group in kinds.values())


def _verdict(advice: Mapping[str, Any]) -> str:
    found, budget = advice["recommended"], advice["latency_ms"]
    if found is None:
        fastest = min(advice["models"], key=lambda m: m["ms"])
        return f"nothing meets {budget:g} ms; the fastest takes {fastest['ms']:.3f} ms"
    if found["block"] is None:
        return f"{budget:g} ms: dense meets it, with {found['ms']:.3f} ms"
    return (f"{budget:g} ms: blocks of {found['block']} at {_percent(found['sparsity'])} meet it, "
            f"with {found['ms']:.3f} ms")  # fmt: skip


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:g} %"


def _us(time: Mapping[str, Any]) -> str:
    return f"{time['us']:.1f}{'*' if time['basis'] == MEASURED else ''}"


def _ms(model: Mapping[str, Any]) -> str:
    return f"{model['ms']:.3f}{' meets' if model['meets'] else ''}"
