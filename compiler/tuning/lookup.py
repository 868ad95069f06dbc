"""The schedule of a node: from the tuning log where it has one, else the heuristic's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparsec.codegen.kernels.revision import revision
from sparsec.codegen.lower import family_of, schedules_of
from sparsec.ir.graph import Node
from sparsec.ir.schedule import EVERY, Bucket, Schedule, bucket_of
from sparsec.target import Target
from sparsec.tuning.log import Query, TuningLog
from sparsec.tuning.record import Machine
from sparsec.tuning.task import tokens_of

DEFAULT_LOG = Path(__file__).with_name("default_log.jsonl")  # of the zoo's shapes


def default_log() -> TuningLog:
    """The log that the package ships; benchmarks/make_default_log.py fills it."""
    return TuningLog.read(DEFAULT_LOG, name="default log")


def schedule_from(
    log: TuningLog, node: Node, bucket: Bucket, target: Target, threads: int = 1
) -> Schedule | None:
    """What is best for the node with the bucket's tokens; None when nothing computes it."""
    schedules = schedules_of(node, target, bucket)
    code = revision(node.op)
    if not schedules or code is None or len(schedules) == 1:
        return next(iter(schedules), None)
    workload = replace(family_of(node, target).workload(node), bucket=EVERY)
    query = Query(workload, tokens_of(bucket), threads, Machine.of(target), code)

    def comparable(tokens: int) -> bool:
        """Kernels for few tokens are candidates up to a limit: above it nothing beat them."""
        return schedules[0] in schedules_of(node, target, bucket_of(tokens))

    return log.lookup(query, set(schedules).__contains__, comparable) or schedules[0]
