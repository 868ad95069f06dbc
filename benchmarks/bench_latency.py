"""Most samples per second and core under a latency limit, beside the figures of a publication.

    python benchmarks/bench_latency.py [--model distilbert] [--latency-ms 10] [--seqs 32,128]
                                       [--block 4x1] [--sparsity 80] [--setting "static linear"]
                                       [--deepsparse-python FILE] [--itrex-python FILE]

Builds the pruned model and its int8 library, makes the peers' int8 files of the same network, and
searches instances x threads x batch for every engine, as `sparsec bench --latency-ms` does.
DeepSparse and ITREX, a worker process for each instance, are searched with their dense file and
with files pruned to as many zeros in their own blocks (docs/benchmarks.md). What was published is
from another machine, which the table names.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from bench_files import build, peers, progress
from bench_models import integers, parse_shape
from remote_instances import RemoteEngine
from rich.table import Table
from sparse_peers import SPARSE_ENGINES, add_python_options, installed_version, sparse_files

from sparsec.errors import CompilerError, InvalidInput
from sparsec.models.registry import ModelSpec, find_model
from sparsec.models.weights import Pruning
from sparsec.target import cpu_fields
from sparsec.tools.console import console
from sparsec.tools.instances import Engine
from sparsec.tools.peer_instances import PEER_ENGINES, is_installed, peer_engines
from sparsec.tools.throughput import Space, print_throughput, throughput

# Intel Extension for Transformers, repository, 10 July 2022: int8, 4x1 blocks, batch up to 8, the
# best setup of instances. Samples/s of the whole machine by (model, limit in ms, length, per cent
# of zeros).
PUBLISHED_MACHINE = "24 cores of a Xeon Platinum 8375C (AWS c6i.12xlarge)"
PUBLISHED_CORES = 24
PUBLISHED = {
    ("bert-mini", 1.0, 32, 80): 24910,
    ("bert-mini", 1.0, 32, 90): 31211,
    ("bert-mini", 1.0, 128, 80): 6081,
    ("bert-mini", 1.0, 128, 90): 6221,
    ("distilbert", 10.0, 32, 80): 5440,
    ("distilbert", 10.0, 32, 90): 7901,
    ("distilbert", 10.0, 128, 80): 1130,
    ("distilbert", 10.0, 128, 90): 1627,
    ("bert-base", 20.0, 32, 80): 2921,
    ("bert-base", 20.0, 32, 90): 4750,
    ("bert-base", 20.0, 128, 80): 701,
    ("bert-base", 20.0, 128, 90): 961,
    ("bert-large", 50.0, 32, 80): 870,
    ("bert-large", 50.0, 32, 90): 1304,
    ("bert-large", 50.0, 128, 80): 207,
    ("bert-large", 50.0, 128, 90): 320,
}


def main() -> int:
    """Measure, print and return the exit status."""
    options = parse_arguments()
    try:
        results = list(measure(options))
    except CompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))
    for result in results:
        print_throughput(result)
    print_per_core(results, options)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="throughput under a latency limit")
    add = parser.add_argument
    add("--model", default="distilbert")
    add("--latency-ms", type=float, default=10.0, help="most p99 latency; default 10")
    add("--seqs", default="32,128", metavar="N,...", help="lengths; default 32,128")
    add("--block", default="4x1", metavar="RxC", help="output x input; default 4x1")
    add("--sparsity", type=int, default=80, metavar="PERCENT", help="default 80")
    add(
        "--setting", default="static linear", help="int8 file of the peers: or static all, dynamic"
    )
    add_python_options(parser)
    add("--seconds", type=float, default=5.0, help="of the last measurement of each engine")
    add("--folder", type=Path, default=Path("out/bench"), metavar="DIR", help="models, libraries")
    add("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    options.precision, options.target = "int8", "native"  # as bench_files reads them
    return options


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The result of `throughput` for each length."""
    seqs = integers(options.seqs, "seqs")
    if not 0 < options.latency_ms < float("inf") or not 0 < options.sparsity < 100:
        raise InvalidInput(
            "--latency-ms and --sparsity: wanted numbers above 0, below 100 per cent"
        )
    spec = find_model(options.model)
    versions = {name: installed_version(name, options) for name in SPARSE_ENGINES}
    library = build(spec, options, Pruning(options.sparsity / 100, *parse_shape(options.block)))
    with ExitStack() as stack:
        remote = [stack.enter_context(closing(e)) for e in remote_engines(spec, options, versions)]
        engines = [*local_engines(spec, options), *remote]
        status = stack.enter_context(progress.status("starting"))
        return [
            throughput(
                library.path,
                limit_ms=options.latency_ms,
                seq=seq,
                space=Space(),
                peers=engines,
                seconds=options.seconds,
                progress=lambda stage: status.update(stage),
            )
            for seq in seqs
        ]


def local_engines(spec: ModelSpec, options: argparse.Namespace) -> list[Engine]:
    """The installed peers of this Python, with the int8 file asked for."""
    installed = [name for name in PEER_ENGINES if is_installed(name)]
    if not installed:
        return []
    files = {side.setting: side.path for side in peers(spec, options, installed)}
    if options.setting not in files:
        raise InvalidInput(f"--setting {options.setting!r}: known are {', '.join(files)}")
    return [*peer_engines(files[options.setting], None)]


def remote_engines(
    spec: ModelSpec, options: argparse.Namespace, versions: dict[str, str | None]
) -> list[RemoteEngine]:
    """Those of SPARSE_ENGINES that have a version, with the files that can be made."""
    engines = []
    for name, version in versions.items():
        if version is not None:
            kind = SPARSE_ENGINES[name]
            files = list(sparse_files(spec, options, name, [options.sparsity]))
            engines.append(RemoteEngine(f"{kind.title} {version}", files, kind.copies))
    return engines


def print_per_core(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A row per length: samples/s per core of all engines here, and what was published."""
    names: dict[str, None] = {}
    for result in results:
        names |= dict.fromkeys((*result["engines"], *(f["engine"] for f in result["failures"])))
    limit = f"p99 <= {options.latency_ms:g} ms"
    title = (
        f"{options.model}, {options.block}, {options.sparsity} % zeros, {limit}: samples/s/core"
    )
    table = Table(title=title)
    for column in ("length", *names, "published"):
        table.add_column(column)
    for result in results:
        cells = [_per_core(result["engines"].get(name)) for name in names]
        key = (options.model, options.latency_ms, result["seq"], options.sparsity)
        known = PUBLISHED.get(key) if options.block == "4x1" else None
        published = f"{known / PUBLISHED_CORES:.1f}" if known else "-"
        table.add_row(str(result["seq"]), *cells, published)
    console().print(table)
    here = cpu_fields().get("model name", "a CPU without a name")
    print(f"Here: {results[0]['cores']} cores of a {here}. Published: {PUBLISHED_MACHINE}.")


def _per_core(engine: dict[str, Any] | None) -> str:
    if engine is None:
        return "fails"
    return f"{engine['best']['samples_per_s_per_core']:.1f}" if engine["met"] else "misses"


if __name__ == "__main__":
    sys.exit(main())
