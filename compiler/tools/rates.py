"""The measured rates of a machine as a table."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from rich.table import Table

from sparsec.rates import LEVELS, Ports, Rates
from sparsec.tools.console import console


def print_rates(rates: Rates, path: Path) -> None:
    """On standard output."""
    out = console()
    table = Table(title=f"one core at {rates.hertz / 1e9:.2f} GHz")
    for column in ("what", "rate"):
        table.add_column(column)
    for name, _ in rates.products:
        table.add_row(f"{name} multiply-accumulates", f"{rates.peak(name) / 1e9:.0f} G/s")
    for bits, ports in rates.ports:
        cycles = ", ".join(f"{f.name} {getattr(ports, f.name):.2f}" for f in fields(Ports))
        table.add_row(f"cycles of {bits} bits", cycles)
    for level, bandwidth in zip(LEVELS, rates.bandwidth, strict=True):
        table.add_row(f"reads from {level}", f"{bandwidth / 1e9:.1f} GB/s")
    table.add_row("a kernel call", f"{rates.call_seconds * 1e9:.0f} ns")
    table.add_row("a second thread", f"{rates.barrier_seconds * 1e6:.1f} us")
    out.print(table)
    out.print(str(path), highlight=False)
