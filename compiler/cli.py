"""The command line: arguments in, exit status out. The work is done in driver and tools.

Exit status: 0 done; 1 a check that was asked for failed (`verify`, the limit of `bench
--latency-ms`); 2 the request or its input was wrong: one message on standard error, nothing
written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsec import __version__
from sparsec.cli_compile import add_commands as add_compile_commands
from sparsec.cli_compress import add_commands as add_compress_commands
from sparsec.cli_timing import add_commands as add_timing_commands
from sparsec.cli_timing import add_isa, at_least
from sparsec.cli_tuning import add_commands as add_tuning_commands
from sparsec.errors import CompilerError, InvalidInput, MissingPackage
from sparsec.files import json_text

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
        with contextlib.suppress(OSError):  # a stream that is no file has nothing to flush
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
    add_compile_commands(commands)
    for add in (_add_run, _add_inspect, _add_verify):
        add(commands)
    add_timing_commands(commands)
    add_tuning_commands(commands)
    add_compress_commands(commands)
    return parser


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
    p.add_argument("--seed", type=at_least(0), default=0)
    p.add_argument("--json", action="store_true")
    p.add_argument("-q", "--quiet", action="store_true")
    add_isa(p)
    p.set_defaults(command=_verify)
