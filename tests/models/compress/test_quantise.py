"""Encoders get fake quantisation, keep it in their state, and lose it again without a trace.

QDQ files hold the trained numbers exactly, and the compiler computes with them.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch", reason="compress needs the extra compress")
transformers = pytest.importorskip("transformers", reason="compress needs the extra compress")

from torch.nn.utils import parametrize  # noqa: E402

from sparsec.errors import CompilerError, InvalidInput  # noqa: E402
from sparsec.frontend.onnx_import import import_model  # noqa: E402
from sparsec.interpreter import run  # noqa: E402
from sparsec.models.compress import export_qdq, quantise  # noqa: E402
from sparsec.models.compress.export_qdq import export  # noqa: E402
from sparsec.models.compress.quantise import (  # noqa: E402
    bake,
    calibrate,
    enabled,
    prepare,
    quantised_linears,
)
from sparsec.models.compress.sites import (  # noqa: E402
    embedding_parts,
    encoder_linears,
    layer_parts,
)
from sparsec.models.compress.tiny import ARCHITECTURES, tiny_config  # noqa: E402
from sparsec.passes import Quantization, graph_pipeline, int8_pipeline  # noqa: E402
from sparsec.passes.manager import PassManager  # noqa: E402
from sparsec.passes.quantize import quantize_weight  # noqa: E402
from sparsec.passes.quantize_tables import LARGE_BYTES, QuantizeTables  # noqa: E402

CHANGES: dict[str, Any] = {
    "vocab_size": 60,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
TABLE_BYTES = 60 * 16 * 4  # that of the smallest table of words


class Mask(torch.nn.Module):  # type: ignore[misc]
    """Every second block of four rows and one column is zero."""

    def forward(self, weight: Any) -> Any:
        rows, columns = torch.meshgrid(*map(torch.arange, weight.shape), indexing="ij")
        return weight * ((rows // 4 + columns) % 2)


def make(name: str = "bert", *, masks: bool = False, auto: Any = transformers.AutoModel) -> Any:
    """A model of random weights, the same for a name."""
    torch.manual_seed(0)
    model = auto.from_config(tiny_config(name, **CHANGES)).eval()
    for linear in encoder_linears(model).values() if masks else ():
        parametrize.register_parametrization(linear, "weight", Mask())
    return model


def batch(seed: int, rows: int = 8, seq: int = 9) -> dict[str, Any]:
    """Random tokens; the last half of the rows is padded from position 5 on."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (rows, seq), generator=random)
    mask = torch.ones_like(ids)
    mask[rows // 2 :, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(rows)}


def answer(model: Any, seed: int = 9) -> Any:
    inputs = {k: v for k, v in batch(seed).items() if k != "labels"}
    with torch.no_grad():
        return model(**inputs)[0].numpy()[inputs["attention_mask"].numpy() == 1]


def ready(name: str = "bert", **options: Any) -> Any:
    model = make(name, **options)
    prepare(model, table_bytes=TABLE_BYTES)
    calibrate(model, [batch(i) for i in range(3)])
    return model


def relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_the_tables_are_rounded_that_the_compiler_stores_in_int8() -> None:
    assert quantise.TABLE_BYTES == LARGE_BYTES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prepared_model_rounds_and_bakes_back(name: str) -> None:
    model, float_model = make(name, masks=True), make(name, masks=True)
    parameters = prepare(model, table_bytes=TABLE_BYTES)
    # Per layer: six weights, four inputs with a zero point, three operands; ELECTRA's projection.
    assert len(parameters) == 2 * (6 + 4 * 2 + 3) + (3 if name == "electra" else 0)
    calibrate(model, [batch(i) for i in range(3)])
    expected = answer(float_model)
    error = relative(answer(model), expected)
    # 256 steps are 0.4 % of a range that holds some 3 standard deviations; it adds up.
    assert 1e-3 < error < 0.1
    with enabled(model, False):
        np.testing.assert_allclose(answer(model), expected, rtol=1e-5, atol=1e-5)
    assert relative(answer(model), expected) == error
    bake(model)
    np.testing.assert_allclose(answer(model), expected, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == make(name).state_dict().keys()
    assert model.config._attn_implementation == float_model.config._attn_implementation
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    bake(float_model)  # masks alone
    for key, linear in encoder_linears(float_model).items():
        assert not linear.weight[0, ::2].any(), key
        torch.testing.assert_close(linear.weight, model.get_submodule(key).weight)


def test_a_copy_is_independent() -> None:
    model = ready(masks=True)
    before = answer(model)
    other = copy.deepcopy(model)
    np.testing.assert_array_equal(answer(other), before)
    bake(other)
    np.testing.assert_array_equal(answer(model), before)
    assert relative(answer(other), before) > 1e-3


def test_the_state_holds_the_scales() -> None:
    model = ready()
    other = make()
    prepare(other, table_bytes=TABLE_BYTES)
    assert np.isnan(answer(other)).all()
    other.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(answer(other), answer(model))


def test_zeros_stay_zero_and_scales_learn() -> None:
    """Two steps of training move every scale; masked weights stay zero."""
    model = ready(masks=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    target = torch.from_numpy(answer(make(masks=True)))
    model.train()
    inputs = {k: v for k, v in batch(9).items() if k != "labels"}
    for _ in range(2):
        states = model(**inputs).last_hidden_state[inputs["attention_mask"] == 1]
        optimizer.zero_grad()
        ((states - target) ** 2).mean().backward()
        optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    scales = [n for n in before if n.endswith("log_scale")]
    assert set(scales) <= set(moved)
    for linear in encoder_linears(model).values():
        assert not linear.weight[0, ::2].any()
        assert linear.weight[0, 1::2].any()


def test_training_lowers_the_error_of_rounding() -> None:
    """Distilled from itself without rounding."""
    teacher, model = make(), ready()
    expected = answer(teacher)
    before = relative(answer(model), expected)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    inputs = {k: v for k, v in batch(9).items() if k != "labels"}
    for _ in range(40):
        states = model(**inputs).last_hidden_state[inputs["attention_mask"] == 1]
        optimizer.zero_grad()
        ((states - torch.from_numpy(expected)) ** 2).mean().backward()
        optimizer.step()
    assert relative(answer(model), expected) < 0.8 * before


def test_padding_does_not_count() -> None:
    model, other = ready(), make()
    prepare(other, table_bytes=TABLE_BYTES)
    changed = [batch(i) for i in range(3)]
    for one in changed:
        one["input_ids"] = torch.where(one["attention_mask"] == 1, one["input_ids"], 1)
    calibrate(other, changed)
    wanted = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def test_calibration_covers_what_was_seen() -> None:
    model = ready()
    calibrate(model, [batch(i) for i in range(3)], method="minmax")
    seen: list[Any] = []
    inner = layer_parts(model)[1].ffn_out
    inner.rounding.observer = seen.append
    answer(model, seed=0)
    real = seen[0][batch(0)["attention_mask"] == 1]
    low = -inner.rounding.zero_point * inner.rounding.scale
    high = (255 - inner.rounding.zero_point) * inner.rounding.scale
    # Half a step: the zero point is whole. What was rounded before moves the values a little.
    slack = 0.05 * float(real.abs().max())
    assert low - slack < float(real.min()) < 0.0
    assert 0.5 * high < float(real.max()) < high + slack


def test_attention_can_stay_fp32() -> None:
    model = make()
    prepare(model, attention=False)
    assert not any("key.log_scale" in n for n, _ in model.named_parameters())
    calibrate(model, [batch(0)])
    assert relative(answer(model), answer(make())) < 0.1
    assert list(quantised_linears(model)) == list(encoder_linears(model))


def test_training_mode_is_kept() -> None:
    model = make()
    prepare(model)
    for training in (True, False):
        model.train(training)
        calibrate(model, [batch(0)])
        assert model.training is training


def test_mistakes_are_named() -> None:
    model = ready()
    with pytest.raises(InvalidInput, match="prepared for quantisation already"):
        prepare(model)
    with pytest.raises(InvalidInput, match="no value was observed"):
        calibrate(model, [])
    with pytest.raises(InvalidInput, match="no calibration method 'best'"):
        calibrate(model, [batch(0)], method="best")
    model.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    with pytest.raises(InvalidInput, match="infinite or NaN"):
        calibrate(model, [batch(0)])
    with pytest.raises(InvalidInput, match="no list of layers"):
        prepare(torch.nn.Linear(2, 2))


CLASSIFY = transformers.AutoModelForSequenceClassification
QA = transformers.AutoModelForQuestionAnswering
FILES: list[tuple[str, Any, Any]] = [
    ("bert", transformers.AutoModel, "none"),
    ("bert", CLASSIFY, "classify"),
    ("roberta", transformers.AutoModel, "none"),
    ("electra", CLASSIFY, "classify"),
    ("distilbert", QA, "qa"),
]


def int8_graph(path: Path) -> Any:
    """The graph of int8 ops that the compiler makes of a file, tables of any size in int8."""
    graph = import_model(path)
    PassManager(graph_pipeline()).run(graph)
    PassManager(int8_pipeline(Quantization({}))).run(graph)
    PassManager([QuantizeTables(large_bytes=TABLE_BYTES)]).run(graph)
    return graph


@pytest.mark.parametrize(("name", "auto", "head"), FILES, ids=lambda x: getattr(x, "__name__", x))
def test_the_compiler_takes_a_file_as_it_is(
    tmp_path: Path, name: str, auto: Any, head: Any
) -> None:
    """int8 products and attention everywhere, and on most sequences torch's answer."""
    model = ready(name, masks=True, auto=auto)
    path = tmp_path / "model.onnx"
    result = export(model, path, head)
    assert result.files == [path]
    graph = int8_graph(path)
    ops = Counter(n.op for n in graph.nodes)
    # Per layer qkv in one, output and two of the feed-forward net; ELECTRA's projection.
    assert ops["linear_int8"] == 2 * 4 + (name == "electra")
    assert ops["attention_int8"] == 2
    assert ops["attention"] == ops["dequantize"] == 0
    assert ops["embedding_int8"] == 1
    assert ops["quantize"] == (name == "electra")  # the others are stored by what makes them
    stored = {n.output.type.quant for n in graph.nodes if n.op == "attention_int8"}
    wanted = {p.attention_output.rounding for p in layer_parts(model)}
    assert {q.scale for q in stored} == {(np.float32(r.scale),) for r in wanted}
    assert {q.zero_point for q in stored} == {(r.zero_point,) for r in wanted}
    tokens = {k: v.numpy() for k, v in batch(9, rows=32, seq=4).items() if k != "labels"}
    tokens["token_type_ids"] = np.zeros_like(tokens["input_ids"])
    inputs = {v.name: tokens[v.name] for v in graph.inputs}
    with torch.no_grad():
        expected = model(**{k: torch.from_numpy(v) for k, v in inputs.items()})[0].numpy()
    got = run(graph, inputs)[result_name(head)]
    same = np.abs(got - expected).reshape(32, -1).max(axis=1) < 1e-4
    # Of 32 sequences of some 3,000 roundings each a few have one that falls to the other side.
    assert same.mean() > 0.7


def result_name(head: str) -> str:
    return {"none": "last_hidden_state", "classify": "logits", "qa": "start_logits"}[head]


def test_a_file_holds_the_trained_numbers(tmp_path: Path) -> None:
    model = ready(masks=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("log_scale", "zero_share")):
                parameter.mul_(1.01)  # as training leaves them: no range of any data
    before = {n: v.clone() for n, v in model.state_dict().items()}
    expected = answer(model)
    path = tmp_path / "model.onnx"
    export(model, path, "none")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    np.testing.assert_array_equal(answer(model), expected)
    proto = onnx.load(path)
    arrays = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    linears = quantised_linears(model)
    for name, linear in linears.items():
        rounding = linear.parametrizations.weight[-1]
        numbers, scale = (arrays[f"model.{name}.weight_{x}"] for x in ("quantized", "scale"))
        np.testing.assert_array_equal(scale, rounding.scale.numpy())
        np.testing.assert_array_equal(numbers.T * scale[:, None], linear.weight.detach().numpy())
        assert numbers.dtype == np.int8
        assert not numbers[::2, 0].any()
    table = embedding_parts(model).tables[0].weight.detach().numpy()
    word = "model.embeddings.word_embeddings.weight"
    for got, wanted in zip(("quantized", "scale"), quantize_weight(table), strict=True):
        np.testing.assert_array_equal(arrays[f"{word}_{got}"], wanted)
    rounded = sum(w.weight.numel() for w in linears.values()) + table.size
    floats = sum(a.size for a in arrays.values() if a.dtype == np.float32)
    kept = sum(p.numel() for p in make().parameters()) - rounded
    assert floats <= kept + 2 * 6 * 64 + 60  # and the scales of rows: no weight a second time


def test_the_tokenizer_goes_with_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "from"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    export(ready(), tmp_path / "model.onnx", "none", folder)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(InvalidInput, match="no fake quantisation"):
        export(make(), path, "none")
    model = make()
    prepare(model)
    with pytest.raises(InvalidInput, match="call `calibrate`"):
        export(model, path, "none")
    with pytest.raises(InvalidInput, match="does not exist"):
        export(ready(), tmp_path / "missing" / "model.onnx", "none")
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One activation of many is rounded in steps twice as large."""
    store = export_qdq.store_constants

    def damage(model: Any) -> None:
        store(model)
        last = [n for n in model.graph.node if n.op_type == "QuantizeLinear"][-1]
        for node in model.graph.node:
            if last.input[1] in node.output:
                value = numpy_helper.to_array(node.attribute[0].t)
                node.attribute[0].t.CopyFrom(numpy_helper.from_array(2 * value))

    monkeypatch.setattr(export_qdq, "store_constants", damage)
    with pytest.raises(CompilerError, match="nothing was written"):
        export(ready(), tmp_path / "model.onnx", "none")
    assert not list(tmp_path.iterdir())
