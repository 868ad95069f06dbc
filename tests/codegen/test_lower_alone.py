"""One node with one schedule as a library: what is built to time a schedule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsec.codegen.lower import lower_alone, schedules_of
from sparsec.codegen.toolchain import build_library
from sparsec.driver import build_kernels
from sparsec.ir.dims import symbol
from sparsec.ir.graph import Graph
from sparsec.ir.layouts import Panels
from sparsec.ir.schedule import Bucket
from sparsec.ir.types import DType
from sparsec.runtime import load
from sparsec.target import Target


@pytest.mark.parametrize("bucket", [Bucket(0, 8), Bucket(384)], ids=str)
def test_a_layer_runs_alone(bucket: Bucket, tmp_path: Path) -> None:
    graph = Graph("g")
    x = graph.add_input("x", DType.F32, (symbol("batch"), symbol("seq"), 40))
    graph.set_type(x, x.type.with_layout(Panels()))
    w = graph.add_constant(np.ones((24, 40), np.float32), "w")
    node = graph.add_node("linear", [x, w, None], {"activation": "none"})
    graph.set_type(node.output, node.output.type.with_layout(Panels()))
    target = Target.host()
    schedule = schedules_of(node, target, bucket)[0]
    program = lower_alone(node, schedule, target)
    library = tmp_path / "alone.so"
    isa = next(i for i in target.isas if i.value == schedule.isa)
    build_library(program, build_kernels(program), library, isa=isa, metadata={"layers": []})
    _, seconds = load(library, threads=1).run_timed({"sizes": np.zeros((1, 8), np.uint8)})
    assert len(seconds) == len(program.calls) == 1
    assert program.calls[0].schedule == str(schedule)
    assert seconds[0] > 0
