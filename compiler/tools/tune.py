"""`sparsec tune`: finds the best schedules of a model's layers for this machine."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparsec.codegen.kernels import FAMILIES
from sparsec.codegen.lower import family_of, schedules_of
from sparsec.errors import InvalidInput
from sparsec.ir.dims import Dim, evaluate, symbols
from sparsec.ir.graph import Graph, Node
from sparsec.ir.schedule import Bucket, buckets
from sparsec.options import CompileOptions
from sparsec.passes.padding_proof import ATTENTIONS
from sparsec.stages import scheduled_graph
from sparsec.target import Target
from sparsec.tools.console import console, warn
from sparsec.tuning.cluster import tune_on
from sparsec.tuning.log import TuningLog, append
from sparsec.tuning.rates_file import with_known_rates
from sparsec.tuning.ray_nodes import LOCAL, ray_nodes
from sparsec.tuning.record import Machine, Trial
from sparsec.tuning.search import Budget
from sparsec.tuning.task import Task, task_of
from sparsec.tuning.tuner import Job, Result, Tell, Tuner

LEAST_SHARE = 1e-3  # of the model's work: what is less is not worth a trial


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What to tune: for the buckets of `tokens`, the layers whose names match `layers`."""

    log: Path
    tokens: tuple[int, ...]
    threads: int = 1
    trials: int | None = None
    minutes: float | None = None
    layers: str = ""
    ray: str | None = None  # the address of a cluster to measure on

    def __post_init__(self) -> None:
        if not self.tokens or min(self.tokens) < 1:
            raise InvalidInput("--tokens: wanted numbers of at least 1, such as 32,128,384")
        if self.threads < 1:
            raise InvalidInput(f"--threads {self.threads}: wanted at least 1")
        if self.trials is not None and self.trials < 1:
            raise InvalidInput(f"--trials {self.trials}: wanted at least 1")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InvalidInput(f"--minutes {self.minutes:g}: wanted more than 0")
        try:
            re.compile(self.layers)
        except re.error as error:
            raise InvalidInput(f"--layers {self.layers!r} is no pattern: {error}") from None


def tune(
    model: Path, compile_options: CompileOptions, options: TuneOptions, *, quiet: bool = False
) -> list[Result]:
    """Tune the model's layers and append every trial to the log, which is made if need be.

    Trials in the log are not repeated: a run that was stopped goes on where it was. Raises
    CompilerError when the model cannot be compiled or no layer is left to tune.
    """
    log = TuningLog.read(options.log) if options.log.exists() else TuningLog()
    if log.broken and not log.records:
        raise InvalidInput(f"{options.log}: no line of it is a tuning record; name another file")
    for broken in log.broken:
        warn(broken)
    if compile_options.target != Target.host():
        name = compile_options.target.name
        raise InvalidInput(f"tuning measures on this machine; it is not {name}")
    if options.ray is not None:
        return _tune_on_ray(model, compile_options, options, log, quiet=quiet)
    target, _ = with_known_rates(compile_options.target, compile_options.rates)
    if options.threads > target.cores:
        raise InvalidInput(f"--threads {options.threads}: this machine has {target.cores} cores")
    target = target.limited(compile_options.isa)
    # A batch without padding has the same products, and no operands that must fit each other.
    graph = scheduled_graph(model, replace(compile_options, keep_padding=True, log="none"))
    jobs = jobs_of(graph, target, options)
    append(options.log, [])  # made now: trials that nobody keeps are for nothing
    budget = Budget(options.trials, options.minutes)
    with _progress(len(jobs), quiet) as tell:
        tuner = Tuner(Machine.of(target), options.log, log, budget, tell)
        return tuner.run(jobs, target)


def _tune_on_ray(
    model: Path, compile_options: CompileOptions, options: TuneOptions, log: TuningLog,
    *, quiet: bool,
) -> list[Result]:  # fmt: skip
    """The same on every node of a cluster, with the jobs of each node's CPU."""
    address, isa = options.ray or LOCAL, compile_options.isa
    with ray_nodes(address, lambda target: target.limited(isa)) as nodes:
        jobs: dict[Machine, list[Job]] = {}
        for node in nodes:
            if node.machine not in jobs:
                # What this machine was measured to do says nothing of the node.
                own = replace(compile_options, target=node.target, isa=None, rates=None)
                graph = scheduled_graph(model, replace(own, keep_padding=True, log="none"))
                jobs[node.machine] = jobs_of(graph, node.target, options)
        if not quiet:
            cpus = Counter(node.machine.cpu for node in nodes)
            found = ", ".join(f"{count} with {cpu}" for cpu, count in cpus.items())
            console().print(f"{len(nodes)} nodes: {found}", highlight=False)
        append(options.log, [])
        budget = Budget(options.trials, options.minutes)
        with _progress(sum(map(len, jobs.values())), quiet) as tell:
            outcomes = tune_on(nodes, jobs, options.log, log, budget, tell)
    for line in outcomes.lost:
        warn(line)
    return outcomes.results


def jobs_of(graph: Graph, target: Target, options: TuneOptions) -> list[Job]:
    """One job per workload and bucket that has a choice, the most work first.

    Raises InvalidInput when there is none.
    """
    found: dict[tuple[Any, ...], Job] = {}
    work: dict[tuple[Any, ...], float] = {}
    every = {n.input(0).type.tokens for n in graph.nodes if n.op in ATTENTIONS}
    for node in graph.nodes:
        if node.op not in FAMILIES or not re.search(options.layers, node.name):
            continue
        workload = family_of(node, target).workload(node)
        for bucket in _buckets(_tokens_of(node, every, options.tokens)):
            schedules = schedules_of(node, target, bucket)
            task = task_of(node, workload, bucket, options.threads, {})
            if task is None or len(schedules) < 2:
                continue
            key = (task.workload, task.tokens)
            found.setdefault(key, Job(task, schedules))
            work[key] = work.get(key, 0.0) + _work(task)
    if not found:
        raise InvalidInput(
            "there is no layer to tune: none that --layers matches has a choice of schedules"
        )
    most = sum(work.values())
    return [found[key] for key in sorted(found, key=lambda k: -work[k])
            if work[key] > LEAST_SHARE * most]  # fmt: skip


def _tokens_of(node: Node, every: set[Dim], tokens: Sequence[int]) -> Sequence[int]:
    """What the node has of runs of so many tokens: a pooler has one of each sequence.

    `every` are the numbers of all tokens, as attention has them; none: no node tells.
    """
    if node.tokens in every or not every:
        return tokens
    return [max(1, evaluate(node.tokens, dict.fromkeys(symbols(node.tokens), 1)))]


def _buckets(tokens: Sequence[int]) -> Iterable[Bucket]:
    return [bucket for bucket in buckets() if any(n in bucket for n in tokens)]


def _work(task: Task) -> float:
    """Multiply-accumulates, roughly; elementwise work counts as little."""
    sizes = dict(task.workload.sizes)
    product = sizes.get("m", 1) * sizes.get("k", 1) * task.workload.density
    return float(task.tokens * max(product, sum(sizes.values())))


def print_results(results: Sequence[Result], options: TuneOptions) -> None:
    """A table of the best schedules, and what was gained."""
    table = Table(title=f"tuned for {options.threads} threads, log {options.log}")
    for name in ("workload", "tokens", "trials", "best", "time, heuristic = 1"):
        table.add_column(name, overflow="fold")
    for r in results:
        best = r.note or str(r.best or "heuristic")
        table.add_row(str(r.task.workload), str(r.task.tokens), str(r.trials), best,
                      f"{r.ratio:.3f}" if r.best else "")  # fmt: skip
    console().print(table)


@contextlib.contextmanager
def _progress(jobs: int, quiet: bool) -> Iterator[Tell]:
    if quiet:
        yield lambda number, task, trial, share: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(),
        TextColumn("{task.fields[best]}"), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    with Progress(*columns, console=console(), transient=True) as progress:
        bar = progress.add_task("tuning", total=1.0, best="", left="")
        best: dict[int, float] = {}

        def tell(number: int, task: Task, trial: Trial | None, share: float) -> None:
            if trial is not None:
                best[number] = min(best.get(number, 1.0), trial.ratio)
            done = max(share, number / jobs)
            elapsed = progress.tasks[0].elapsed or 0.0
            left = f"{elapsed * (1 - done) / done:.0f} s left" if done > 0.02 else ""
            progress.update(
                bar,
                completed=done,
                description=f"{number + 1}/{jobs} {task.workload.op} {task.tokens} tokens",
                best=f"best {best.get(number, 1.0):.2f}",
                left=left,
            )

        yield tell
