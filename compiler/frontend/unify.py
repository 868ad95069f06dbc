"""Makes dims equal that an op requires to be equal, in the whole Graph.

Two inputs may name the same size differently (`batch` and `batch_size`), or one leaves it out.
When an op joins them, one name replaces the other everywhere: both inputs then show the same
symbol, and binding the inputs checks that they agree. A dim `min(n, N)`, from slicing a table of
N rows to n, that must be equal to n becomes n, and the Graph gets the limit n <= N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparsec.ir import dims
from sparsec.ir.dims import Atom, Call, Dim, Expr, Symbol, only_atom, replace_atom
from sparsec.ir.graph import Graph, Value
from sparsec.ir.ops import OPS

Shape = tuple[Dim, ...]


class Unifier:
    """`place` is the name of the ONNX node being converted."""

    def __init__(self, graph: Graph):
        self.place = ""
        self._graph = graph
        self._replaced: list[tuple[Atom, Dim]] = []  # in order: later ones act on earlier results

    def resolve(self, dim: Any) -> Any:
        """`dim` with all replacements made so far; other things pass unchanged."""
        if isinstance(dim, Expr):
            for old, new in self._replaced:
                dim = replace_atom(dim, old, new)
        return dim

    def resolve_all(self, item: Any) -> Any:
        """`resolve` for an attribute: a dim, a tuple that may hold dims, or anything else."""
        if isinstance(item, tuple):
            return tuple(self.resolve_all(i) for i in item)
        return self.resolve(item)

    def operands(self, op: str, values: Sequence[Value], attrs: Mapping[str, Any]) -> None:
        """Make the dims of operands agree as `op` needs; what cannot is left for its `infer`."""
        if OPS[op].elementwise and len(values) > 1:
            self.broadcast([v.type.shape for v in values])
        elif op == "matmul":
            self._matmul(*values)
        elif op == "concat":
            self._concat(values, attrs["axis"])
        elif op == "broadcast_to":
            self.broadcast([values[0].type.shape, tuple(attrs["shape"])])
        elif op == "reshape":
            self._reshape(values[0].type.elements, dims.product(attrs["shape"]))

    def broadcast(self, shapes: Sequence[Shape]) -> Shape:
        """The broadcast of the shapes; where they do not fit the first wins."""
        rank = max((len(s) for s in shapes), default=0)
        result: list[Dim] = []
        for axis in range(-rank, 0):
            sizes = [self.resolve(s[axis]) for s in shapes if len(s) >= -axis]
            wide = [d for d in sizes if d != 1]
            for other in wide[1:]:
                self.equal(wide[0], other)
            result.append(self.resolve(wide[0]) if wide else 1)
        return tuple(self.resolve(d) for d in result)

    def equal(self, a: Dim, b: Dim) -> None:
        """Replace one of the two by the other if that is possible."""
        a, b = self.resolve(a), self.resolve(b)
        if a == b:
            return
        for kept, gone in ((a, b), (b, a)):
            atom = only_atom(gone)
            if isinstance(atom, Call) and self._is_clamped(atom, kept):
                self._replace(atom, kept)
                return
        self._equal_symbols(a, b)

    def _equal_symbols(self, a: Dim, b: Dim) -> None:
        left, right = only_atom(a), only_atom(b)
        if isinstance(left, Symbol) and isinstance(right, Symbol):
            keep_left = self._position(left) <= self._position(right)
            self._replace(right if keep_left else left, a if keep_left else b)
        elif isinstance(left, Symbol) and isinstance(b, int) and b > 0:
            self._replace(left, b)
        elif isinstance(right, Symbol) and isinstance(a, int) and a > 0:
            self._replace(right, a)

    def _is_clamped(self, call: Call, dim: Dim) -> bool:
        """Whether `call` is min(dim, N); the Graph then gets the limit dim <= N."""
        others = [a for a in call.args if a != dim]
        if call.function != "min" or len(others) != 1 or not isinstance(others[0], int):
            return False
        reason = f"a constant that is sliced to it and read by {self.place!r} has no more rows"
        self._graph.add_limit(dim, others[0], reason)
        return True

    def _position(self, symbol: Symbol) -> int:
        names = [n for v in self._graph.inputs for d in v.type.shape for n in _ordered(d)]
        return names.index(symbol.name) if symbol.name in names else len(names)

    def _matmul(self, a: Value, b: Value) -> None:
        if a.type.rank == 0 or b.type.rank == 0:
            return
        left, right = a.type.shape, b.type.shape
        self.equal(left[-1], right[-2] if len(right) > 1 else right[0])
        self.broadcast([left[:-2], right[:-2]])

    def _reshape(self, old: Dim, new: Dim) -> None:
        """Equal element counts: what is left after common factors may be symbol = number."""
        a, b = self._factors(old), self._factors(new)
        for atom in [x for x in a[1] if x in b[1]]:
            if atom in a[1] and atom in b[1]:
                a[1].remove(atom)
                b[1].remove(atom)
        for (scale, atoms), (other, rest) in ((a, b), (b, a)):
            if len(atoms) == 1 and not rest and scale and other % scale == 0:
                self.equal(Expr((((atoms[0],), 1),)), other // scale)

    def _factors(self, dim: Dim) -> tuple[int, list[Atom]]:
        match self.resolve(dim):
            case int(number):
                return number, []
            case Expr(terms=((atoms, scale),)):
                return scale, list(atoms)
        return 0, []

    def _concat(self, values: Sequence[Value], axis: int) -> None:
        first = values[0]
        for value in values[1:]:
            if value.type.rank != first.type.rank:
                return
            for i in range(first.type.rank):
                if i != axis:
                    self.equal(first.type.shape[i], value.type.shape[i])

    def _replace(self, old: Atom, new: Dim) -> None:
        self._replaced.append((old, new))
        graph = self._graph
        made = [v for n in graph.nodes for v in n.outputs]
        for value in [*graph.inputs, *made]:
            shape = tuple(replace_atom(d, old, new) for d in value.type.shape)
            if shape != value.type.shape:
                graph.set_type(value, value.type.with_shape(shape))
        for node in graph.nodes:
            changed = {k: self.resolve_all(v) for k, v in node.attrs.items()}
            if changed != dict(node.attrs):
                graph.set_attrs(node, **changed)
        limits = [replace(x, dim=replace_atom(x.dim, old, new)) for x in graph.limits]
        graph.replace_limits(limits)


def _ordered(dim: Dim) -> list[str]:
    return sorted(dims.symbols(dim))
