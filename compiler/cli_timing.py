"""The commands that take times: `bench` and `profile`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsec.errors import InvalidInput
from sparsec.files import json_text
from sparsec.target import LEVELS

AUTO = 0  # what `auto` is read as
# USUAL_BATCH and USUAL_SEQ of tools/inputs.py, which imports NumPy.
BATCH, SEQ = (f"default: what the library is compiled for, else {n}" for n in (1, 128))


def add_commands(commands: Any) -> None:
    _add_bench(commands)
    _add_profile(commands)


def add_isa(p: Any) -> None:
    """The option of all commands that load a library."""
    help = "of a library for several targets, the one of this level (default: the CPU's best)"
    p.add_argument("--isa", choices=LEVELS, help=help)


def _bench(args: argparse.Namespace) -> int:
    return _bench_latency(args) if args.latency_ms is None else _bench_throughput(args)


def _bench_latency(args: argparse.Namespace) -> int:
    from sparsec.tools.bench import bench, print_bench
    from sparsec.tools.console import progress

    if args.instances is not None or AUTO in (args.threads, args.batch):
        raise InvalidInput("--instances and auto are for the search of --latency-ms: add it")
    with progress(args.quiet or args.json) as tell:
        result = bench(
            args.model,
            batch=args.batch,
            seq=args.seq,
            threads=args.threads or 1,
            onnx=args.onnx,
            against=args.against,
            seconds=args.seconds,
            pin=args.pin,
            progress=tell,
            isa=args.isa,
        )
    if args.json:
        print(json_text(result))
    else:
        print_bench(result)
    return 0


def _bench_throughput(args: argparse.Namespace) -> int:
    from sparsec.tools.console import progress
    from sparsec.tools.peer_instances import peer_engines
    from sparsec.tools.throughput import Space, print_throughput, throughput

    if not args.pin:
        raise InvalidInput("--no-pin: with --latency-ms every instance has cores of its own")
    if args.isa is not None:
        raise InvalidInput("--isa: with --latency-ms the search is for this CPU's best code")
    with progress(args.quiet or args.json) as tell:
        result = throughput(
            args.model,
            limit_ms=args.latency_ms,
            seq=args.seq,
            space=Space(args.instances or None, args.threads or None, args.batch or None),
            peers=peer_engines(args.onnx, args.against),
            seconds=args.seconds,
            progress=tell,
        )
    if args.json:
        print(json_text(result))
    else:
        print_throughput(result)
    return 0 if result["engines"]["sparsec"]["met"] else 1


def _profile(args: argparse.Namespace) -> int:
    from sparsec.files import check_writable
    from sparsec.tools.console import progress
    from sparsec.tools.profile import print_profile, profile, write_trace
    from sparsec.tuning.rates_file import cache_folder

    if args.trace:
        check_writable(args.trace, args.model)
    with progress(args.quiet or args.json) as tell:
        result = profile(
            args.model,
            batch=args.batch,
            seq=args.seq,
            threads=args.threads,
            runs=args.runs,
            rates=cache_folder(),
            progress=tell,
            isa=args.isa,
        )
    if args.trace:
        write_trace(result, args.trace)
    if args.json:
        print(json_text(result))
    else:
        print_profile(result, all_steps=args.steps)
    return 0


def _add_bench(commands: Any) -> None:
    p = commands.add_parser("bench", help="time a compiled model, interleaved with a peer")
    p.add_argument("model", type=Path)
    p.add_argument(
        "--latency-ms",
        type=_positive_number,
        metavar="LIMIT",
        help="search for the most samples/s whose p99 latency keeps this limit",
    )
    p.add_argument("--instances", type=_auto, help="with --latency-ms: a number or auto (default)")
    p.add_argument("--batch", type=_auto, help=f"{BATCH}; auto with --latency-ms")
    p.add_argument("--seq", type=at_least(1), help=SEQ)
    p.add_argument("--threads", type=_auto, help="default: 1; auto with --latency-ms")
    p.add_argument("--onnx", type=Path, help="the ONNX file, for the peer")
    p.add_argument(
        "--against",
        choices=["onnxruntime", "openvino"],
        help="default: onnxruntime; all that are installed with --latency-ms",
    )
    p.add_argument(
        "--seconds", type=_positive_number, default=5.0, help="how long to measure (default 5)"
    )
    p.add_argument("--no-pin", dest="pin", action="store_false", help="leave threads to the OS")
    p.add_argument("--json", action="store_true")
    p.add_argument("-q", "--quiet", action="store_true")
    add_isa(p)
    p.set_defaults(command=_bench)


def _add_profile(commands: Any) -> None:
    p = commands.add_parser("profile", help="where the time of a compiled model goes")
    p.add_argument("model", type=Path)
    p.add_argument("--batch", type=at_least(1), help=BATCH)
    p.add_argument("--seq", type=at_least(1), help=SEQ)
    p.add_argument("--threads", type=at_least(1), default=1)
    p.add_argument("--runs", type=at_least(1), default=50)
    p.add_argument("--steps", action="store_true", help="every kernel call instead of every op")
    p.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace (JSON)")
    p.add_argument("--json", action="store_true")
    p.add_argument("-q", "--quiet", action="store_true")
    add_isa(p)
    p.set_defaults(command=_profile)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"wanted {least} or more, got {text!r}")
        return int(text)

    return parse


def _auto(text: str) -> int:
    return AUTO if text == "auto" else at_least(1)(text)


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a number above 0, got {text!r}")
    return value
