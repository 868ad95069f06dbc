"""The whole pipeline on the zoo: core ops are all that is left, and the answer is the same."""

from __future__ import annotations

import pytest

from sparsec.frontend.onnx_import import import_model
from sparsec.ir.printer import print_graph
from sparsec.ir.schedule import Schedule
from sparsec.models.tiny import tiny_model
from sparsec.passes import PASSES, default_pipeline

CORE = {"embedding", "layer_norm", "linear", "attention"}
LAYOUT = {"to_panels", "from_panels", "pack_tokens", "unpack_tokens"}
MASK_AND_HEADS = {"cast", "reshape", "iota", "sub", "mul", "where", "equal", "gather", "slice",
                  "broadcast_to"}  # fmt: skip


def pipeline(**options):
    return default_pipeline(schedules=lambda node, bucket: Schedule(node.op, "avx2"), **options)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("head", ["none", "classify", "qa"])
@pytest.mark.parametrize("opset", [11, 17])
def test_only_core_ops_are_left(check, family, head, opset):
    graph = import_model(tiny_model(family, head=head, opset=opset))
    ops = check(graph, *pipeline()).ops
    assert set(ops) <= CORE | LAYOUT | MASK_AND_HEADS
    assert (ops["embedding"], ops["layer_norm"], ops["attention"]) == (1, 5, 2)
    in_encoder = 2 * 4  # per layer: queries with keys and values, output, two of the FFN
    assert in_encoder <= ops["linear"] <= in_encoder + 2
    assert all(node.schedules for node in graph.nodes)


def test_fixed_sizes(check, encoder):
    names = [str(d) for d in encoder.inputs[0].type.shape]
    fixed = dict(zip(names, (2, 7), strict=True))
    ops = check(encoder, *pipeline(fixed_dims=fixed), sizes=[(2, 7)]).ops
    assert (ops["embedding"], ops["attention"]) == (1, 2)


def test_the_same_model_gives_the_same_text():
    texts = set()
    for _ in range(2):
        graph = import_model(tiny_model("bert"))
        for one in pipeline():
            one.run(graph)
        texts.add(print_graph(graph))
    assert len(texts) == 1


def test_golden_text(golden):
    graph = import_model(tiny_model("bert", head="classify"))
    for one in pipeline():
        one.run(graph)
    golden("passes_tiny_bert", print_graph(graph))


def test_every_pass_of_the_table_is_in_the_pipeline_under_its_name():
    names = [one.name for one in pipeline()]
    for name, make in PASSES.items():
        assert make().name == name
        assert name in names
