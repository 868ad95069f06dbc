"""Zoo graphs: valid in every form and opset, with the numbers of a plain NumPy encoder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from sparsec.errors import InvalidInput
from sparsec.models.build import build_file, build_model
from sparsec.models.evaluate import evaluator
from sparsec.models.files import write_model
from sparsec.models.registry import HEADS, MODELS, Family, Head, ModelSpec, find_model
from sparsec.models.tiny import tiny_model, tiny_spec
from sparsec.models.weights import Pruning
from sparsec.sparse.bsr import block_zeros

Array = NDArray[Any]
FAMILIES: list[Family] = ["bert", "distilbert"]
NEWEST = onnx.defs.onnx_opset_version()
# Two layers of fp32 sums of up to 64 products of values of order 1, in two orders: below 1e-6
# each; 2e-5 leaves room for what layer norm and softmax amplify.
TOLERANCE = 2e-5

erf = np.vectorize(math.erf, otypes=[np.float64])


def inputs(spec: ModelSpec, batch: int, seq: int, rng: np.random.Generator) -> dict[str, Array]:
    """Random ids; the last row is padded from its middle on."""
    mask = np.ones((batch, seq), np.int64)
    mask[-1, seq // 2 + 1 :] = 0
    feed = {
        "input_ids": rng.integers(0, spec.vocab, (batch, seq)),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, (batch, seq)),
    }
    return {name: feed[name] for name in spec.input_names}


def tensors(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


class NumpyEncoder:
    """The architecture written down a second time, in float64 and loops over heads."""

    def __init__(self, spec: ModelSpec, model: onnx.ModelProto) -> None:
        self.spec = spec
        self.w = {name: value.astype(np.float64) for name, value in tensors(model).items()}
        bert = spec.family == "bert"
        self.names = (
            ("attention.self.query", "attention.self.key", "attention.self.value",
             "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense",
             "output.dense", "output.LayerNorm")
            if bert
            else ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
                  "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm")
        )  # fmt: skip

    def norm(self, x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.spec.epsilon)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x: Array, name: str) -> Array:  # MatMul weights: [in, out]
        return x @ self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def gemm(self, x: Array, name: str) -> Array:  # Gemm weights: [out, in]
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def hidden(self, feed: dict[str, Array]) -> Array:
        w, ids = self.w, feed["input_ids"]
        x = w["embeddings.word_embeddings.weight"][ids]
        if "token_type_ids" in feed:
            x = x + w["embeddings.token_type_embeddings.weight"][feed["token_type_ids"]]
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(x, "embeddings.LayerNorm")
        for layer in range(self.spec.layers):
            x = self.layer(x, feed["attention_mask"], f"encoder.layer.{layer}.")
        return x

    def layer(self, x: Array, mask: Array, prefix: str) -> Array:
        query, key, value, out, norm1, up, down, norm2 = (prefix + name for name in self.names)
        q, k, v = (self.linear(x, name) for name in (query, key, value))
        context = np.empty_like(q)
        for b, h in np.ndindex(len(x), self.spec.heads):
            cut = slice(h * self.spec.head_size, (h + 1) * self.spec.head_size)
            scores = q[b, :, cut] @ k[b, :, cut].T / math.sqrt(self.spec.head_size)
            scores = np.where(mask[b] == 1, scores, -np.inf)
            exps = np.exp(scores - scores.max(-1, keepdims=True))
            context[b, :, cut] = exps / exps.sum(-1, keepdims=True) @ v[b, :, cut]
        x = self.norm(self.linear(context, out) + x, norm1)
        inner = self.linear(x, up)
        inner = 0.5 * inner * (1 + erf(inner / math.sqrt(2)))
        return self.norm(self.linear(inner, down) + x, norm2)

    def outputs(self, feed: dict[str, Array], head: Head) -> list[Array]:
        x = self.hidden(feed)
        if head == "qa":
            logits = self.linear(x, "qa_outputs")
            return [logits[..., 0], logits[..., 1]]
        bert = self.spec.family == "bert"
        pooled = np.tanh(self.gemm(x[:, 0], "pooler.dense")) if bert and head != "qa" else None
        if head == "none":
            return [x] if pooled is None else [x, pooled]
        if pooled is None:
            pooled = np.maximum(self.gemm(x[:, 0], "pre_classifier"), 0)
        return [self.gemm(pooled, "classifier")]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_numbers_as_numpy(family: Family, head: Head, rng: np.random.Generator) -> None:
    spec = tiny_spec(family)
    model = tiny_model(family, head=head)
    run = evaluator(model)
    for batch, seq in [(1, 1), (1, 7), (3, 33), (2, spec.positions)]:
        feed = inputs(spec, batch, seq, rng)
        got = run(feed)
        assert tuple(got) == spec.output_names(head)
        wanted = NumpyEncoder(spec, model).outputs(feed, head)
        for value, reference in zip(got.values(), wanted, strict=True):
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spelled", [True, False], ids=["spelled", "fused"])
@pytest.mark.parametrize("opset", [11, 12, 13, 14, 17, 18, 20, 21, NEWEST])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_opset_says_the_same(
    family: Family, head: Head, opset: int, spelled: bool, rng: np.random.Generator
) -> None:
    spec = tiny_spec(family, layers=1)
    feed = inputs(spec, 2, 5, rng)
    model = build_model(spec, head=head, opset=opset, spelled=spelled)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == opset
    kinds = {node.op_type for node in model.graph.node}
    assert ("LayerNormalization" in kinds) == (not spelled and opset >= 17)
    assert ("Gelu" in kinds) == (not spelled and opset >= 20)
    got = ReferenceEvaluator(model).run(None, feed)
    wanted = NumpyEncoder(spec, model).outputs(feed, head)
    for value, reference in zip(got, wanted, strict=True):
        np.testing.assert_allclose(value, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_reach_real_tokens(family: Family, rng: np.random.Generator) -> None:
    spec = tiny_spec(family)
    run = evaluator(tiny_model(family))
    feed = inputs(spec, 2, 9, rng)
    real = feed["attention_mask"] == 1
    before = run(feed)["last_hidden_state"]
    feed["input_ids"] = np.where(real, feed["input_ids"], 7)
    np.testing.assert_array_equal(run(feed)["last_hidden_state"][real], before[real])


@pytest.mark.parametrize("name", ["bert-mini", "minilm-l6"])
def test_activations_are_like_those_of_trained_models(name: str) -> None:
    """Tokens stay apart and of size 1, so that a wrong kernel cannot hide behind the weights."""
    spec = find_model(name)
    feed = inputs(spec, 1, 64, np.random.default_rng(0))
    feed["attention_mask"][:] = 1
    hidden = evaluator(build_model(spec))(feed)["last_hidden_state"][0]
    assert 0.8 < hidden.std() < 1.3
    between = np.corrcoef(hidden)[np.triu_indices(64, 1)]
    assert between.mean() < 0.85


def encoder_linears(model: onnx.ModelProto) -> dict[str, Array]:
    """Name -> weight as [out, in]; they are what MatMul multiplies with, heads aside."""
    names = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    found = {name: w.T for name, w in tensors(model).items() if name in names}
    found.pop("qa_outputs.weight", None)
    return found


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (1, 4), (8, 4), (16, 1), (32, 4)])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_lie_in_the_pattern(family: Family, head: Head, block: tuple[int, int]) -> None:
    spec = tiny_spec(family)
    dense = build_model(spec, head=head)
    pruned = build_model(spec, head=head, pruning=Pruning(0.75, *block))
    linears = encoder_linears(pruned)
    assert len(linears) == 6 * spec.layers
    before = encoder_linears(dense)
    for name, w in linears.items():
        blocks = w.size // (block[0] * block[1])
        assert block_zeros(w, [block])[block] == pytest.approx(round(0.75 * blocks) / blocks)
        np.testing.assert_array_equal(w[w != 0], before[name][w != 0])
    was = tensors(dense)
    for name, value in tensors(pruned).items():
        if name not in linears:
            np.testing.assert_array_equal(value, was[name])


def test_pattern_is_output_by_input() -> None:
    """4x1 pruning leaves 1x4 blocks about as often zero as chance: the orientation is not lost."""
    model = build_model(tiny_spec(), pruning=Pruning(0.5, 4, 1))
    for w in encoder_linears(model).values():
        zeros = block_zeros(w, [(4, 1), (1, 4)])
        assert zeros[4, 1] == 0.5
        assert zeros[1, 4] < 0.3


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    def data(name: str, seed: int) -> bytes:
        build_file(tiny_spec(), tmp_path / name, seed=seed, pruning=Pruning(0.8, 4, 1))
        return (tmp_path / name).read_bytes()

    first = data("a.onnx", 1)
    assert first == data("b.onnx", 1)
    assert first != data("c.onnx", 2)


def test_heads_share_the_encoder() -> None:
    one, other = tensors(tiny_model(head="none")), tensors(tiny_model(head="qa"))
    shared = [name for name in one if name.startswith("encoder.") and name in other]
    assert len(shared) == 2 * 16  # per layer: six linears and two layer norms, with two each
    for name in shared:
        np.testing.assert_array_equal(one[name], other[name])


def test_zoo_has_the_real_shapes() -> None:
    shapes = {n: (s.layers, s.hidden, s.heads, s.ffn, s.family) for n, s in MODELS.items()}
    assert shapes == {
        "bert-mini": (4, 256, 4, 1024, "bert"),
        "minilm-l6": (6, 384, 12, 1536, "bert"),
        "distilbert": (6, 768, 12, 3072, "distilbert"),
        "bert-base": (12, 768, 12, 3072, "bert"),
        "bert-large": (24, 1024, 16, 4096, "bert"),
    }
    assert {(s.vocab, s.positions) for s in MODELS.values()} == {(30522, 512)}


def test_bert_mini_has_all_parameters() -> None:
    """As many as Hugging Face counts for this configuration, pooler included."""
    stored = tensors(build_model(find_model("bert-mini")))
    count = sum(value.size for value in stored.values() if value.dtype == np.float32)
    constants = sum(1 for value in stored.values() if value.shape == ())
    embeddings = (30522 + 2 + 512) * 256 + 2 * 256
    layer = 4 * (256 * 256 + 256) + 2 * 256 * 1024 + 1024 + 256 + 4 * 256
    assert embeddings + 4 * layer + 256 * 256 + 256 <= count
    assert count <= embeddings + 4 * layer + 256 * 256 + 256 + constants


def test_dims_have_names() -> None:
    graph = tiny_model().graph
    for value in graph.input:
        assert [d.dim_param for d in value.type.tensor_type.shape.dim] == ["batch", "seq"]
    assert [d.dim_param for d in graph.output[0].type.tensor_type.shape.dim][:2] == [
        "batch",
        "seq",
    ]


def test_external_data(tmp_path: Path) -> None:
    model = tiny_model()
    plain = model.SerializeToString(deterministic=True)
    path = tmp_path / "m.onnx"
    files = write_model(model, path, external_above_bytes=0)
    assert files == [path, tmp_path / "m.onnx.data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < len(plain) / 2
    back = onnx.load(path)
    wanted = tensors(onnx.load_from_string(plain))
    for name, value in tensors(back).items():
        np.testing.assert_array_equal(value, wanted[name])


def test_errors() -> None:
    with pytest.raises(InvalidInput, match="known: bert-mini"):
        find_model("bert-huge")
    with pytest.raises(InvalidInput, match="3 heads"):
        tiny_spec(heads=3)
    with pytest.raises(InvalidInput, match="opset 10"):
        tiny_model(opset=10)
    with pytest.raises(InvalidInput, match=f"opset {NEWEST + 1}"):
        tiny_model(opset=NEWEST + 1)
    with pytest.raises(InvalidInput, match="seed"):
        tiny_model(seed=-1)
    with pytest.raises(InvalidInput, match="5x1"):
        build_model(tiny_spec(), pruning=Pruning(0.8, 5, 1))
    with pytest.raises(InvalidInput, match="1x64"):  # divides ffn 64, not hidden 32
        build_model(tiny_spec(), pruning=Pruning(0.8, 1, 64))
    with pytest.raises(InvalidInput, match="0 to 1"):
        Pruning(1.01, 4, 1)
    with pytest.raises(InvalidInput, match="head"):
        build_model(tiny_spec(), head="pooled")  # type: ignore[arg-type]
