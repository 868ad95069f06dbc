"""The stages of a compilation: what all targets share, then the program for each of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsec.calibration import (
    Feed,
    calibrate,
    channel_maxima,
    load_calibration,
    random_batches,
    table_rows,
)
from sparsec.calibration_text import text_batches
from sparsec.codegen.describe import describe_arena, describe_chains
from sparsec.codegen.kernels import schedule_for
from sparsec.codegen.lower import lower
from sparsec.codegen.program import Part, Program
from sparsec.fallback import Accuracy, fall_back
from sparsec.files import make_folder
from sparsec.frontend.onnx_import import import_model
from sparsec.ir.chains import Chained
from sparsec.ir.graph import Graph, Node
from sparsec.ir.memory_plan import MemoryPlan
from sparsec.ir.printer import print_graph
from sparsec.options import Calibration, CompileOptions
from sparsec.passes import (
    Balance,
    Pass,
    Quantization,
    Roundings,
    Unbalance,
    attention_values,
    balanced_values,
    bf16_pipeline,
    graph_pipeline,
    int8_pipeline,
    is_quantized,
    quantized_values,
    target_pipeline,
)
from sparsec.passes.find_chains import find_chains
from sparsec.passes.manager import DumpHook, PassManager, PassRecord
from sparsec.passes.pack_tokens import NAME as PACK_TOKENS
from sparsec.passes.pack_tokens import padded_ports
from sparsec.passes.plan_memory import plan_memory
from sparsec.passes.quantize_tables import QuantizeTables
from sparsec.ranges import Channels, choose_range
from sparsec.target import Isa, Target
from sparsec.tuning.cost import CheapestLayout, expected_layers, fp32_is_faster, usual_shape
from sparsec.tuning.log import TuningLog
from sparsec.tuning.lookup import default_log, schedule_from
from sparsec.tuning.rates_file import with_known_rates

Progress = Callable[[str], None]

RANDOM_SAMPLES = 4  # of each length
RANDOM_LENGTHS = (128, 32, 8, 1)  # tokens


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model before a target is known, what each pass did so far, and if it is to be int8 the
    ranges. `rows` are those of its tables of tokens and the like, by input."""

    graph: Graph
    rows: Mapping[str, int]
    records: list[PassRecord]
    quantization: Quantization | None


@dataclass(frozen=True, slots=True)
class Built:
    """The code for one target, and what was done for it."""

    part: Part
    report: Mapping[str, Any]


def prepare(model: Path, options: CompileOptions, clock: Clock) -> Prepared:
    """Import, the passes that know no target, and the calibration samples."""
    clock.start("import")
    graph = import_model(model, overrides=options.shapes)
    rows = {value.name: count for value, count in table_rows(graph).items()}
    clock.start("passes")
    pipeline = graph_pipeline(roundings=_roundings(options))
    dump = _dumper(options.dump_ir)
    records = PassManager(pipeline, dump).run(graph)
    if not options.is_int8(is_quantized(graph)):
        return Prepared(graph, rows, records, None)
    if options.balance is not None and options.calibration is not None:
        clock.start("balance")
        passes = [_balance(graph, options.calibration, options.balance, options.keep_fp32)]
        records += PassManager(passes, dump).run(graph)
    clock.start("calibrate")
    return Prepared(graph, rows, records, _quantization(graph, options))


def build_target(
    options: CompileOptions, prepared: Prepared, log: TuningLog, clock: Clock
) -> Built:
    """The program for the target of the options. The graph is changed: each target needs a copy
    of its own."""
    graph = prepared.graph
    layouts, basis = _layouts(graph, options)
    target = layouts.target
    records, accuracy = _transform(prepared, layouts, options, log, clock)
    records = [*prepared.records, *records]
    clock.start("lower")
    plan = plan_memory(graph)
    program = lower(graph, plan, target, _chained(graph, target))
    isa = max((Isa(c.kernel.isa) for c in program.calls), key=lambda i: i.rank, default=Isa.AVX2)
    description = {
        **_describe(graph, plan, target, prepared.rows),
        "padding": _padding(graph, records),
    }
    report = {
        "isa": isa.value,
        "precision": "int8" if prepared.quantization else options.precision or "fp32",
        **({} if accuracy is None else {"accuracy": accuracy.as_compiled(graph).described()}),
        **description,
        "chains": describe_chains(program),
        "arena": describe_arena(program),
        "expected": _expected(graph, program, layouts, basis),
        "passes": records,
    }
    return Built(Part(program, target.name, target.level, isa, description), report)


def _chained(graph: Graph, target: Target) -> Chained | None:
    """What can be computed some panels at a time, with the memory plan for that."""
    chains = find_chains(graph, _supported(target), target.l2_bytes)
    return Chained(chains, plan_memory(graph, chains)) if chains else None


def _supported(target: Target) -> Callable[[Node], bool]:
    """Whether a kernel made for its op computes a node on the target."""
    return lambda node: schedule_for(node, target) is not None


def scheduled_graph(model: Path, options: CompileOptions) -> Graph:
    """The model as it is lowered: after all passes. Raises CompilerError."""
    clock = Clock(lambda stage: None)
    prepared = prepare(model, options, clock)
    layouts, _ = _layouts(prepared.graph, options)
    _transform(prepared, layouts, options, read_log(options), clock)
    return prepared.graph


def _layouts(graph: Graph, options: CompileOptions) -> tuple[CheapestLayout, str]:
    """For the target that the options leave, by the best rates that are known; and which."""
    target, basis = with_known_rates(options.target, options.rates)
    return CheapestLayout(target.limited(options.isa), usual_shape(graph), options.threads), basis


def read_log(options: CompileOptions) -> TuningLog:
    """The log that the options name, or the one of the package."""
    if options.log is None:
        return default_log()
    return TuningLog() if options.log == "none" else TuningLog.read(options.log)


def _transform(
    prepared: Prepared,
    layouts: CheapestLayout,
    options: CompileOptions,
    log: TuningLog,
    clock: Clock,
) -> tuple[list[PassRecord], Accuracy | None]:
    """Runs the passes for a target; returns what each did, and what int8 loses."""
    graph, target, accuracy = prepared.graph, layouts.target, None
    dump = _dumper(options.dump_ir, len(prepared.records))
    records: list[PassRecord] = []
    supported = _supported(target)
    if prepared.quantization is not None:
        pipeline, accuracy = _int8(prepared, options, layouts, supported, clock)
        clock.start("quantise")
        records += PassManager(pipeline, dump).run(graph)
    if options.uses_bf16:
        clock.start("bf16")
        records += PassManager(_bf16(options, supported), dump).run(graph)
    clock.start("schedule")
    pipeline = target_pipeline(
        lambda node, bucket: schedule_from(log, node, bucket, target, options.threads),
        layouts,
        keep_padding=options.keep_padding,
    )
    return records + PassManager(pipeline, dump).run(graph), accuracy


def _int8(
    prepared: Prepared,
    options: CompileOptions,
    layouts: CheapestLayout,
    supported: Callable[[Node], bool],
    clock: Clock,
) -> tuple[list[Pass], Accuracy | None]:
    """The passes, and what int8 loses by them where that is limited."""
    graph, quantization = prepared.graph, prepared.quantization
    assert quantization is not None
    attention, accuracy = options.attention in (None, "int8"), None
    if options.max_error is not None and options.calibration is not None:
        clock.start("fall back")
        accuracy = fall_back(
            graph,
            quantization,
            _samples(graph, options.calibration),
            options.max_error,
            tables=QuantizeTables(
                quantization.keep_fp32, supported, only_own=options.all_roundings
            ),
            attention=attention,
        )
        quantization = replace(quantization, fallback=accuracy.fp32)
    undo = [] if options.balance is None else [Unbalance(quantization.fallback)]

    def objection(fp32: Node, int8: Node) -> str | None:
        asked = options.attention == "int8"
        return None if asked else fp32_is_faster(fp32, int8, layouts.shape, layouts.target)

    passes = int8_pipeline(
        quantization,
        supported,
        attention=attention,
        objection=objection,
        all_roundings=options.all_roundings,
    )
    return [*undo, *passes], accuracy


def _bf16(options: CompileOptions, supported: Callable[[Node], bool]) -> list[Pass]:
    alone = options.precision == "bf16"
    return bf16_pipeline(
        products=alone or options.rest == "bf16",
        attention=options.attention == "bf16" or (alone and options.attention is None),
        keep_fp32=options.keep_fp32 if alone else (),  # int8 has left them already
        supported=supported,
    )


def _roundings(options: CompileOptions) -> Roundings:
    if options.precision in ("fp32", "bf16"):
        return Roundings.NONE
    return Roundings.ALL if options.all_roundings else Roundings.PRODUCTS


def _quantization(graph: Graph, options: CompileOptions) -> Quantization:
    """The ranges of the values that int8 products read, by running the samples.

    A model that is quantised has its own: without calibration only those are used.
    """
    calibration, keep_fp32 = options.calibration, options.keep_fp32
    if calibration is None:
        return Quantization({}, keep_fp32, options.dynamic)
    names: list[str | Channels] = [*quantized_values(graph, keep_fp32)]
    names += attention_values(graph)
    observed = calibrate(graph, _samples(graph, calibration), names)
    ranges = {name: choose_range(o, calibration.method) for name, o in observed.items()}
    return Quantization(ranges, keep_fp32)


def _balance(
    graph: Graph, calibration: Calibration, alpha: float, keep_fp32: tuple[str, ...]
) -> Balance:
    names = balanced_values(graph, keep_fp32)
    maxima = channel_maxima(graph, _samples(graph, calibration), names)
    return Balance(maxima, alpha, keep_fp32)


def _samples(graph: Graph, calibration: Calibration) -> Iterable[Feed]:
    if calibration.data is not None:
        return load_calibration(calibration.data, graph)
    if calibration.text is not None and calibration.tokenizer is not None:
        return text_batches(calibration.text, calibration.tokenizer, graph)
    assert calibration.random
    return random_batches(graph, RANDOM_SAMPLES, RANDOM_LENGTHS)


def _describe(
    graph: Graph, plan: MemoryPlan, target: Target, rows: Mapping[str, int]
) -> dict[str, Any]:
    """How each layer was compiled, as plain data: part of the library, so without any times."""
    layers = [
        {
            "node": node.name,
            "op": node.op,
            "type": ", ".join(str(v.type) for v in node.outputs),
            "schedule": "; ".join(map(str, node.schedules)),
            "source": ", ".join(dict.fromkeys(c.schedule.source for c in node.schedules)),
            "generic": any(c.schedule.family == "generic" for c in node.schedules),
        }
        for node in graph.nodes
        if node.outputs[0].name not in plan.view_of
    ]
    return {
        "target": target.name,
        "input_ranges": dict(rows),
        "layers": layers,
    }


def _padding(graph: Graph, records: Sequence[PassRecord]) -> dict[str, Any]:
    """Whether padding is dropped: by which mask, and which outputs are 0 there; or why not."""
    record = next((r for r in records if r["name"] == PACK_TOKENS), None)
    if record is None:
        return {"dropped": False, "why": "padding is computed: --keep-padding"}
    if not record["changed"]:
        return {"dropped": False, "why": "; ".join(record["notes"])}
    mask, outputs = padded_ports(graph)
    return {"dropped": True, "mask": mask, "outputs": outputs}


def _expected(
    graph: Graph, program: Program, layouts: CheapestLayout, basis: str
) -> dict[str, Any]:
    """What the cost model says: of the report, and not of the library, which is without times."""
    layers = expected_layers(graph, program, layouts)
    return {
        "batch": layouts.shape.batch,
        "seq": layouts.shape.seq,
        "threads": layouts.threads,
        "rates": basis,
        "total_us": round(sum(row["expected_us"] for row in layers), 3),
        "layers": layers,
    }


def _dumper(folder: Path | None, passes: int = 0) -> DumpHook | None:
    """Numbers the files on from `passes`: the pipeline runs in parts."""
    if folder is None:
        return None
    make_folder(folder)
    numbers = itertools.count(passes + 1)

    def dump(name: str, graph: Graph) -> None:
        (folder / f"{next(numbers):02d}_{name}.txt").write_text(print_graph(graph))

    return dump


class Clock:
    """Times the stages and tells them."""

    def __init__(self, progress: Progress):
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._stage = ""
        self._since = 0.0

    def start(self, stage: str) -> None:
        self.stop()
        self._stage, self._since = stage, time.perf_counter()
        self._progress(stage)

    def stop(self) -> None:
        if self._stage:
            before = self.seconds.get(self._stage, 0.0)  # of other targets
            self.seconds[self._stage] = before + time.perf_counter() - self._since
        self._stage = ""
