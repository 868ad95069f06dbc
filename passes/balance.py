"""Move outlier channels of what int8 products read into their weights (arXiv 2211.10438).

linear(x, w)   ->   linear(x / s, w * s),   s[c] = max|x[c]|**alpha / max|w[c]|**(1 - alpha)

A tensor has one scale, so a channel with large values makes the steps of all others coarse; a
weight has a scale per row, and bears columns of different size better. All products that read a
value share one s. Where the division goes depends on what makes x:

layer_norm, read by these products alone    gamma / s, beta / s
layer_norm, read elsewhere too              mul(x, 1 / s), which fold_quantize gives to the u8 copy
linear, alone or with relu                  its rows / s
attention                                   the values' rows / s of the product that makes them

GELU and others do not commute with a factor: what reads them stays as it is, with a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.op_spec import Array
from sparsec.passes.base import PassResult
from sparsec.passes.quantize import int8_candidates, is_given
from sparsec.passes.quantize_attention import attention_parts

HOMOGENEOUS = ("none", "relu")  # f(x / s) = f(x) / s for s > 0


@dataclass(frozen=True, slots=True)
class Balance:
    """After fuse_epilogue and before ranges are found: they are those of x / s.

    `maxima` is fp32 `[channels]` per name of `balanced_values`; `alpha` 0 to 1: 0 evens out the
    weights' columns, 1 the activations' channels.
    """

    maxima: Mapping[str, Array]
    alpha: float
    keep_fp32: tuple[str, ...] = ()
    name: str = "balance"

    def run(self, graph: Graph) -> PassResult:
        """Keeps the meaning but for rounding to fp32."""
        done, notes = 0, []
        for x, products in _groups(graph, self.keep_fp32).items():
            refusal = self._visit(graph, x, products)
            done += len(products) if refusal is None else 0
            if refusal is not None:
                notes += [f"{n.name} is not balanced: {refusal}" for n in products]
        graph.sort()
        graph.drop_dead_nodes()
        return PassResult(done, tuple(notes))

    def _visit(self, graph: Graph, x: Value, products: list[Node]) -> str | None:
        """Balances the products that read x, or says why not."""
        if x.name not in self.maxima:
            return f"nothing is known of the channels of %{x.name}"
        refusal = _weight_refusal(products) or _source_refusal(graph, x, products)
        if refusal is not None:
            return refusal
        s = balance_factors(self.maxima[x.name], _columns(products), self.alpha)
        for w in dict.fromkeys(n.input(1) for n in products):
            _replace_constant(graph, w, w.data * s)
        _divide(graph, x, products, s)
        return None


@dataclass(frozen=True, slots=True)
class Unbalance:
    """linear(mul(x, f), w) -> linear(x, w * f) for the linears that stay fp32 after all.

    Before quantize: an fp32 product then reads what it did, and the factor is the u8 copy's alone.
    """

    fallback: frozenset[str]
    name: str = "unbalance"

    def run(self, graph: Graph) -> PassResult:
        """Keeps the meaning but for rounding to fp32."""
        undone = 0
        for node in [n for n in graph.nodes if n.op == "linear" and n.name in self.fallback]:
            product, w = node.input(0).producer, node.input(1)
            if product is None or product.op != "mul" or w.data is None:
                continue
            factor = product.input(1)
            if factor.data is None or factor.type.shape != w.type.shape[1:]:
                continue
            columns = graph.add_constant(np.asarray(w.data * factor.data), w.name)
            graph.replace_input(node, 0, product.input(0))
            graph.replace_input(node, 1, columns)
            undone += 1
        graph.drop_dead_nodes()
        return PassResult(undone, ())


def balanced_values(graph: Graph, keep_fp32: tuple[str, ...] = ()) -> list[str]:
    """The names of the values whose channels' maxima Balance wants, in execution order."""
    return [x.name for x in _groups(graph, keep_fp32)]


def balance_factors(x_max: Array, w_max: Array, alpha: float) -> Array:
    """s, fp32 `[channels]`, from the largest magnitudes of x and of the weights' columns.

    A channel that was never other than zero, or that no product uses, counts as the least of those
    that were: its s stays finite.
    """
    x, w = _floored(x_max), _floored(w_max)
    return np.asarray(x**alpha / w ** (1.0 - alpha)).astype(np.float32)


def _floored(maxima: Array) -> Array:
    wide = maxima.astype(np.float64)
    least = 1e-6 * wide.max(initial=0.0)  # below that nothing of the tensor's scale is left
    used = wide[wide > least]
    return np.maximum(wide, used.min()) if used.size else np.ones_like(wide)


def _groups(graph: Graph, keep_fp32: tuple[str, ...]) -> dict[Value, list[Node]]:
    """The products to balance by the value that they read."""
    groups: dict[Value, list[Node]] = {}
    for node in int8_candidates(graph, keep_fp32):
        if not is_given(node):
            groups.setdefault(node.input(0), []).append(node)
    return groups


def _columns(products: list[Node]) -> Array:
    """The largest magnitude in each column of the products' weights."""
    weights = [n.input(1).data for n in products]
    most = [np.abs(w).max(axis=0, initial=0.0) for w in weights if w is not None]
    return np.asarray(np.max(most, axis=0))


def _weight_refusal(products: list[Node]) -> str | None:
    for node in products:
        w = node.input(1)
        if w.type.quant is not None:
            return "the model itself says how its weight is quantised"
        if not set(w.users) <= set(products):
            return f"%{w.name} is the weight of other layers too"
    return None


def _source_refusal(graph: Graph, x: Value, products: list[Node]) -> str | None:
    """Why x can not be made divided by a factor per channel; None when it can."""
    node = x.producer
    if node is None:
        return f"%{x.name} is an input"
    if node.op == "layer_norm":
        return None
    if node.op not in ("linear", "attention"):
        return f"{node.op} can not take a factor per channel"
    if not _read_by_these_alone(graph, x, products):
        return f"%{x.name} is read elsewhere"
    if node.op == "linear":
        return _rows_refusal(node)
    values = attention_parts(node)[2]
    source = node.input(2).producer
    if source is None or source.op != "linear":
        return f"the values of {node.name} are not a product"
    if source.output.users != [node] or source.output in graph.outputs:
        return f"%{source.output.name} is read elsewhere"
    for part in attention_parts(node)[:2]:
        if part.value == values.value and part.start < values.stop and values.start < part.stop:
            return f"the values of {node.name} are its keys or queries too"
    return _rows_refusal(source)


def _rows_refusal(node: Node) -> str | None:
    """Why the rows of a linear can not be divided."""
    if node.attrs["activation"] not in HOMOGENEOUS:
        return f"{node.attrs['activation']} of {node.name} takes no factor"
    if node.optional_input(3) is not None:
        return f"{node.name} adds a residual"
    w, bias = node.input(1), node.optional_input(2)
    if w.data is None or w.type.quant is not None or w.users != [node]:
        return f"the weight of {node.name} is not a constant of its own"
    return None if bias is None or bias.data is not None else f"the bias of {node.name} varies"


def _read_by_these_alone(graph: Graph, x: Value, products: list[Node]) -> bool:
    only = all(index == 0 and node in products for node, index in x.uses)
    return only and x not in graph.outputs


def _divide(graph: Graph, x: Value, products: list[Node], s: Array) -> None:
    """Makes the products read x / s."""
    node = x.producer
    assert node is not None, x
    if node.op == "attention":
        values = attention_parts(node)[2]
        source = node.input(2).producer
        assert source is not None, node
        rows = np.ones(source.output.type.channels, np.float32)
        rows[values.start : values.stop] = s
        _divide_rows(graph, source, rows)
    elif node.op == "linear":
        _divide_rows(graph, node, s)
    elif _read_by_these_alone(graph, x, products) and _is_plain_norm(node):
        for index in (1, 2):
            _divide_operand(graph, node, index, s)
    else:
        factor = graph.add_constant(np.float32(1) / s, f"{x.name}.factor")
        smaller = graph.add("mul", [x, factor], name=f"{x.name}.balance")
        for product in products:
            graph.replace_input(product, 0, smaller)


def _is_plain_norm(node: Node) -> bool:
    return all(v is None or v.data is not None for v in (node.input(1), node.optional_input(2)))


def _divide_rows(graph: Graph, node: Node, rows: Array) -> None:
    w = node.input(1)
    assert w.data is not None, node
    graph.replace_input(node, 1, graph.add_constant(w.data / rows[:, None], w.name))
    _divide_operand(graph, node, 2, rows)


def _divide_operand(graph: Graph, node: Node, index: int, s: Array) -> None:
    value = node.optional_input(index)
    if value is not None:
        assert value.data is not None, value
        graph.replace_input(node, index, graph.add_constant(value.data / s, value.name))


def _replace_constant(graph: Graph, old: Value, data: Array) -> None:
    graph.replace_uses(old, graph.add_constant(data, old.name))
