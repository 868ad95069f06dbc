"""Encoders get fake quantisation, keep it in their state, and lose it again without a trace."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compress needs the extra compress")
transformers = pytest.importorskip("transformers", reason="compress needs the extra compress")

from torch.nn.utils import parametrize  # noqa: E402

from sparsec.errors import InvalidInput  # noqa: E402
from sparsec.models.compress.quantise import (  # noqa: E402
    bake,
    calibrate,
    enabled,
    prepare,
    quantised_linears,
)
from sparsec.models.compress.sites import encoder_linears, layer_parts  # noqa: E402

SIZES = {"vocab_size": 60, "initializer_range": 0.2}
COMMON = {
    **SIZES,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
DISTILBERT = {**SIZES, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(**COMMON),
    "roberta": transformers.RobertaConfig(**COMMON),
    "electra": transformers.ElectraConfig(embedding_size=16, **COMMON),
    "distilbert": transformers.DistilBertConfig(**DISTILBERT),
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
    model = auto.from_config(copy.deepcopy(CONFIGS[name])).eval()
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


@pytest.mark.parametrize("name", CONFIGS)
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
