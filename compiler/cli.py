"""The command line: arguments in, exit status out. The work is done in driver and tools.

Exit status: 0 done; 1 a check that was asked for failed (`verify`, the limit of `bench
--latency-ms`); 2 the request or its input was wrong: one message on standard error, nothing
written.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import __version__
from sparsec.cli_compress import add_commands as add_compress_commands
from sparsec.cli_timing import add_commands as add_timing_commands
from sparsec.cli_timing import add_isa
from sparsec.cli_tuning import add_commands as add_tuning_commands
from sparsec.errors import CompilerError, InvalidInput, MissingPackage
from sparsec.files import json_text
from sparsec.target import LEVELS

if TYPE_CHECKING:
    from sparsec.options import Calibration

EXAMPLES = """examples:
  sparsec compile model.onnx -o model.so
  sparsec verify model.so --onnx model.onnx
  sparsec bench model.so --batch 1 --seq 128 --threads 1 --onnx model.onnx
  sparsec bench model.so --latency-ms 10 --seq 32 --onnx model.onnx
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    _prepare_streams()
    args = _parser().parse_args(argv)
    try:
        return int(args.command(args))
    except BrokenPipeError:  # who read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (CompilerError, OSError) as error:
        return _refuse(error)
    except MemoryError as error:
        return _refuse(InvalidInput(f"there is not enough memory: {error}"))
    except ModuleNotFoundError as error:
        return _refuse(MissingPackage(error.name))
    except KeyboardInterrupt:
        print("sparsec: interrupted", file=sys.stderr)
        return 130


def _prepare_streams() -> None:
    """So that what is printed can be: a stream may be closed, or of few characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.StringIO())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _refuse(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print(f"sparsec: error: {text}", file=sys.stderr)
    return 2


def _compile(args: argparse.Namespace) -> int:
    from sparsec.driver import compile_model
    from sparsec.options import parse_shapes
    from sparsec.target import Isa
    from sparsec.tools.console import progress
    from sparsec.tuning.rates_file import cache_folder

    with progress(args.quiet) as tell:
        result = compile_model(
            args.model,
            args.output,
            target=args.target,
            isa=Isa(args.isa) if args.isa else None,
            shapes=parse_shapes(args.shape),
            precision=args.precision,
            calibration=_calibration(args),
            dynamic=args.dynamic,
            keep_fp32=args.keep_fp32,
            rest=args.rest,
            attention=args.attention,
            balance=args.balance,
            max_error=args.max_error,
            all_roundings=args.all_roundings,
            keep_padding=args.keep_padding,
            threads=args.threads,
            log=args.log,
            dump_ir=args.dump_ir,
            report=args.report,
            cc=args.cc,
            rates=cache_folder(),
            progress=tell,
        )
    for warning in result.report["warnings"]:
        print(f"sparsec: warning: {warning}", file=sys.stderr)
    if not args.quiet:
        _print_summary(result)
    return 0


def _calibration(args: argparse.Namespace) -> Calibration | None:
    """What the command line says about calibration; None when it says nothing."""
    from sparsec.options import Calibration

    given = args.calibration
    if given is None and args.calibration_text is None:
        for name in ("calibration_method", "tokenizer"):
            if getattr(args, name) is not None:
                option = "--" + name.replace("_", "-")
                raise InvalidInput(
                    f"{option} goes with --calibration or --calibration-text: give samples"
                )
        return None
    return Calibration(
        data=Path(given) if given not in (None, "random") else None,
        text=args.calibration_text,
        tokenizer=args.tokenizer,
        random=given == "random",
        method=args.calibration_method or "minmax",
    )


def _print_summary(result: Any) -> None:
    from sparsec.tools.inspect import arena_text

    report = result.report
    size = result.library.stat().st_size
    total = sum(result.seconds.values())
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    every = [report, *report["other_targets"]]
    isas = ", ".join(dict.fromkeys(one["isa"] for one in every))
    print(f"{result.library}: {size / 1e6:.1f} MB for {isas}, {total:.1f} s ({stages})")
    if len(every) > 1:
        print(_weights_text(report["weights"]))
    for one in every:
        if len(every) > 1:
            print(f"{one['target']}:")
        for line in (arena_text(one["arena"]), *_notes(one)):
            print(line)


def _weights_text(weights: dict[str, Any]) -> str:
    """How much of a library's constants its targets share."""
    each = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in weights["target_bytes"].items())
    shared = weights["shared_bytes"] / 1e6
    return f"weights: {weights['bytes'] / 1e6:.1f} MB, {shared:.1f} MB of it for all ({each})"


def _notes(report: dict[str, Any]) -> list[str]:
    """What is slower, or faster, than might be expected of the code for a target."""
    layers, notes = report["layers"], []
    slow = sorted({layer["op"] for layer in layers if layer["generic"]})
    if slow:
        notes.append(f"generic (not hand-tuned) ops: {', '.join(slow)}")
    if report["isa"] != "avx2" and any("int8_gemm.avx2" in x["schedule"] for x in layers):
        notes.append("int8 products use AVX2 kernels: the target has AVX-512 without VNNI")
    left = {p["name"]: p["notes"] for p in report["passes"]}
    if left.get("quantize"):
        in_int8 = sum(layer["op"] == "linear_int8" for layer in layers)
        of = in_int8 + sum(layer["op"] == "linear" for layer in layers)
        first, *more = left["quantize"]
        others = f"; and {len(more)} more products" if more else ""
        notes.append(f"{in_int8} of {of} products in int8: {first}{others}")
    if left.get("quantize_attention"):
        first, *more = left["quantize_attention"]
        notes.append(first + (f"; and {len(more)} more attentions" if more else ""))
    padding = report["padding"]
    dropped = "padding tokens are not computed; outputs there are 0"
    return [*notes, dropped if padding["dropped"] else padding["why"]]


def _run(args: argparse.Namespace) -> int:
    from sparsec.tools.run import run_file

    for line in run_file(
        args.model, args.inputs, args.outputs, threads=args.threads, isa=args.isa
    ):
        print(line)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from sparsec.tools.inspect import inspect_file, print_inspection

    found = inspect_file(args.file, args.isa)
    if args.json:
        print(json_text(found))
    else:
        print_inspection(found)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from sparsec.tools.console import progress
    from sparsec.tools.verify import print_verification, verify

    with progress(args.quiet or args.json) as tell:
        result = verify(
            args.model,
            args.onnx,
            shapes=None if args.shapes is None else _shapes(args.shapes),
            threads=args.threads,
            tolerance=args.tolerance,
            seed=args.seed,
            progress=tell,
            isa=args.isa,
        )
    if args.json:
        print(json_text(result))
    else:
        print_verification(result)
    return 0 if result["passed"] else 1


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"wanted 0 or more, got {text!r}")
    return int(text)


def _shapes(text: str) -> list[tuple[int, int]]:
    return [_batch_seq(part) for part in text.split(",")]


def _batch_seq(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise InvalidInput(f"shape {text!r}: wanted BATCHxSEQ, for example 1x128")
    return int(parts[0]), int(parts[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsec",
        description="Compile a transformer encoder in ONNX into one standalone shared library.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparsec {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_compile, _add_run, _add_inspect, _add_verify):
        add(commands)
    add_timing_commands(commands)
    add_tuning_commands(commands)
    add_compress_commands(commands)
    return parser


def _add_compile(commands: Any) -> None:
    p = commands.add_parser("compile", help="model.onnx -> model.so and its loader model.py")
    p.add_argument("model", type=Path, help="the ONNX file")
    p.add_argument("-o", "--output", type=Path, required=True, help="the library, ending in .so")
    p.add_argument(
        "--target",
        default="native",
        metavar="NAME,...",
        help="machines to compile for (default: this one)",
    )
    p.add_argument("--isa", choices=LEVELS, help="use no better")
    p.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=1x128",
        help="fix an input's shape; a name instead of a size keeps that axis dynamic",
    )
    p.add_argument(
        "--precision",
        choices=["fp32", "bf16", "int8"],
        help="default: int8 for a quantised (QDQ) model, else fp32",
    )
    p.add_argument(
        "--calibration",
        metavar="FILE.npz|random",
        help="int8: samples, an array per input, first axis = samples; or random tokens, for "
        "benchmarks only",
    )
    p.add_argument("--calibration-text", type=Path, metavar="FILE", help="int8: lines of text")
    p.add_argument("--tokenizer", type=Path, metavar="FILE", help="the model's tokenizer.json")
    p.add_argument(
        "--calibration-method",
        choices=["minmax", "percentile", "entropy", "mse"],
        help="how ranges are found in the samples (default: minmax)",
    )
    p.add_argument(
        "--dynamic",
        action="store_true",
        help="int8: a scale per token, found when the model runs; needs no calibration",
    )
    p.add_argument(
        "--keep-fp32",
        action="append",
        default=[],
        metavar="PATTERN",
        help="int8, bf16: leave layers whose name matches in fp32; may be given more than once",
    )
    p.add_argument(
        "--rest",
        choices=["fp32", "bf16"],
        default="fp32",
        help="int8: precision of the layers that int8 leaves",
    )
    p.add_argument(
        "--attention",
        choices=["fp32", "bf16", "int8"],
        help="precision of attention (default: that of the layers)",
    )
    p.add_argument(
        "--balance",
        type=float,
        metavar="ALPHA",
        help="int8: move outlier channels of activations into the weights, as SmoothQuant does; "
        "0 to 1, usually 0.5",
    )
    p.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="int8: leave as many layers in fp32 as the outputs need to be within this relative "
        "error on the calibration data, for example 0.02",
    )
    p.add_argument(
        "--all-roundings",
        action="store_true",
        help="QDQ models: round wherever the file does, to compare answers; slower",
    )
    p.add_argument(
        "--keep-padding",
        action="store_true",
        help="compute padding tokens even where they can not matter",
    )
    p.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="choose layouts and schedules for so many threads (default 1); any number can run it",
    )
    p.add_argument(
        "--log",
        metavar="FILE|none",
        help="schedules from a tuning log (default: the one of the package)",
    )
    p.add_argument("--dump-ir", type=Path, metavar="DIR", help="write the graph after each pass")
    p.add_argument("--report", type=Path, metavar="FILE", help="write what was done, as JSON")
    p.add_argument("--cc", help="a C compiler to use instead of the packaged one")
    p.add_argument("-q", "--quiet", action="store_true")
    p.set_defaults(command=_compile)


def _add_run(commands: Any) -> None:
    p = commands.add_parser("run", help="run a model on the arrays of an npz file")
    p.add_argument("model", type=Path)
    p.add_argument("-i", "--inputs", type=Path, required=True, help="npz: one array per input")
    p.add_argument("-o", "--outputs", type=Path, required=True, help="npz to write")
    p.add_argument("--threads", type=int, default=0, help="0: all cores (default)")
    add_isa(p)
    p.set_defaults(command=_run)


def _add_inspect(commands: Any) -> None:
    p = commands.add_parser("inspect", help="what is in an ONNX file or a compiled model")
    p.add_argument("file", type=Path)
    p.add_argument("--json", action="store_true")
    add_isa(p)
    p.set_defaults(command=_inspect)


def _add_verify(commands: Any) -> None:
    p = commands.add_parser("verify", help="compare a compiled model with its ONNX file")
    p.add_argument("model", type=Path)
    p.add_argument("--onnx", type=Path, required=True)
    p.add_argument(
        "--shapes",
        metavar="BxS,...",
        help="default: 1x1,1x7,3x33,2x128, sequences cut to those that the model can take",
    )
    p.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute error allowed")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--seed", type=_seed, default=0)
    p.add_argument("--json", action="store_true")
    p.add_argument("-q", "--quiet", action="store_true")
    add_isa(p)
    p.set_defaults(command=_verify)
