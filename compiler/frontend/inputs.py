"""Inputs of the Graph: dtypes, and a symbol for every dim that is not a number."""

from __future__ import annotations

import re
from collections.abc import Mapping

from onnx import GraphProto, TensorShapeProto, ValueInfoProto

from sparsec.errors import InvalidInput, InvalidModel, UnsupportedOp
from sparsec.frontend.tensors import port_dtype
from sparsec.ir.dims import Dim, symbol
from sparsec.ir.graph import Graph, Value

Overrides = Mapping[str, tuple[int | str, ...]]

# A symbol becomes a C variable: these are taken.
_C_WORDS = frozenset(
    """auto bool break case char const continue default do double else enum extern float for goto
    if inline int long main register restrict return short signed sizeof static struct switch
    typedef union unsigned void volatile while""".split()  # noqa: SIM905 (readable)
)


class _Symbols:
    """Dim names of the model as unique C identifiers; the same name is the same symbol."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {}

    def dim(self, name: str) -> Dim:
        if name not in self._of:
            self._of[name] = self._fresh(name)
        return symbol(self._of[name])

    def _fresh(self, name: str) -> str:
        base = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "dim"
        if base[0].isdigit() or base in _C_WORDS:
            base = f"dim_{base}"
        taken, result, count = set(self._of.values()), base, 2
        while result in taken:
            result, count = f"{base}_{count}", count + 1
        return result


def add_inputs(graph: Graph, proto: GraphProto, overrides: Overrides) -> list[Value]:
    """Add the inputs of the model that are not initialisers.

    An override replaces the shape of its input; where it gives a named dim another name or a
    number, the other inputs follow.
    """
    fixed = {t.name for t in proto.initializer} | {t.values.name for t in proto.sparse_initializer}
    inputs = [i for i in proto.input if i.name not in fixed]
    unknown = sorted(set(overrides) - {i.name for i in inputs})
    if unknown:
        names = ", ".join(i.name for i in inputs)
        raise InvalidInput(f"there is no input {unknown[0]!r} to give a shape; inputs: {names}")
    renamed = _renamed(inputs, overrides)
    symbols = _Symbols()
    return [_add_input(graph, i, overrides.get(i.name), renamed, symbols) for i in inputs]


def _add_input(
    graph: Graph,
    info: ValueInfoProto,
    override: tuple[int | str, ...] | None,
    renamed: Mapping[str, int | str],
    symbols: _Symbols,
) -> Value:
    if not info.type.HasField("tensor_type"):
        kind = info.type.WhichOneof("value")
        raise UnsupportedOp(
            f"input {info.name!r} is {kind or 'without a type'}; inputs must be tensors"
        )
    tensor = info.type.tensor_type
    dtype = port_dtype(tensor.elem_type, f"input {info.name!r}")
    if override is None and not tensor.HasField("shape"):
        raise InvalidModel(
            f"input {info.name!r} has no shape; give one, for example --shape "
            f"{info.name}=batch,seq (in Python: shapes={{{info.name!r}: ('batch', 'seq')}})"
        )
    sizes = override if override is not None else _sizes(info, renamed)
    dims = [d if isinstance(d, int) else symbols.dim(d) for d in sizes]
    return graph.add_input(info.name, dtype, dims)


def _sizes(info: ValueInfoProto, renamed: Mapping[str, int | str]) -> tuple[int | str, ...]:
    axes = enumerate(info.type.tensor_type.shape.dim)
    sizes = [_size(dim, f"{info.name}_{axis}", info.name, axis) for axis, dim in axes]
    return tuple(renamed.get(s, s) if isinstance(s, str) else s for s in sizes)


def _size(dim: TensorShapeProto.Dimension, unnamed: str, name: str, axis: int) -> int | str:
    if dim.dim_param:
        return str(dim.dim_param)
    if not dim.HasField("dim_value") or dim.dim_value == -1:  # old exporters write -1
        return unnamed
    if dim.dim_value < 0:
        raise InvalidModel(f"input {name!r} has the size {dim.dim_value} on axis {axis}")
    if dim.dim_value == 0:
        raise UnsupportedOp(
            f"input {name!r} has the size 0 on axis {axis}; inputs have at least one element: "
            "leave it out or make it a constant"
        )
    return int(dim.dim_value)


def _renamed(inputs: list[ValueInfoProto], overrides: Overrides) -> dict[str, int | str]:
    """What overrides say about named dims."""
    renamed: dict[str, int | str] = {}
    for info in inputs:
        sizes = overrides.get(info.name)
        if sizes is None:
            continue
        _check_override(info, sizes)
        for old, new in zip(info.type.tensor_type.shape.dim, sizes, strict=False):
            if not old.dim_param:
                continue
            if renamed.setdefault(old.dim_param, new) != new:
                raise InvalidInput(
                    f"the shapes given make {old.dim_param!r} both "
                    f"{renamed[old.dim_param]} and {new}"
                )
    return renamed


def _check_override(info: ValueInfoProto, sizes: tuple[int | str, ...]) -> None:
    tensor = info.type.tensor_type
    if tensor.HasField("shape") and len(tensor.shape.dim) != len(sizes):
        raise InvalidInput(
            f"input {info.name!r} has {len(tensor.shape.dim)} axes, "
            f"but the shape given has {len(sizes)}"
        )
    bad = [s for s in sizes if s == "" or (isinstance(s, int) and s < 1)]
    if bad:
        raise InvalidInput(f"the shape given for input {info.name!r} has the size {bad[0]!r}")
