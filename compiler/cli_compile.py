"""The command `compile`: from an ONNX file to a library and its loader."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import InvalidInput
from sparsec.target import LEVELS

if TYPE_CHECKING:
    from sparsec.options import Calibration

# As sparsec.options and sparsec.ranges have them, which import NumPy: too slow for every command.
PRECISIONS, METHODS = ("fp32", "bf16", "int8"), ("minmax", "percentile", "entropy", "mse")
# Options that compile_model takes as they are given.
SAME = (
    "target", "isa", "precision", "dynamic", "keep_fp32", "rest", "attention", "balance",
    "max_error", "all_roundings", "keep_padding", "threads", "log", "dump_ir", "report", "cc",
)  # fmt: skip


def add_commands(commands: Any) -> None:
    p = commands.add_parser("compile", help="model.onnx -> model.so and its loader model.py")
    p.add_argument("model", type=Path, help="the ONNX file")
    p.add_argument("-o", "--output", type=Path, required=True, help="the library, ending in .so")
    _add_machine(p)
    _add_precision(p)
    _add_samples(p)
    p.add_argument("--dump-ir", type=Path, metavar="DIR", help="write the graph after each pass")
    p.add_argument("--report", type=Path, metavar="FILE", help="write what was done, as JSON")
    p.add_argument("--cc", help="a C compiler to use instead of the packaged one")
    p.add_argument("-q", "--quiet", action="store_true")
    p.set_defaults(command=_compile)


def _add_machine(p: Any) -> None:
    """Where the library is to run, and with what sizes."""
    p.add_argument("--target", default="native", metavar="NAME,...",
                   help="machines to compile for (default: this one)")  # fmt: skip
    p.add_argument("--isa", choices=LEVELS, help="use no better")
    p.add_argument("--shape", action="append", default=[], metavar="NAME=1x128",
                   help="fix an input's shape; a name instead of a size keeps that axis "
                   "dynamic")  # fmt: skip
    p.add_argument("--keep-padding", action="store_true",
                   help="compute padding tokens even where they can not matter")  # fmt: skip
    p.add_argument("--threads", type=int, default=1, metavar="N",
                   help="choose layouts and schedules for so many threads (default 1); any "
                   "number can run it")  # fmt: skip
    p.add_argument("--log", metavar="FILE|none",
                   help="schedules from a tuning log (default: the one of the "
                   "package)")  # fmt: skip


def _add_precision(p: Any) -> None:
    """What is computed how."""
    p.add_argument("--precision", choices=PRECISIONS,
                   help="default: int8 for a quantised (QDQ) model, else fp32")  # fmt: skip
    p.add_argument("--dynamic", action="store_true",
                   help="int8: a scale per token, found when the model runs; needs no "
                   "calibration")  # fmt: skip
    p.add_argument("--keep-fp32", action="append", default=[], metavar="PATTERN",
                   help="int8, bf16: leave layers whose name matches in fp32; may be given more "
                   "than once")  # fmt: skip
    p.add_argument("--rest", choices=["fp32", "bf16"], default="fp32",
                   help="int8: precision of the layers that int8 leaves")  # fmt: skip
    p.add_argument("--attention", choices=PRECISIONS,
                   help="precision of attention (default: that of the layers)")  # fmt: skip
    p.add_argument("--max-error", type=float, metavar="E",
                   help="int8: leave as many layers in fp32 as the outputs need to be within this "
                   "relative error on the calibration data, for example 0.02")  # fmt: skip
    p.add_argument("--all-roundings", action="store_true",
                   help="QDQ models: round wherever the file does, to compare answers; "
                   "slower")  # fmt: skip


def _add_samples(p: Any) -> None:
    """Where the ranges of int8 come from."""
    p.add_argument("--calibration", metavar="FILE.npz|random",
                   help="int8: samples, an array per input, first axis = samples; or random "
                   "tokens, for benchmarks only")  # fmt: skip
    p.add_argument("--calibration-text", type=Path, metavar="FILE", help="int8: lines of text")
    p.add_argument("--tokenizer", type=Path, metavar="FILE", help="the model's tokenizer.json")
    p.add_argument("--calibration-method", choices=METHODS,
                   help="how ranges are found in the samples (default: minmax)")  # fmt: skip
    p.add_argument("--balance", type=float, metavar="ALPHA",
                   help="int8: move outlier channels of activations into the weights, as "
                   "SmoothQuant does; 0 to 1, usually 0.5")  # fmt: skip


def _compile(args: argparse.Namespace) -> int:
    from sparsec.driver import compile_model
    from sparsec.options import parse_shapes
    from sparsec.tools.console import progress
    from sparsec.tuning.rates_file import cache_folder

    with progress(args.quiet) as tell:
        result = compile_model(
            args.model,
            args.output,
            shapes=parse_shapes(args.shape),
            calibration=_calibration(args),
            **{name: getattr(args, name) for name in SAME},
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
