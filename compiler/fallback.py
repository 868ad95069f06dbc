"""How much each int8 layer moves the outputs, and which stay fp32 so that they move little.

Measured on the first calibration samples, 32 or some more, through the oracle: int8 layers read
and hold the rounded numbers that their kernels would, and are otherwise computed in fp32. The
error of an output is |int8 - fp32| / |fp32|, Euclidean norms over all samples without padding; of
several outputs the worst counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsec.calibration import Feed, real_rows
from sparsec.errors import InvalidInput
from sparsec.interpreter import run, run_node
from sparsec.ir.dims import Dim
from sparsec.ir.graph import Graph, Node
from sparsec.ir.op_spec import Array
from sparsec.ir.ops import OPS
from sparsec.ir.ops_int8 import dequantize_array, quantize_array
from sparsec.ir.types import DType
from sparsec.passes import Quantization, attention_parts, int8_candidates
from sparsec.passes.keep_fp32 import kept
from sparsec.passes.quantize import affine_u8, quantize_weight
from sparsec.passes.quantize_attention import OPERANDS, product_behind, symmetric_scale
from sparsec.passes.quantize_tables import QuantizeTables, numbers

MEASURE = "relative error of the worst output on the calibration samples, Euclidean norm"


SAMPLES = 32  # at least: one run of them per layer, and some more


@dataclass(frozen=True, slots=True)
class LayerError:
    """A layer: the error when it alone is int8, its work, and whether it stays fp32."""

    node: str
    op: str
    error: float
    macs_per_token: int  # of an attention without the scores, which depend on the length
    stays_fp32: bool = False

    @property
    def loss(self) -> float:
        """Squared error per multiplication."""
        return self.error**2 / max(1, self.macs_per_token)

    def described(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "op": self.op,
            "error": self.error if np.isfinite(self.error) else None,  # JSON has no infinity
            "macs_per_token": self.macs_per_token,
            "precision": "fp32" if self.stays_fp32 else "int8",
        }


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`error` is that of the whole model with the layers as `layers` says."""

    error: float
    layers: tuple[LayerError, ...]

    @property
    def fp32(self) -> frozenset[str]:
        return frozenset(x.node for x in self.layers if x.stays_fp32)

    def as_compiled(self, graph: Graph) -> Accuracy:
        """With what a target has made of the layers: it may leave more attention in fp32. The
        error is still that of the layers before."""
        ops = {n.name: n.op for n in graph.nodes}
        layers = (
            replace(x, stays_fp32=x.stays_fp32 or ops.get(x.node) == x.op) for x in self.layers
        )
        return replace(self, layers=tuple(layers))

    def described(self) -> dict[str, Any]:
        layers = [x.described() for x in self.layers]
        return {"measure": MEASURE, "error": self.error, "layers": layers}


def fall_back(
    graph: Graph,
    quantization: Quantization,
    samples: Iterable[Feed],
    max_error: float,
    *,
    tables: QuantizeTables,
    attention: bool = True,
) -> Accuracy:
    """The layers that stay fp32 so that the error is at most `max_error`.

    Of a quantised model only layers without roundings of their own count; InvalidInput is raised
    where there is none. Those that lose most per multiplication go first; as few as are needed,
    found by halving. Tables, which save memory and no time, go last, but first where they alone
    lose too much.
    `tables` and `attention` say what int8_pipeline makes of those.
    """
    trial = _Trial(graph, quantization, _first(samples), tables, attention)
    if not trial.nodes:
        raise InvalidInput(
            "--max-error: there is no layer to choose a precision for: none can be int8, or the "
            "model is quantised itself; give the fp32 model then"
        )
    layers = [
        LayerError(n.name, n.op, trial.error({n.name}), _macs(n)) for n in trial.nodes.values()
    ]
    order = sorted(layers, key=lambda x: (_stays_long(x, max_error), -x.loss))

    def error_without(count: int) -> float:
        return trial.error(trial.made({x.node for x in order[count:]}))

    low, high = 0, len(order)
    found = error_without(0)
    if found > max_error:
        while high - low > 1:  # too much without the first `low`, enough without `high`
            middle = (low + high) // 2
            if error_without(middle) > max_error:
                low = middle
            else:
                high = middle
        found = error_without(high)
    else:
        high = 0
    made = trial.made({x.node for x in order[high:]})
    marked = (replace(x, stays_fp32=x.node not in made) for x in layers)
    return Accuracy(found, tuple(marked))


def _first(batches: Iterable[Feed]) -> list[Feed]:
    """As many of the batches as hold SAMPLES."""
    found: list[Feed] = []
    count = 0
    for batch in batches:
        found.append(batch)
        count += len(next(iter(batch.values())))
        if count >= SAMPLES:
            break
    return found


def _stays_long(layer: LayerError, max_error: float) -> bool:
    return layer.op == "embedding" and layer.error <= max_error


class _Trial:
    """The model on the samples with any set of layers in int8."""

    def __init__(
        self,
        graph: Graph,
        quantization: Quantization,
        samples: Sequence[Feed],
        tables: QuantizeTables,
        attention: bool,
    ):
        self.graph, self.samples = graph, samples
        self.ranges = quantization.ranges
        self.tables = {n.name: _rounded_tables(n, tables) for n in _named(graph, "embedding")}
        self.nodes = {n.name: n for n in self._candidates(quantization, attention)}
        self.weights: dict[str, Array] = {}
        self.exact = [self._outputs(sample, set()) for sample in samples]

    def _candidates(self, quantization: Quantization, attention: bool) -> list[Node]:
        """What the passes would compute in int8 with these ranges, in execution order."""
        products = int8_candidates(self.graph, quantization.keep_fp32)
        found = {n for n in products if n.input(0).name in self.ranges}
        for node in _named(self.graph, "attention") if attention else []:
            known = all(str(p) in self.ranges for p in attention_parts(node))
            by_name = kept(node, quantization.keep_fp32)
            found |= {node} if known and _sources(node) <= found and not by_name else set()
        found |= {n for n in _named(self.graph, "embedding") if self.tables[n.name]}
        return [n for n in self.graph.nodes if n in found]

    def made(self, int8: set[str]) -> set[str]:
        """What is int8 if these layers may be: an attention, where its products are."""
        nodes = {self.nodes[name] for name in int8}
        return {n.name for n in nodes if n.op != "attention" or _sources(n) <= nodes}

    def error(self, int8: set[str]) -> float:
        """Of the outputs, with these layers in int8."""
        off: dict[str, float] = {}
        size: dict[str, float] = {}
        for sample, exact in zip(self.samples, self.exact, strict=True):
            for name, y in self._outputs(sample, int8).items():
                wide = exact[name].astype(np.float64)
                off[name] = off.get(name, 0.0) + float((_difference(y, wide) ** 2).sum())
                size[name] = size.get(name, 0.0) + float((wide[np.isfinite(wide)] ** 2).sum())
        return max((float(np.sqrt(off[n] / (size[n] or 1.0))) for n in off), default=0.0)

    def _outputs(self, sample: Feed, int8: set[str]) -> dict[str, Array]:
        def compute(node: Node, operands: list[Array | None], env: dict[str, int]) -> list[Array]:
            if node.name not in int8:
                return run_node(node, operands, env)
            if node.op == "attention":
                return self._attention(node, operands, env)
            if node.op == "embedding":
                tables = self.tables[node.name]
                return run_node(node, [tables.get(i, x) for i, x in enumerate(operands)], env)
            return run_node(node, self._rounded(node, operands), env)

        made = run(self.graph, sample, compute=compute)
        floats = {n: y for n, y in made.items() if y.dtype.kind == "f"}
        return {n: real_rows(self.graph, sample, y) for n, y in floats.items()}

    def _rounded(self, node: Node, operands: list[Array | None]) -> list[Array | None]:
        x, w = operands[0], operands[1]
        assert x is not None, node
        assert w is not None, node
        scale, zero_point = affine_u8(*self.ranges[node.input(0).name])
        stored = quantize_array(x, scale, zero_point, DType.U8)
        if node.name not in self.weights:
            bytes_, scales = quantize_weight(w)
            self.weights[node.name] = bytes_.astype(np.float32) * scales[:, None]
        rounded = dequantize_array(stored, scale, zero_point)
        return [rounded, self.weights[node.name], *operands[2:]]

    def _attention(
        self, node: Node, operands: list[Array | None], env: dict[str, int]
    ) -> list[Array]:
        """attention_int8 of the operands' own numbers."""
        parts = attention_parts(node)
        scales = [symmetric_scale(*self.ranges[str(p)]) for p in parts]
        bytes_: list[Array | None] = []
        for x, part, scale in zip(operands, parts, scales, strict=False):
            assert x is not None, node
            stored = np.full(x.shape, 128, np.uint8)
            inside = x[..., part.start : part.stop]
            stored[..., part.start : part.stop] = quantize_array(inside, scale, 128, DType.U8)
            bytes_.append(stored)
        named = {f"{n}_scale": s for n, s in zip(OPERANDS, scales, strict=True)}
        attrs = {**node.attrs, **named}
        return OPS["attention_int8"].evaluate([*bytes_, *operands[3:]], attrs, env)


def _difference(y: Array, exact: Array) -> Array:
    """0 where both are the same infinity or NaN, and infinity where only one of them is."""
    same = (y == exact) | (np.isnan(y) & np.isnan(exact))
    off = np.subtract(y, exact, out=np.zeros_like(exact), where=~same)
    return np.where(np.isnan(off), np.inf, off)


def _sources(attention: Node) -> set[Node | None]:
    """The products that make its operands; None where there is none behind one."""
    return {product_behind(attention.input(i)) for i in range(len(OPERANDS))}


def _named(graph: Graph, op: str) -> list[Node]:
    return [n for n in graph.nodes if n.op == op]


def _rounded_tables(node: Node, tables: QuantizeTables) -> dict[int, Array]:
    """The tables of an embedding that become int8, as they are read then, by operand."""
    chosen = {t for t, refusal in tables.refusals(node).items() if refusal is None}
    found: dict[int, Array] = {}
    for index in range(1, len(node.inputs), 2):
        if node.input(index) in chosen:
            data, scale, zero_point = numbers(node.input(index))
            found[index] = (data.astype(np.int32) - zero_point).astype(np.float32)
            found[index] *= scale[:, None]
    return found


def _macs(node: Node) -> int:
    """Multiplications per token; of an attention those of one key, for each query."""
    if node.op == "embedding":
        return _known(node.output.type.channels)
    if node.op == "attention":
        return int(2 * node.attrs["heads"] * node.attrs["head_size"])
    rows, cols = node.input(1).type.shape
    return _known(rows) * _known(cols)


def _known(size: Dim) -> int:
    assert isinstance(size, int), size
    return size
