"""The commands around the tuner: `calibrate`, `tune`, `log` and `advise`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.files import json_text
from sparsec.target import LEVELS

if TYPE_CHECKING:
    from sparsec.options import CompileOptions


def add_commands(commands: Any) -> None:
    _add_calibrate(commands)
    _add_tune(commands)
    _add_log(commands)
    _add_advise(commands)


def _calibrate(args: argparse.Namespace) -> int:
    from sparsec.tools.console import progress
    from sparsec.tools.rates import print_rates
    from sparsec.tuning.machine import calibrate
    from sparsec.tuning.rates_file import cache_folder

    with progress(args.quiet or args.json) as tell:
        known = calibrate(cache_folder(), force=args.force, progress=tell)
    assert known.rates is not None
    if args.json:
        print(json_text({"file": str(known.path), **asdict(known.rates)}))
    elif not args.quiet:
        print_rates(known.rates, known.path)
    return 0


def _tune(args: argparse.Namespace) -> int:
    from sparsec.tools.tune import TuneOptions, print_results, tune

    compile_options = _compile_options(args, "native")
    options = TuneOptions(
        args.log, _numbers(args.tokens), args.threads, args.trials, args.minutes, args.layers,
        args.ray,
    )  # fmt: skip
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent without being asked
    try:
        results = tune(args.model, compile_options, options, quiet=args.quiet)
    except KeyboardInterrupt:
        print(
            f"sparsec: interrupted; every trial that ended is in {args.log}, "
            "and the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    if not args.quiet:
        print_results(results, options)
    return 0


def _compile_options(
    args: argparse.Namespace, target: str, log: str | None = None
) -> CompileOptions:
    """For what asks how fast a model is, and makes no library of it."""
    from sparsec.options import Calibration, CompileOptions
    from sparsec.target import Isa, Target
    from sparsec.tuning.rates_file import cache_folder

    return CompileOptions(
        target=Target.named(target),
        isa=Isa(args.isa) if args.isa else None,
        precision=args.precision,
        # Ranges have no influence on speed, so any will do.
        calibration=Calibration(random=True) if args.precision == "int8" else None,
        threads=args.threads,
        log="none" if log == "none" else Path(log) if log else None,
        rates=cache_folder(),
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        return ()


def _advise(args: argparse.Namespace) -> int:
    from sparsec.tools.advise import AdviseOptions, advise, print_advice

    compile_options = _compile_options(args, args.target, args.log)
    options = AdviseOptions(
        args.tokens, args.threads, _blocks(args.blocks), _shares(args.sparsities), args.latency_ms
    )
    advice = advise(args.model, compile_options, options)
    for warning in advice["warnings"]:
        print(f"sparsec: warning: {warning}", file=sys.stderr)
    if args.json:
        print(json_text(advice))
    else:
        print_advice(advice)
    return 0


def _blocks(text: str) -> tuple[tuple[int, int], ...]:
    found = [_numbers(part.replace("x", ",")) for part in text.split(",")]
    return tuple((f[0], f[1]) for f in found) if all(len(f) == 2 for f in found) else ()


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return ()


def _show(args: argparse.Namespace) -> int:
    from sparsec.tools import tuning_log

    tuning_log.show(args.logs, best=args.subcommand == "best")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from sparsec.tools import tuning_log

    print(f"{args.output}: {tuning_log.merge(args.logs, args.output)} records")
    return 0


def _prune(args: argparse.Namespace) -> int:
    from sparsec.tools import tuning_log

    before, after = tuning_log.prune(args.log, args.keep)
    print(f"{args.log}: {after} of {before} records kept")
    return 0


def _check(args: argparse.Namespace) -> int:
    from sparsec.tools import tuning_log

    return 0 if tuning_log.check(args.logs) else 1


def _plot(args: argparse.Namespace) -> int:
    from sparsec.tools import tuning_log
    from sparsec.tuning.rates_file import cache_folder

    tuning_log.plot(args.logs, args.output, cache_folder())
    print(args.output)
    return 0


def _add_calibrate(commands: Any) -> None:
    p = commands.add_parser("calibrate", help="measure this machine once, for better schedules")
    p.add_argument("--force", action="store_true", help="measure again")
    p.add_argument("--json", action="store_true")
    p.add_argument("-q", "--quiet", action="store_true")
    p.set_defaults(command=_calibrate)


def _add_tune(commands: Any) -> None:
    p = commands.add_parser("tune", help="find the best schedules for this machine")
    p.add_argument("model", type=Path, help="the ONNX file")
    p.add_argument("--log", type=Path, required=True, help="JSON lines to append trials to")
    p.add_argument(
        "--tokens", default="32,128,384", metavar="N,...", help="batch x seq to tune for"
    )
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--trials", type=int, help="of all layers together (default: no limit)")
    p.add_argument("--minutes", type=float, help="default: no limit")
    p.add_argument("--layers", default="", metavar="PATTERN", help="names to tune (default: all)")
    p.add_argument("--ray", metavar="ADDRESS", help="measure on a Ray cluster; local: start one")
    p.add_argument("--precision", choices=["fp32", "bf16", "int8"])
    p.add_argument("--isa", choices=LEVELS, help="use no better")
    p.add_argument("-q", "--quiet", action="store_true")
    p.set_defaults(command=_tune)


def _add_log(commands: Any) -> None:
    p = commands.add_parser("log", help="show, merge, prune, check and plot tuning logs")
    actions = p.add_subparsers(required=True, metavar="ACTION", dest="subcommand")
    for name, text in (("show", "all records"), ("best", "the fastest schedule per workload")):
        action = actions.add_parser(name, help=text)
        action.add_argument("logs", type=Path, nargs="+")
        action.set_defaults(command=_show)
    action = actions.add_parser("merge", help="all records of several logs, once")
    action.add_argument("logs", type=Path, nargs="+")
    action.add_argument("-o", "--output", type=Path, required=True)
    action.set_defaults(command=_merge)
    action = actions.add_parser("prune", help="drop stale records, failures and slow schedules")
    action.add_argument("log", type=Path)
    action.add_argument("--keep", type=int, default=3, help="schedules per workload (default 3)")
    action.set_defaults(command=_prune)
    action = actions.add_parser("check", help="count what is stale or broken; status 1 if broken")
    action.add_argument("logs", type=Path, nargs="+")
    action.set_defaults(command=_check)
    action = actions.add_parser("plot", help="how tuning went, and times by the roofline")
    action.add_argument("logs", type=Path, nargs="+")
    action.add_argument("-o", "--output", type=Path, required=True, help="a .png, .svg or .pdf")
    action.set_defaults(command=_plot)


def _add_advise(commands: Any) -> None:
    p = commands.add_parser("advise", help="which block shape and sparsity meets a latency")
    p.add_argument("model", type=Path, help="the ONNX file, dense or pruned")
    p.add_argument("--target", default="native", help="machine to ask for (default: this one)")
    p.add_argument("--isa", choices=LEVELS, help="use no better")
    p.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="int8")
    p.add_argument("--latency-ms", type=float, metavar="L", help="the budget of one run")
    p.add_argument("--tokens", type=int, default=128, help="batch x seq of a run (default 128)")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--sparsities", default="0.7,0.8,0.9", metavar="S,...")
    p.add_argument("--blocks", default="4x1,16x1,32x1,16x4", metavar="RxC,...")
    p.add_argument("--log", metavar="FILE|none", help="measured times (default: the package's)")
    p.add_argument("--json", action="store_true", help="for pruning recipes: docs/advise.md")
    p.set_defaults(command=_advise)
