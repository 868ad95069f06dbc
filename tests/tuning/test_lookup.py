"""For how many tokens a node is tuned, and what a log without its very size gives it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from sparsec.codegen.kernels.revision import revision
from sparsec.codegen.lower import family_of, schedules_of
from sparsec.ir.graph import Graph, Node
from sparsec.ir.schedule import Bucket, Schedule, bucket_of
from sparsec.ir.types import DType
from sparsec.models.tiny import tiny_model
from sparsec.options import CompileOptions
from sparsec.stages import scheduled_graph
from sparsec.target import Target
from sparsec.tools.tune import TuneOptions, jobs_of
from sparsec.tuning.log import TuningLog
from sparsec.tuning.lookup import schedule_from
from sparsec.tuning.record import Machine, Outcome, TuningRecord

TARGET = Target.named("icelake-server")


def product() -> Node:
    """256x256 in fp32, of which there is a kernel for at most 8 tokens."""
    graph = Graph("g")
    weight = graph.add_constant(np.ones((256, 256), np.float32), "w")
    x = graph.add("to_panels", [graph.add_input("x", DType.F32, (1, 16, 256))], {"width": 64})
    return graph.add_node("linear", [x, weight, None, None], {"activation": "tanh"})


def record_of(node: Node, tokens: int, schedule: Schedule) -> TuningRecord:
    code = revision(node.op)
    assert code is not None
    return TuningRecord(
        family_of(node, TARGET).workload(node), tokens, 1, Machine.of(TARGET), schedule, code, (),
        Outcome.OK, (1e-6,), (1e-3,),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recorded", "wanted", "source"),
    [
        (32, Bucket(16, 32), "log exact"),
        (32, Bucket(32, 64), "log nearest (32 tokens)"),
        (32, Bucket(4, 8), "heuristic"),  # the kernel for few tokens was no candidate
        (8, Bucket(4, 8), "log exact"),
    ],
)
def test_a_record_counts_where_the_best_could_be_measured(
    recorded: int, wanted: Bucket, source: str
) -> None:
    node = product()
    dense = schedules_of(node, TARGET, bucket_of(32))[-1]
    log = TuningLog([record_of(node, recorded, dense)])
    found = schedule_from(log, node, wanted, TARGET)
    assert found is not None
    assert found.source == source
    assert (found.family == "few_tokens_gemm") == (source == "heuristic")


def test_a_pooler_is_tuned_for_few_tokens(tmp_path: Path, host: Target) -> None:
    """It has a token of each sequence, however long they are."""
    path = tmp_path / "m.onnx"
    onnx.save(tiny_model("bert", head="classify"), path)
    options = CompileOptions(target=host, keep_padding=True, log="none")
    graph = scheduled_graph(path, options)
    jobs = jobs_of(graph, host, TuneOptions(tmp_path / "log", (32, 100)))
    found = {(job.task.cut.name, job.task.tokens) for job in jobs if job.task.cut.op == "linear"}
    assert {tokens for name, tokens in found if "Tanh" in name} == {4}
    assert {tokens for name, tokens in found if "ffn" in name} == {32, 128}
