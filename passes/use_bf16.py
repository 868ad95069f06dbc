"""Compute products of constant weights with tokens, and attention, in bf16.

linear(x, w, b, r)   ->   linear_bf16(to_bf16(x), w in bf16, b, r)
attention(q, k, v)   ->   attention_bf16(to_bf16(q), to_bf16(k), to_bf16(v))

Sums, biases, residuals, softmax and what comes out stay fp32: fold_quantize joins what can be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sparsec.ir.attention_types import ATTENTION_ATTRS
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult
from sparsec.passes.keep_fp32 import check_patterns, kept
from sparsec.passes.rewrite import replace_node

OPERANDS = "qkv"
_STORED = ("out_scale", "out_zero_point")


@dataclass(frozen=True, slots=True)
class UseBf16:
    """After the passes of int8, which come first where both are asked for.

    `supported` says whether a kernel computes a node on the target.
    """

    products: bool = True
    attention: bool = True
    keep_fp32: tuple[str, ...] = ()
    supported: Callable[[Node], bool] = lambda node: True
    name: str = "use_bf16"

    def run(self, graph: Graph) -> PassResult:
        """Raises InvalidInput for a pattern of `keep_fp32` that fits nothing."""
        check_patterns(graph.nodes, self.keep_fp32)
        rewriting = _Rewriting(graph, self.supported)
        done, notes = 0, []
        for node in list(graph.nodes):
            if node.op == "linear" and self.products:
                refusal = kept(node, self.keep_fp32) or rewriting.product(node)
            elif node.op == "attention" and self.attention:
                refusal = kept(node, self.keep_fp32) or rewriting.attention(node)
            else:
                continue
            done += refusal is None
            notes += [] if refusal is None else [f"{node.name} stays fp32: {refusal}"]
        graph.sort()
        graph.drop_dead_nodes()
        return PassResult(done, tuple(notes))


@dataclass(slots=True)
class _Rewriting:
    """Values and weights are rounded once, however many nodes read them."""

    graph: Graph
    supported: Callable[[Node], bool]
    values: dict[Value, Value] = field(default_factory=dict)
    weights: dict[Value, Value] = field(default_factory=dict)

    def product(self, node: Node) -> str | None:
        """Rewrites a linear, or says why not."""
        x, w = node.input(0), node.input(1)
        if w.data is None or x.is_constant:
            return "its weight is not constant" if w.data is None else "its input is constant"
        if x.type.dtype is not DType.F32 or x.type.rank < 2:
            return f"its input is {x.type}"
        if x.type.channels % 2:
            return f"bf16 lies in pairs of channels, its input has {x.type.channels}"
        operands = [
            self._value(x),
            self._weight(w),
            node.optional_input(2),
            node.optional_input(3),
        ]
        return self._replace(
            node, "linear_bf16", operands, {"activation": node.attrs["activation"]}
        )

    def attention(self, node: Node) -> str | None:
        """Rewrites an attention, or says why not."""
        sizes = [node.attrs["head_size"], *(node.attrs[f"{x}_offset"] for x in OPERANDS)]
        sources = [node.input(i) for i in range(len(OPERANDS))]
        if any(v.type.dtype is not DType.F32 or v.type.rank != 3 for v in sources):
            return "its operands are no f32[batch, seq, channels]"
        if any(n % 2 for n in (*sizes, *(v.type.channels for v in sources))):
            return "bf16 lies in pairs of channels, and its channels are odd in number"
        if any(v.type.shape[1] != sources[0].type.shape[1] for v in sources):
            return "its keys are not those of its queries' sequence"
        attrs = {n: node.attrs[n] for n in (*ATTENTION_ATTRS, *_STORED) if n in node.attrs}
        operands = [*map(self._value, sources), node.optional_input(3)]
        return self._replace(node, "attention_bf16", operands, attrs)

    def _replace(
        self, node: Node, op: str, operands: list[Value | None], attrs: dict[str, object]
    ) -> str | None:
        trial = self.graph.add_node(op, operands, attrs, name=node.name)
        accepted = self.supported(trial)
        self.graph.erase(trial)
        if not accepted:
            return "no bf16 kernel takes it on this target"
        replace_node(self.graph, node, op, operands, attrs)
        return None

    def _value(self, x: Value) -> Value:
        if x not in self.values:
            self.values[x] = self.graph.add("to_bf16", [x], {}, name=f"{x.name}.bf16")
        return self.values[x]

    def _weight(self, w: Value) -> Value:
        if w not in self.weights:
            assert w.data is not None
            data = w.data.astype(DType.BF16.numpy)
            self.weights[w] = self.graph.add_constant(data, f"{w.name}.bf16")
        return self.weights[w]
