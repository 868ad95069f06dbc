"""compile_model: the whole flow, top to bottom."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsec.calibration import (
    Feed,
    calibrate,
    channel_maxima,
    choose_range,
    load_calibration,
    random_batches,
    table_rows,
)
from sparsec.calibration_text import text_batches
from sparsec.codegen import tir
from sparsec.codegen.describe import describe_arena
from sparsec.codegen.isa import FEATURES
from sparsec.codegen.kernels import schedule_for
from sparsec.codegen.lower import lower
from sparsec.codegen.program import Program
from sparsec.codegen.toolchain import build_library
from sparsec.errors import InvalidInput
from sparsec.fallback import Accuracy, fall_back
from sparsec.frontend.onnx_import import import_model
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
from sparsec.passes.manager import PassManager, PassRecord
from sparsec.passes.pack_tokens import NAME as PACK_TOKENS
from sparsec.passes.pack_tokens import padded_ports
from sparsec.passes.plan_memory import plan_memory
from sparsec.passes.quantize_tables import QuantizeTables
from sparsec.ranges import Channels
from sparsec.target import Isa, Target
from sparsec.tuning.cost import CheapestLayout, expected_layers, usual_shape
from sparsec.tuning.log import TuningLog
from sparsec.tuning.lookup import schedule_from
from sparsec.tuning.rates_file import with_known_rates

Progress = Callable[[str], None]

RANDOM_SAMPLES = 4
RANDOM_TOKENS = 128


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What `compile_model` made. `seconds` is the wall time of each stage."""

    library: Path
    loader: Path
    report: Mapping[str, Any]
    seconds: Mapping[str, float]


def compile_model(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    target: str | Target | None = None,
    isa: Isa | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    precision: str | None = None,
    calibration: Calibration | None = None,
    dynamic: bool = False,
    keep_fp32: Sequence[str] = (),
    rest: str = "fp32",
    attention: str | None = None,
    balance: float | None = None,
    max_error: float | None = None,
    all_roundings: bool = False,
    keep_padding: bool = False,
    log: str | os.PathLike[str] | None = None,
    dump_ir: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    cc: str | None = None,
    rates: str | os.PathLike[str] | None = None,
    progress: Progress = lambda stage: None,
) -> CompileResult:
    """Compile an ONNX model into a shared library, with its loader `model.py` beside it.

    `target` is a Target or the name of one (default: this machine). `shapes` fixes input shapes:
    per input name the sizes, an int for a fixed one, a name for one that stays dynamic.
    `precision` is fp32, bf16 or int8; by default a quantised model is int8, any other fp32. int8
    needs `calibration` unless the model is quantised or `dynamic` asks for a scale per token,
    found when the model runs. It and bf16 leave the layers whose names match a pattern in
    `keep_fp32`, int8 as many others as the outputs on the calibration samples need to be within
    `max_error`, relative, of fp32. With `rest` bf16 those that int8 leaves are bf16. `attention`
    is the precision of attention, by default that of the products. `balance`, 0 to 1, says how
    much of the channels' differences int8 products move from inputs to weights. With
    `all_roundings` a quantised model rounds wherever its file does, which is slower, not only
    what its products read. With `keep_padding` padding is computed even where it can not matter;
    else the outputs of such tokens are 0. `log` is a tuning log: schedules come from it where it
    has any. `rates` is the folder of what `sparsec calibrate` measured: for this machine, layouts
    and schedules are chosen by that. `dump_ir` is a folder for the graph after each pass,
    `report` a JSON file. `progress` is told each stage.

    Raises CompilerError: its subclasses say what was wrong with the model or the arguments.
    Nothing is left behind at `output` when it does.
    """
    options = CompileOptions(
        target=target if isinstance(target, Target) else Target.named(target or "native"),
        isa=isa,
        shapes={name: tuple(sizes) for name, sizes in (shapes or {}).items()},
        precision=precision,
        calibration=calibration,
        dynamic=dynamic,
        keep_fp32=tuple(keep_fp32),
        rest=rest,
        attention=attention,
        balance=balance,
        max_error=max_error,
        all_roundings=all_roundings,
        keep_padding=keep_padding,
        log=Path(log) if log is not None else None,
        dump_ir=Path(dump_ir) if dump_ir is not None else None,
        report=Path(report) if report is not None else None,
        cc=cc,
        rates=Path(rates) if rates is not None else None,
    )
    return _compile(Path(model), Path(output), options, progress)


def _compile(
    model: Path, output: Path, options: CompileOptions, progress: Progress
) -> CompileResult:
    _check_output(output)
    log = _read_log(options)
    clock = _Clock(progress)
    clock.start("import")
    graph = import_model(model, overrides=options.shapes)
    ranges = {value.name: rows for value, rows in table_rows(graph).items()}

    layouts, basis = _layouts(graph, options)
    target = layouts.target
    precision, records, accuracy = _transform(graph, layouts, options, log, clock)

    clock.start("lower")
    plan = plan_memory(graph)
    program = lower(graph, plan, target)

    clock.start("kernels")
    objects = build_kernels(program)

    clock.start("link")
    isa = max((Isa(c.kernel.isa) for c in program.calls), key=list(Isa).index, default=Isa.AVX2)
    description = {**_describe(graph, plan, target, ranges), "padding": _padding(graph, records)}
    build_library(
        program,
        objects,
        output,
        isa=isa,
        metadata=description,
        cc=options.cc,
        progress=progress,
    )
    clock.stop()
    report = {
        "isa": isa.value,
        "precision": precision,
        **({} if accuracy is None else {"accuracy": accuracy.described()}),
        **description,
        "arena": describe_arena(program),
        "expected": _expected(graph, program, layouts, basis),
        "passes": records,
        "warnings": [str(broken) for broken in log.broken],
        "seconds": clock.seconds,
    }
    if options.report is not None:
        _write_json(options.report, report)
    return CompileResult(output, output.with_suffix(".py"), report, clock.seconds)


def scheduled_graph(model: Path, options: CompileOptions) -> Graph:
    """The model as it is lowered: after all passes. Raises CompilerError."""
    graph = import_model(model, overrides=options.shapes)
    layouts, _ = _layouts(graph, options)
    _transform(graph, layouts, options, _read_log(options), _Clock(lambda stage: None))
    return graph


def _layouts(graph: Graph, options: CompileOptions) -> tuple[CheapestLayout, str]:
    """For the target that the options leave, by the best rates that are known; and which."""
    target, basis = with_known_rates(options.target, options.rates)
    return CheapestLayout(_limited(target, options.isa), usual_shape(graph)), basis


def _read_log(options: CompileOptions) -> TuningLog:
    return TuningLog() if options.log is None else TuningLog.read(options.log)


def _transform(
    graph: Graph, layouts: CheapestLayout, options: CompileOptions, log: TuningLog, clock: _Clock
) -> tuple[str, list[PassRecord], Accuracy | None]:
    """Runs all passes on `graph`; returns its precision, what each did, and what int8 loses."""
    target, dump, accuracy = layouts.target, _dumper(options.dump_ir), None
    clock.start("passes")
    pipeline = graph_pipeline(roundings=_roundings(options))
    records = PassManager(pipeline, dump).run(graph)
    int8 = options.is_int8(is_quantized(graph))

    def supported(node: Node) -> bool:
        return schedule_for(node, target) is not None

    if int8:
        if options.balance is not None and options.calibration is not None:
            clock.start("balance")
            records += PassManager([_balance(graph, options.balance, options)], dump).run(graph)
        pipeline, accuracy = _int8(graph, options, supported, clock)
        clock.start("quantise")
        records += PassManager(pipeline, dump).run(graph)
    if options.uses_bf16:
        clock.start("bf16")
        records += PassManager(_bf16(options, supported), dump).run(graph)
    clock.start("schedule")
    pipeline = target_pipeline(
        lambda node, bucket: schedule_from(log, node, bucket, target),
        layouts,
        keep_padding=options.keep_padding,
    )
    records += PassManager(pipeline, dump).run(graph)
    return "int8" if int8 else options.precision or "fp32", records, accuracy


def _int8(
    graph: Graph, options: CompileOptions, supported: Callable[[Node], bool], clock: _Clock
) -> tuple[list[Pass], Accuracy | None]:
    """The passes, and what int8 loses by them where that is limited."""
    clock.start("calibrate")
    quantization, accuracy = _quantization(graph, options), None
    attention = options.attention in (None, "int8")
    if options.max_error is not None and options.calibration is not None:
        clock.start("fall back")
        accuracy = fall_back(
            graph,
            quantization,
            _samples(graph, options.calibration),
            options.max_error,
            tables=QuantizeTables(quantization.keep_fp32, supported),
            attention=attention,
        )
        quantization = replace(quantization, fallback=accuracy.fp32)
    undo = [] if options.balance is None else [Unbalance(quantization.fallback)]
    return [*undo, *int8_pipeline(quantization, supported, attention=attention)], accuracy


def _balance(graph: Graph, alpha: float, options: CompileOptions) -> Balance:
    assert options.calibration is not None
    names = balanced_values(graph, options.keep_fp32)
    maxima = channel_maxima(graph, _samples(graph, options.calibration), names)
    return Balance(maxima, alpha, options.keep_fp32)


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


def _samples(graph: Graph, calibration: Calibration) -> Iterable[Feed]:
    match calibration:
        case Calibration(data=Path() as path):
            return load_calibration(path, graph)
        case Calibration(text=Path() as path, tokenizer=Path() as tokenizer):
            return text_batches(path, tokenizer, graph)
    return random_batches(graph, RANDOM_SAMPLES, RANDOM_TOKENS)


def build_kernels(program: Program) -> dict[str, bytes]:
    """One object file per instruction set, with every kernel that the program calls."""
    by_isa: dict[str, dict[str, Any]] = {}
    for call in program.calls:
        by_isa.setdefault(call.kernel.isa, {})[call.kernel.name] = call.kernel
    return {
        f"kernels_{isa}": tir.build_object(
            [kernel.build() for _, kernel in sorted(kernels.items())], FEATURES[Isa(isa)]
        )
        for isa, kernels in sorted(by_isa.items())
    }


def _limited(target: Target, isa: Isa | None) -> Target:
    if isa is None:
        return target
    levels = list(Isa)
    keep = tuple(i for i in target.isas if levels.index(i) <= levels.index(isa))
    return replace(target, isas=keep)


def _describe(
    graph: Graph, plan: MemoryPlan, target: Target, ranges: Mapping[str, int]
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
        "input_ranges": dict(ranges),
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


def _check_output(output: Path) -> None:
    if output.suffix != ".so":
        raise InvalidInput(f"{output}: the output must end in .so")
    if not output.parent.is_dir():
        raise InvalidInput(f"{output}: the folder {output.parent} does not exist; create it first")


def _dumper(folder: Path | None) -> Callable[[int, str, Graph], None] | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)

    numbers = itertools.count(1)  # the pipeline runs in parts

    def dump(_: int, name: str, graph: Graph) -> None:
        (folder / f"{next(numbers):02d}_{name}.txt").write_text(print_graph(graph))

    return dump


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)


class _Clock:
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
            self.seconds[self._stage] = time.perf_counter() - self._since
        self._stage = ""
