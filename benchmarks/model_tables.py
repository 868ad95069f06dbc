"""What bench_models.py prints: a table with a row per library, and means with the goals."""

from __future__ import annotations

import sys
from statistics import geometric_mean
from typing import Any

from rich.console import Console
from rich.table import Table

GOALS_AMX = {80: 6.0, 90: 8.0}  # of the best block, by per cent of zeros
GOAL_WITHOUT_AMX = 3.0
GOAL_EASIEST = 2.5  # 4x1 with 80 % zeros, and no zeros at all


def print_tables(records: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Print the table for people on standard output."""
    out = Console(width=None if sys.stdout.isatty() else 160)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    compiled = f"compiled for {about['target']} ({about['target_isa']})"
    limited = "; OpenVINO without AMX" if about["peers_without_amx"] else ""
    out.print(about["cpu"], about["cpu_isa"], compiled, versions + limited, sep="; ")
    sides = [side for record in records for side in record["settings"]]
    groups = list(dict.fromkeys(side["group"] for side in sides))
    table = Table(
        title=f"median ms ({about['clock']} clock), in turns; ratio: best peer / sparsec"
    )
    for column in ("model", "BxS", "threads", "block", "zeros", "sparsec", *groups, "ratio"):
        table.add_column(column)
    table.add_column("max error" if records[0]["precision"] == "fp32" else "cosine")
    for record in records:
        table.add_row(*cells(record, groups))
    out.print(table)
    if records[0]["precision"] == "int8" and any(record["ratio"] for record in records):
        out.print(summary_table(records))


def summary_table(records: list[dict[str, Any]]) -> Table:
    """Geometric means of the ratio over all shapes, per model and threads, with the goals."""
    title = "geometric means of best peer / sparsec; in brackets the goal"
    table = Table(title=title)
    kinds = list(dict.fromkeys((r["block"], r["sparsity"]) for r in records))
    best = [("best block", level) for level in dict.fromkeys(k[1] for k in kinds) if level]
    table.add_column("model")
    table.add_column("threads")
    for block, sparsity in (*kinds, *best):
        wanted = goal(block, sparsity, records[0]["target_isa"])
        name = f"{block} {sparsity} %" if sparsity else block
        table.add_column(f"{name} ({wanted:g}x)" if wanted else name)
    for model, threads in dict.fromkeys((r["model"], r["threads"]) for r in records):
        own = [r for r in records if (r["model"], r["threads"]) == (model, threads)]
        ratios = {kind: [r["ratio"] for r in own if (r["block"], r["sparsity"]) == kind]
                  for kind in kinds}  # fmt: skip
        for kind in best:
            columns = [v for k, v in ratios.items() if k[1] == kind[1] and k not in best]
            ratios[kind] = [max(cell) for cell in zip(*columns, strict=True)]
        texts = [f"{geometric_mean(ratios[kind]):.2f}" for kind in (*kinds, *best)]
        table.add_row(model, str(threads), *texts)
    return table


def goal(block: str, sparsity: int, target_isa: str) -> float | None:
    """How many times as fast as the best peer this should be."""
    if block == "best block":
        return GOALS_AMX.get(sparsity) if target_isa == "amx" else GOAL_WITHOUT_AMX
    return GOAL_EASIEST if (block, sparsity) in (("dense", 0), ("4x1", 80)) else None


def cells(record: dict[str, Any], groups: list[str]) -> list[str]:
    """The texts of one row."""
    fp32 = record["precision"] == "fp32"
    medians = [record["sparsec"], *(record["peers"].get(group) for group in groups)]
    return [
        record["model"],
        f"{record['batch']}x{record['seq']}",
        str(record["threads"]),
        record["block"],
        f"{record['sparsity']} %",
        *(f"{figure['median_ms']:.3f}" if figure else "-" for figure in medians),
        f"{record['ratio']:.2f}" if record["ratio"] else "-",
        f"{record['max_abs_error']:.1e}" if fp32 else f"{record['cosine']:.4f}",
    ]
