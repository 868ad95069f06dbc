"""Put activations into token panels where kernels want them, and convert at the borders.

linear(x), gelu, layer_norm   ->   linear(to_panels(x)), gelu, layer_norm in panels
return y                      ->   return from_panels(y)

Quantised values are u8 panels, those of bf16 panels of pairs; they are made in panels too, so
conversions are of fp32 alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsec.ir.dims import Dim
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.layouts import PANEL_WIDTH, Panels
from sparsec.ir.op_helpers import panels_of
from sparsec.ir.ops import OPS
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult

# Lanes past the last token hold garbage that must stay finite, so only ops that make finite
# results of all finite operands run in panels (not exp, log, sqrt, div, reciprocal, pow).
PANEL_SAFE = frozenset(
    {"add", "sub", "mul", "neg", "abs", "sign", "maximum", "minimum", "clip"}
    | {"relu", "tanh", "erf", "sigmoid", "silu", "gelu", "softplus", "softsign"}
    | {"leaky_relu", "elu", "hard_sigmoid", "hard_swish"}
    | {"floor", "ceil", "round", "sin", "cos"}
)


@dataclass(frozen=True, slots=True)
class AssignLayouts:
    """Planar panels of `width` tokens. Every value is converted at most once each way."""

    width: int = PANEL_WIDTH
    name: str = "assign_layouts"

    def run(self, graph: Graph) -> PassResult:
        assignment = _Assignment(graph, Panels(self.width))
        for node in list(graph.nodes):
            assignment.visit(node)
        assignment.finish()
        graph.sort()
        return PassResult(assignment.conversions)


@dataclass(slots=True)
class _Assignment:
    """Walks the nodes in order: the layouts of a node's operands are known when it comes."""

    graph: Graph
    layout: Panels
    panels: dict[Value, Value] = field(default_factory=dict)  # rows -> the same in panels
    rows: dict[Value, Value] = field(default_factory=dict)  # panels -> the same in rows
    conversions: int = 0

    def visit(self, node: Node) -> None:
        if node.op in ("to_panels", "from_panels"):
            return
        wanted = self._panel_operands(node)
        for index, value in enumerate(node.inputs):
            if value is not None:
                form = self._in_panels(value) if index in wanted else self._in_rows(value)
                if form is not value:
                    self.graph.replace_input(node, index, form)
        if self._gives_panels(node):
            for value in node.outputs:
                layout = panels_of(value.type.dtype, self.layout.width)
                self.graph.set_type(value, value.type.with_layout(layout))

    def finish(self) -> None:
        """Graph outputs are rows."""
        for value in dict.fromkeys(self.graph.outputs):
            rows = self._in_rows(value)
            if rows is not value:
                self.graph.outputs = [rows if v is value else v for v in self.graph.outputs]

    def _panel_operands(self, node: Node) -> set[int]:
        rule = OPS[node.op].panels
        if rule is not None and _has_panel_kernel(node):
            return set(rule.operands)
        if node.op == "quantize" and any(_reads_panels(n, i) for n, i in node.output.uses):
            return {0}
        if node.op == "to_bf16":  # all that read bf16 have it in panels, behind views too
            return {0}
        if self._stays_in_panels(node):
            return {i for i, v in enumerate(node.inputs) if v is not None and _is_panels(v)}
        return set()

    def _gives_panels(self, node: Node) -> bool:
        rule = OPS[node.op].panels
        if rule is not None:
            return _has_panel_kernel(node) and not rule.rows
        return any(v is not None and _is_panels(v) for v in node.inputs)

    def _stays_in_panels(self, node: Node) -> bool:
        """Whether the node can work on panels that its operands are in already."""
        if not any(v is not None and _is_panels(v) for v in node.inputs):
            return False
        if node.op in ("quantize", "dequantize", "to_bf16"):
            return True
        if len(node.outputs) != 1:
            return False
        result = node.output.type
        if node.op == "reshape":  # the tokens and their order stay: a view
            return result.rank > 0 and result.shape[-1] == node.input(0).type.shape[-1]
        if node.op not in PANEL_SAFE or result.dtype is not DType.F32:
            return False
        return all(_fits(v, result.shape) for v in node.inputs if v is not None)

    def _in_panels(self, value: Value) -> Value:
        if _is_panels(value):
            return value
        if value not in self.panels:
            self._convert(value, "to_panels", {"width": self.layout.width}, self.panels)
        return self.panels[value]

    def _in_rows(self, value: Value) -> Value:
        if not _is_panels(value):
            return value
        if value not in self.rows:
            self._convert(value, "from_panels", {}, self.rows)
        return self.rows[value]

    def _convert(
        self, value: Value, op: str, attrs: dict[str, int], known: dict[Value, Value]
    ) -> None:
        known[value] = self.graph.add(op, [value], attrs, name=f"{value.name}.{op}")
        self.conversions += 1


def _fits(value: Value, shape: tuple[Dim, ...]) -> bool:
    """Whether an operand is a scalar constant, or panels of the result's shape."""
    if value.is_constant:
        return value.type.elements == 1
    return _is_panels(value) and value.type.shape == shape


def _has_panel_kernel(node: Node) -> bool:
    """Whether the kernels of an op with a PanelRule take this node: fp32, however stored."""
    return node.outputs[0].type.dtype in (DType.F32, DType.U8, DType.BF16)


def _reads_panels(node: Node, index: int) -> bool:
    rule = OPS[node.op].panels
    return rule is not None and index in rule.operands and _has_panel_kernel(node)


def _is_panels(value: Value) -> bool:
    return isinstance(value.type.layout, Panels)
