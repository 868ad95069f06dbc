"""compile_model: the whole flow, top to bottom."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsec.codegen import tir
from sparsec.codegen.describe import describe_weights, with_targets
from sparsec.codegen.isa import FEATURES
from sparsec.codegen.program import Program
from sparsec.codegen.toolchain import link_library
from sparsec.errors import InvalidInput
from sparsec.files import check_writable, json_text, make_folder, replacing
from sparsec.options import Calibration, CompileOptions
from sparsec.stages import Clock, Progress, build_target, prepare, read_log
from sparsec.target import Isa, Target

LOADER_BEGINS = b'"""Load and run a compiled model'  # runtime/loader.py, since the first version


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
    isa: Isa | str | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    precision: str | None = None,
    calibration: Calibration | None = None,
    dynamic: bool = False,
    keep_fp32: str | Sequence[str] = (),
    rest: str = "fp32",
    attention: str | None = None,
    balance: float | None = None,
    max_error: float | None = None,
    all_roundings: bool = False,
    keep_padding: bool = False,
    threads: int = 1,
    log: str | os.PathLike[str] | None = None,
    dump_ir: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    cc: str | None = None,
    rates: str | os.PathLike[str] | None = None,
    progress: Progress = lambda stage: None,
) -> CompileResult:
    """Compile an ONNX model into a shared library, with its loader `model.py` beside it.

    `target` is a Target, the name of one, or several names with commas between: the library then
    has code for each, and uses that of the best one which the machine that loads it has (default:
    this machine). `shapes` fixes input shapes: per input name the sizes, an int for a fixed one, a
    name for one that stays dynamic.
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
    has any. By default it is the one of the package; "none" is no log. `rates` is the folder of
    what `sparsec calibrate` measured: for this machine, layouts and schedules are chosen by that,
    for runs with `threads` threads (any number runs the library).
    `dump_ir` is a folder for the graph after each pass, `report` a JSON file. `progress` is told
    each stage.

    Raises CompilerError: its subclasses say what was wrong with the model or the arguments.
    Nothing is left behind at `output` when it does.
    """
    names = "native" if target is None else target
    targets = (names,) if isinstance(names, Target) else Target.listed(names)
    level = Isa.named(isa) if isinstance(isa, str) else isa
    if len(targets) > 1 and level is not None:
        raise InvalidInput(
            f"--isa {level.value} limits one target; of several leave out those that are better"
        )
    options = CompileOptions(
        target=targets[0],
        isa=level,
        shapes={name: tuple(sizes) for name, sizes in (shapes or {}).items()},
        precision=precision,
        calibration=calibration,
        dynamic=dynamic,
        keep_fp32=(keep_fp32,) if isinstance(keep_fp32, str) else tuple(keep_fp32),
        rest=rest,
        attention=attention,
        balance=balance,
        max_error=max_error,
        all_roundings=all_roundings,
        keep_padding=keep_padding,
        threads=threads,
        log="none" if log == "none" else Path(log) if log is not None else None,
        dump_ir=Path(dump_ir) if dump_ir is not None else None,
        report=Path(report) if report is not None else None,
        cc=cc,
        rates=Path(rates) if rates is not None else None,
    )
    every = [replace(options, target=one) for one in targets]
    return _compile(Path(model), Path(output), every, progress)


def _compile(
    model: Path, output: Path, every: Sequence[CompileOptions], progress: Progress
) -> CompileResult:
    """`every` is the options for each target, best first: they differ in the target alone."""
    options = every[0]
    _check_output(output, model)
    if options.report is not None:
        check_writable(options.report, model, output, output.with_suffix(".py"), *_read(options))
    if options.dump_ir is not None:
        make_folder(options.dump_ir)
    log = read_log(options)
    clock = Clock(progress)
    prepared = prepare(model, options, clock)
    # All but the last change a copy.
    copies = [*(replace(prepared, graph=prepared.graph.copy()) for _ in every[1:]), prepared]
    built = [
        build_target(_own_dumps(one, len(every)), start, log, clock)
        for one, start in zip(every, copies, strict=True)
    ]
    parts = with_targets([b.part for b in built])

    clock.start("kernels")
    objects = build_kernels(*(part.program for part in parts))

    clock.start("link")
    try:
        blobs = link_library(parts, objects, output, cc=options.cc, progress=progress)
    except OSError as error:
        raise InvalidInput(f"{output}: can not be written: {error.strerror}") from None
    clock.stop()
    report = {
        **built[0].report,
        "weights": describe_weights(parts, blobs),
        "other_targets": [b.report for b in built[1:]],
        "warnings": [str(broken) for broken in log.broken],
        "seconds": clock.seconds,
    }
    if options.report is not None:
        with replacing(options.report) as path:
            path.write_text(json_text(report) + "\n")
    return CompileResult(output, output.with_suffix(".py"), report, clock.seconds)


def build_kernels(*programs: Program) -> dict[str, bytes]:
    """One object file per instruction set, with every kernel that a program calls."""
    by_isa: dict[str, dict[str, Any]] = {}
    for call in itertools.chain.from_iterable(program.calls for program in programs):
        by_isa.setdefault(call.kernel.isa, {})[call.kernel.name] = call.kernel
    return {
        f"kernels_{isa}": tir.build_object(
            [kernel.build() for _, kernel in sorted(kernels.items())], FEATURES[Isa(isa)]
        )
        for isa, kernels in sorted(by_isa.items())
    }


def _own_dumps(options: CompileOptions, targets: int) -> CompileOptions:
    """Of several targets each has a folder of its own for the graph after its passes."""
    if options.dump_ir is None or targets == 1:
        return options
    return replace(options, dump_ir=options.dump_ir / options.target.name)


def _read(options: CompileOptions) -> list[Path]:
    """The files that a compilation reads beside the model."""
    samples, log = options.calibration, options.log
    found = [] if samples is None else [samples.data, samples.text, samples.tokenizer]
    return [path for path in (*found, log) if isinstance(path, Path)]


def _check_output(output: Path, model: Path) -> None:
    if output.suffix != ".so":
        raise InvalidInput(f"{output}: the output must end in .so")
    check_writable(output, model)
    loader = output.with_suffix(".py")
    if loader.exists() and not _is_loader(loader):
        raise InvalidInput(
            f"{output}: its loader would replace {loader}, which is no loader of a model; choose "
            "another name for the library, or move that file away"
        )


def _is_loader(path: Path) -> bool:
    """Whether it is one that a compilation wrote, of any version: they begin alike."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LOADER_BEGINS)) == LOADER_BEGINS
