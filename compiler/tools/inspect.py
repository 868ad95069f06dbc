"""What is in an ONNX file or in a compiled model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparsec.frontend.onnx_import import import_model
from sparsec.ir.graph import Graph, Node
from sparsec.runtime import describe
from sparsec.sparse.bsr import block_zeros
from sparsec.tools.console import console

BLOCKS = ((1, 1), (4, 1), (8, 1), (16, 1), (32, 1), (1, 4), (4, 4), (16, 4), (32, 4))
ELF_MAGIC = b"\x7fELF"


def inspect_file(path: Path, isa: str | None = None) -> dict[str, Any]:
    """A plain-data description; `kind` is `onnx` or `library`. `isa` as in `load`."""
    with path.open("rb") as file:
        magic = file.read(len(ELF_MAGIC))
    if magic == ELF_MAGIC:
        return {"kind": "library", "file": str(path), **describe(path, isa)}
    return {"kind": "onnx", "file": str(path), **_inspect_graph(import_model(path))}


def _inspect_graph(graph: Graph) -> dict[str, Any]:
    weights = [_weight(node) for node in graph.nodes if _is_weight_product(node)]
    parameters = sum(v.data.size for v in graph.constants() if v.data is not None)
    return {
        "name": graph.name,
        "inputs": {v.name: str(v.type) for v in graph.inputs},
        "outputs": {
            n: str(v.type) for n, v in zip(graph.output_names, graph.outputs, strict=True)
        },
        "parameters": parameters,
        "ops": dict(Counter(node.op for node in graph.nodes).most_common()),
        "weights": weights,
    }


def _is_weight_product(node: Node) -> bool:
    return node.op == "matmul" and node.input(1).is_constant and node.input(1).type.rank == 2


def _weight(node: Node) -> dict[str, Any]:
    """One GEMM: output x input channels, and the share of all-zero blocks per block shape."""
    value = node.input(1)
    assert value.data is not None
    dense = value.data.T  # ONNX has input x output channels
    zeros = block_zeros(dense, BLOCKS)
    return {
        "node": node.name,
        "weight": value.name,
        "shape": f"{dense.shape[0]}x{dense.shape[1]}",
        "result": str(node.output.type),
        "zeros": {f"{r}x{c}": round(share, 4) for (r, c), share in zeros.items()},
    }


def print_inspection(found: dict[str, Any]) -> None:
    """The description as tables on standard output."""

    out = console()
    if found["kind"] == "library":
        _print_library(found, out)
        return
    out.print(f"{found['file']}: {found['parameters'] / 1e6:.2f} M parameters")
    for kind in ("inputs", "outputs"):
        for name, type in found[kind].items():
            out.print(f"  {kind[:-1]} {name}: {type}", highlight=False)
    counts = ", ".join(f"{op} {count}" for op, count in found["ops"].items())
    out.print(f"  ops: {counts}")
    _print_weights(found["weights"], out)


def _print_weights(weights: list[dict[str, Any]], out: Console) -> None:
    if not weights:
        return
    table = Table(title="weights: share of all-zero blocks, by output x input channels")
    for column in ("weight", "out x in", *weights[0]["zeros"]):
        table.add_column(column, overflow="fold")
    for row in weights:
        table.add_row(row["weight"], row["shape"], *(f"{z:.2f}" for z in row["zeros"].values()))
    out.print(table)


def arena_text(arena: dict[str, Any]) -> str:
    """The working memory of a run in words, from a library's description."""
    total, per_token = arena["bytes"] / 1e6, arena["bytes_per_token"] / 1e3
    return (
        f"arena: {per_token:.1f} KB per token ({total:.2f} MB at {arena['example']}, one thread)"
    )


def _print_library(found: dict[str, Any], out: Console) -> None:
    made = f"sparsec {found['sparsec']}, for {found['isa']}"
    out.print(f"{found['file']}: {made}", highlight=False)
    if len(found["targets"]) > 1:
        names = ", ".join(f"{t['target']} ({t['isa']})" for t in found["targets"])
        out.print(f"  targets: {names}; this is {found['target']}", highlight=False)
    for kind in ("inputs", "outputs"):
        for port in found[kind]:
            shape = ", ".join(str(s) for s in port["shape"])
            out.print(f"  {kind[:-1]} {port['name']}: {port['dtype']}[{shape}]", highlight=False)
    weights = found["weights"]["bytes"] / 1e6
    out.print(f"  weights: {weights:.1f} MB; {arena_text(found['arena'])}", highlight=False)
    table = Table(title="layers")
    for column in ("node", "op", "type", "schedule", "from"):
        table.add_column(column, overflow="fold")
    for row in found["layers"]:
        table.add_row(*(row[k] for k in ("node", "op", "type", "schedule", "source")))
    out.print(table)
