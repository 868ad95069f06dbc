"""Writes the graph of a BERT or DistilBERT encoder as torch's tracing exporter spells it.

With `spelled` LayerNorm and GELU are written out in elementary operators; without it the
operators LayerNormalization (opset 17) and Gelu (opset 20) are used where the opset has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from sparsec.models.onnx_writer import GraphWriter
from sparsec.models.registry import CLASSES, TOKEN_TYPES, Head, ModelSpec
from sparsec.models.weights import LINEAR_GAIN, OUTPUT_GAIN, QUERY_KEY_GAIN, RandomWeights

LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True)
class LayerNames:
    """What the parts of a layer are called, in the weights and in the node names."""

    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    ffn_in: str
    ffn_out: str
    output_norm: str


BERT_NAMES = LayerNames(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    output_norm="output.LayerNorm",
)
DISTILBERT_NAMES = LayerNames(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    ffn_in="ffn.lin1",
    ffn_out="ffn.lin2",
    output_norm="output_layer_norm",
)
TOKENS: tuple[str | int, ...] = ("batch", "seq")


class EncoderWriter:
    """Writes one model; `on_layer` is called after each layer."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: RandomWeights,
        *,
        opset: int,
        spelled: bool,
        on_layer: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.g = GraphWriter(spec.name, opset)
        self._weights = weights
        self._spelled = spelled
        self._on_layer = on_layer
        self._bert = spec.family == "bert"
        self._names = BERT_NAMES if self._bert else DISTILBERT_NAMES

    def write(self, head: Head) -> None:
        """Write inputs, encoder, head and outputs."""
        for name in self.spec.input_names:
            self.g.input(name, TensorProto.INT64, TOKENS)
        x = self._embeddings()
        mask = self._mask()
        for index in range(self.spec.layers):
            with self.g.scope("encoder", f"layer.{index}"):
                x = self._layer(x, mask, f"encoder.layer.{index}.")
            self._on_layer()
        self._head(x, head)

    def _embeddings(self) -> str:
        g, spec = self.g, self.spec
        with g.scope("embeddings"):
            words = self._table("word_embeddings", spec.vocab)
            total = g.op("Gather", words, "input_ids", axis=0)
            if spec.has_token_types:
                types = self._table("token_type_embeddings", TOKEN_TYPES)
                total = g.op("Add", total, g.op("Gather", types, "token_type_ids", axis=0))
            seq = g.unsqueeze(g.size_of("input_ids", 1), 0)
            ids = g.weight("embeddings.position_ids", np.arange(spec.positions)[None])
            ids = g.op("Slice", ids, g.integers(0), seq, g.integers(1), g.integers(1))
            positions = self._table("position_embeddings", spec.positions)
            total = g.op("Add", total, g.op("Gather", positions, ids, axis=0))
            return self._layer_norm(total, "embeddings.LayerNorm")

    def _table(self, name: str, rows: int) -> str:
        name = f"embeddings.{name}.weight"
        return self.g.weight(name, self._weights.embedding(name, rows, self.spec.hidden))

    def _mask(self) -> str:
        """BERT: what is added to the scores; DistilBERT: which keys to hide, [batch, seq]."""
        g = self.g
        with g.scope("mask"):
            if not self._bert:
                return g.op("Equal", "attention_mask", g.integer(0))
            mask = g.op("Cast", g.unsqueeze("attention_mask", 1, 2), to=TensorProto.FLOAT)
            return g.op("Mul", g.op("Sub", g.scalar(1.0), mask), g.scalar(LOWEST))

    def _layer(self, x: str, mask: str, prefix: str) -> str:
        g, spec, names = self.g, self.spec, self._names
        with g.scope("attention"):
            context = self._attention(x, mask, prefix)
            name = prefix + names.attention_output
            projected = self._encoder_linear(context, name, spec.hidden, gain=OUTPUT_GAIN)
            x = self._layer_norm(g.op("Add", projected, x), prefix + names.attention_norm)
        with g.scope("ffn"):
            inner = self._gelu(self._encoder_linear(x, prefix + names.ffn_in, spec.ffn))
            outer = self._encoder_linear(inner, prefix + names.ffn_out, spec.hidden, spec.ffn)
            return self._layer_norm(g.op("Add", outer, x), prefix + names.output_norm)

    def _attention(self, x: str, mask: str, prefix: str) -> str:
        g, spec, names = self.g, self.spec, self._names
        query = self._encoder_linear(x, prefix + names.query, spec.hidden, gain=QUERY_KEY_GAIN)
        key = self._encoder_linear(x, prefix + names.key, spec.hidden, gain=QUERY_KEY_GAIN)
        value = self._encoder_linear(x, prefix + names.value, spec.hidden)
        query = self._heads(query, (0, 2, 1, 3))
        key = self._heads(key, (0, 2, 3, 1))
        value = self._heads(value, (0, 2, 1, 3))
        root = g.scalar(math.sqrt(spec.head_size))
        if self._bert:
            scores = g.op("Div", g.op("MatMul", query, key), root)
            scores = g.op("Add", scores, mask)
        else:
            scores = g.op("MatMul", g.op("Div", query, root), key)
            scores = g.op("Where", self._key_mask(mask, x, scores), g.scalar(LOWEST), scores)
        context = g.op("MatMul", g.op("Softmax", scores, axis=-1), value)
        context = g.op("Transpose", context, perm=[0, 2, 1, 3])
        shape = g.shape(g.size_of(context, 0), g.size_of(context, 1), spec.hidden)
        return g.op("Reshape", context, shape)

    def _heads(self, x: str, perm: tuple[int, ...]) -> str:
        g, spec = self.g, self.spec
        shape = g.shape(g.size_of(x, 0), g.size_of(x, 1), spec.heads, spec.head_size)
        return g.op("Transpose", g.op("Reshape", x, shape), perm=list(perm))

    def _key_mask(self, hidden: str, x: str, scores: str) -> str:
        """Spread [batch, seq] to the shape of the scores, as DistilBERT's view and expand_as."""
        g = self.g
        shape = g.shape(g.size_of(x, 0), 1, 1, g.size_of(x, 1))
        return g.op("Expand", g.op("Reshape", hidden, shape), g.op("Shape", scores))

    def _encoder_linear(
        self, x: str, name: str, outputs: int, inputs: int | None = None, gain: float = LINEAR_GAIN
    ) -> str:
        w = self._weights.encoder_linear(
            f"{name}.weight", outputs, inputs or self.spec.hidden, gain
        )
        product = self.g.op("MatMul", x, self.g.weight(f"{name}.weight", w.T))  # ONNX: [in, out]
        return self.g.op("Add", self._bias(name, outputs), product)

    def _bias(self, name: str, size: int) -> str:
        return self.g.weight(f"{name}.bias", self._weights.bias(f"{name}.bias", size))

    def _layer_norm(self, x: str, name: str) -> str:
        g = self.g
        gamma = g.weight(f"{name}.weight", self._weights.gain(f"{name}.weight", self.spec.hidden))
        beta = self._bias(name, self.spec.hidden)
        if g.opset >= 17 and not self._spelled:
            epsilon = self.spec.epsilon
            return g.op("LayerNormalization", x, gamma, beta, axis=-1, epsilon=epsilon)
        centred = g.op("Sub", x, g.mean_last(x))
        variance = g.mean_last(g.op("Pow", centred, g.scalar(2.0)))
        deviation = g.op("Sqrt", g.op("Add", variance, g.scalar(self.spec.epsilon)))
        normal = g.op("Div", centred, deviation)
        return g.op("Add", g.op("Mul", normal, gamma), beta)

    def _gelu(self, x: str) -> str:
        g = self.g
        if g.opset >= 20 and not self._spelled:
            return g.op("Gelu", x)
        erf = g.op("Erf", g.op("Div", x, g.scalar(math.sqrt(2.0))))
        product = g.op("Mul", x, g.op("Add", erf, g.scalar(1.0)))
        return g.op("Mul", product, g.scalar(0.5))

    def _head(self, x: str, head: Head) -> None:
        g, spec = self.g, self.spec
        names = spec.output_names(head)
        if head == "qa":
            w = self._weights.linear("qa_outputs.weight", 2, spec.hidden)
            product = g.op("MatMul", x, g.weight("qa_outputs.weight", w.T))
            logits = g.op("Add", self._bias("qa_outputs", 2), product)
            for part, name in zip(g.split_last(logits, [1, 1]), names, strict=True):
                g.output(g.squeeze(part, -1), name, TOKENS)
            return
        if head == "classify":
            g.output(self._classifier(x), names[0], ("batch", CLASSES))
            return
        x = g.output(x, names[0], (*TOKENS, spec.hidden))
        if spec.has_pooler:
            g.output(self._pooler(x), names[1], ("batch", spec.hidden))

    def _classifier(self, x: str) -> str:
        if self._bert:
            pooled = self._pooler(x)
        else:
            pooled = self.g.op("Relu", self._first_token_linear(x, "pre_classifier"))
        return self._gemm(pooled, "classifier", CLASSES)

    def _pooler(self, x: str) -> str:
        return self.g.op("Tanh", self._first_token_linear(x, "pooler.dense"))

    def _first_token_linear(self, x: str, name: str) -> str:
        first = self.g.op("Gather", x, self.g.integer(0), axis=1)
        return self._gemm(first, name, self.spec.hidden)

    def _gemm(self, x: str, name: str, outputs: int) -> str:
        w = self._weights.linear(f"{name}.weight", outputs, self.spec.hidden)
        weight = self.g.weight(f"{name}.weight", w)
        return self.g.op("Gemm", x, weight, self._bias(name, outputs), transB=1)
