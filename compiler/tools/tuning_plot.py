"""`sparsec log plot`: how tuning went, and how far its results are from the machine's limits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from sparsec.errors import InvalidInput, MissingPackage
from sparsec.files import replacing
from sparsec.rates import Rates, default_rates, product_of
from sparsec.target import Target
from sparsec.tuning.log_files import Group, best, group_of
from sparsec.tuning.rates_file import with_known_rates
from sparsec.tuning.record import Machine, Outcome, TuningRecord

FORMATS = (".png", ".svg", ".pdf")
MOST_IN_LEGEND = 8
SIZE_INCHES = (13.0, 5.5)
_BYTES = {"u8s8": 1, "u8s9": 1, "bf16": 2, "f32": 4}
_RESULT_BYTES = {"u8": 1, "bf16": 2}


def plot(records: Sequence[TuningRecord], output: Path, rates_folder: Path | None) -> None:
    """Write the picture: left the best ratio so far, right times by the roofline.

    Raises InvalidInput when there is nothing to draw or no way to write it, MissingPackage
    without matplotlib.
    """
    if output.suffix not in FORMATS:
        raise InvalidInput(f"{output}: wanted a name that ends in {', '.join(FORMATS)}")
    if not any(record.outcome is Outcome.OK for record in records):
        raise InvalidInput("there is no successful trial in the log: nothing to draw")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingPackage("matplotlib", "plot") from None
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_courses(left, records)
    _draw_roofline(right, records, rates_folder)
    with replacing(output) as path:
        figure.savefig(path, format=output.suffix[1:], dpi=120)


def courses(records: Iterable[TuningRecord]) -> dict[Group, list[float]]:
    """Per workload the least ratio after each trial; the heuristic's own is 1."""
    ratios: dict[Group, list[float]] = {}
    for record in records:
        ratios.setdefault(group_of(record), []).append(record.ratio)
    return {group: list(itertools.accumulate([1.0, *values], min))
            for group, values in ratios.items()}  # fmt: skip


def roofline_seconds(record: TuningRecord, rates: Rates) -> float | None:
    """The least time of a product: its useful multiply-accumulates at the peak, or its bytes.

    Weights come from L3 or memory, activations from L2. None for what is no product.
    Williams, Waterman, Patterson: Roofline (2009).
    """
    work, machine = record.workload, record.machine
    sizes = dict(work.sizes)
    if not work.op.startswith("linear") or not {"m", "k"} <= sizes.keys():
        return None
    m, k, width = sizes["m"], sizes["k"], _BYTES.get(work.dtype, 4)
    macs = m * k * work.density * record.tokens
    weight_bytes = m * k * work.density * width
    end = work.epilogue.split()[-1] if work.epilogue else ""
    activation_bytes = record.tokens * (k * width + m * _RESULT_BYTES.get(end, 4))
    level = "l3" if weight_bytes <= machine.l3_bytes / 2 else "dram"
    busiest = max(
        macs / rates.peak(product_of(work.op, record.schedule.isa)),
        weight_bytes / rates.level_bandwidth(level),
        activation_bytes / rates.level_bandwidth("l2"),
    )
    return float(busiest / record.threads)


def rates_of(machine: Machine, folder: Path | None) -> Rates:
    """As `sparsec calibrate` measured them if the machine is this one, else its defaults."""
    host = Target.host()
    if machine.cpu == Machine.of(host).cpu:
        return with_known_rates(host, folder)[0].rates
    return default_rates(machine.cpu)


def _draw_courses(axes: Any, records: Sequence[TuningRecord]) -> None:
    found = courses(records)
    names = _names(records)
    for group, ratios in found.items():
        label = names[group] if len(found) <= MOST_IN_LEGEND else None
        axes.step(range(len(ratios)), ratios, where="post", alpha=0.6, label=label)
    longest = max(map(len, found.values()))
    padded = [[*r, *[r[-1]] * (longest - len(r))] for r in found.values()]
    mean = [geometric_mean(column) for column in zip(*padded, strict=True)]
    axes.step(range(longest), mean, where="post", color="black", label="geometric mean")
    axes.set(xlabel="trials", ylabel="best time so far, heuristic = 1")
    axes.set_title(f"{len(found)} workloads, {len(records)} trials")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _draw_roofline(axes: Any, records: Sequence[TuningRecord], folder: Path | None) -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    sources = set()
    for record in best(records):
        rates = rates_of(record.machine, folder)
        least = roofline_seconds(record, rates)
        if least is not None:
            label = f"{record.workload.op} {record.schedule.isa}, {record.machine.cpu}"
            points.setdefault(label, []).append((1e6 * least, record.trial.microseconds))
            sources.add(rates.source)
    for label, pairs in points.items():
        axes.scatter(*zip(*pairs, strict=True), s=14, label=label)
    axes.set(xlabel="roofline, us", ylabel="best measured, us")
    axes.set_title("no products" if not points else f"rates: {', '.join(sorted(sources))}")
    if points:
        ends = [f(v for pairs in points.values() for pair in pairs for v in pair)
                for f in (min, max)]  # fmt: skip
        for share, style in ((1.0, "-"), (0.5, "--"), (0.25, ":")):
            axes.plot(ends, [e / share for e in ends], style, color="grey", lw=1,
                      label=f"{share:.0%} of the roofline")  # fmt: skip
        axes.set(xscale="log", yscale="log")
        axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3, which="both")


def _names(records: Iterable[TuningRecord]) -> Mapping[Group, str]:
    return {group_of(r): f"{r.workload}, {r.tokens} tokens" for r in records}
