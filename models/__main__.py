"""python -m sparsec.models: build a zoo model, or export a Hugging Face model folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from sparsec.errors import CompilerError, InvalidInput
from sparsec.files import check_writable
from sparsec.models.build import DEFAULT_OPSET, build_file
from sparsec.models.export import EXPORTERS, export_file
from sparsec.models.registry import HEADS, MODELS, find_model
from sparsec.models.weights import Pruning

BAD_INPUT = 2  # exit status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except CompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return 130
    return 0


def _build(options: argparse.Namespace) -> None:
    spec = find_model(options.name)
    pruning = _pruning(options.sparsity, options.block)
    check_writable(options.output)
    with _progress() as progress:
        task = progress.add_task(f"building {spec.name}", total=spec.layers + 1)
        files = build_file(
            spec,
            options.output,
            head=options.head,
            seed=options.seed,
            pruning=pruning,
            opset=options.opset,
            spelled=options.ops == "spelled",
            on_layer=lambda: progress.advance(task),
        )
        progress.advance(task)
    _print_written(files)


def _export(options: argparse.Namespace) -> None:
    check_writable(options.output)
    with _progress() as progress:
        task = progress.add_task("exporting", total=None)
        result = export_file(
            options.folder,
            options.output,
            head=options.head,
            opset=options.opset,
            exporter=options.exporter,
            on_step=lambda step: progress.update(task, description=step),
        )
    for name, difference in result.differences.items():
        print(f"{name}: max abs difference to torch {difference:.2e}")
    _print_written(result.files)


def _print_written(files: list[Path]) -> None:
    for file in files:
        print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _pruning(sparsity: float | None, block: str | None) -> Pruning | None:
    if sparsity is None:
        if block is not None:
            raise InvalidInput("--block wants --sparsity with it")
        return None
    rows, cross, cols = (block or "4x1").partition("x")
    if not (cross and rows.isdecimal() and cols.isdecimal()):
        raise InvalidInput(f"--block {block}: write it as ROWSxCOLS (output x input), like 4x1")
    return Pruning(sparsity, int(rows), int(cols))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsec.models", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="write a zoo model with random weights")
    build.add_argument("name", metavar="NAME", help=", ".join(MODELS))
    build.add_argument(
        "--sparsity", type=float, metavar="S", help="share of zero blocks, like 0.8"
    )
    build.add_argument("--block", metavar="RxC", help="output x input channels (default 4x1)")
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--opset", type=int, default=DEFAULT_OPSET)
    build.add_argument(
        "--ops",
        choices=["spelled", "fused"],
        default="spelled",
        help="LayerNorm and GELU in elementary operators, or as one where the opset has it",
    )
    build.set_defaults(command=_build)

    export = commands.add_parser("export", help="export a Hugging Face model folder (needs torch)")
    export.add_argument("folder", type=Path, metavar="DIR", help="config.json and safetensors")
    export.add_argument("--exporter", choices=list(EXPORTERS), default="torchscript")
    export.add_argument("--opset", type=int, help="default: the usual one of the exporter")
    export.set_defaults(command=_export)

    for command in (build, export):
        command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
        command.add_argument("--head", choices=HEADS, default="none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
