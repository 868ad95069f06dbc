"""Graph rewrites: a pattern to find, a check that may refuse with a reason, a rewrite.

A pattern is written with the names of ops; strings bind any value, and a name that comes twice
must bind the same value both times:

    p.mul("x", p.add(p.erf(p.div("x", p.scalar(SQRT_2))), p.scalar(1.0)))

Commutative ops match both ways round. Operands past those that a pattern names are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsec.ir.dims import Dim
from sparsec.ir.graph import Graph, Node, Value
from sparsec.ir.op_spec import Array
from sparsec.ir.types import DType
from sparsec.passes.base import PassResult

COMMUTATIVE = frozenset(
    {"add", "mul", "maximum", "minimum", "equal"}
    | {"logical_and", "logical_or", "logical_xor"}
    | {"bitwise_and", "bitwise_or", "bitwise_xor"}
)
HALVES = (DType.F16, DType.BF16)
SCALAR_TOLERANCE = 1e-5  # relative: constants are spelled with 6 digits or more, or lie in fp32


@dataclass(frozen=True, slots=True)
class Apply:
    """One of `ops` applied to terms. `optional`: the first operand may stand there alone."""

    ops: tuple[str, ...]
    args: tuple[Term, ...]
    bind: str | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant that a predicate accepts."""

    accepts: Callable[[Array], bool]
    bind: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The first of several terms that fits; the others are tried when the rest does not fit."""

    terms: tuple[Term, ...]


Term = str | Apply | Constant | Choice
Bindings = Mapping[str, Value]


class Pattern:
    """Writes terms: `p.matmul("x", "w")` is a term for the op `matmul`."""

    def __getattr__(self, op: str) -> Callable[..., Apply]:
        def term(*args: Term, bind: str | None = None) -> Apply:
            return Apply((op,), args, bind)

        return term

    def any_op(self, ops: Sequence[str], *args: Term, bind: str | None = None) -> Apply:
        return Apply(tuple(ops), args, bind)

    def maybe(self, op: str, arg: Term) -> Apply:
        """`op` applied to `arg`, or `arg` alone."""
        return Apply((op,), (arg,), None, True)

    def one_of(self, *terms: Term) -> Choice:
        return Choice(terms)

    def constant(
        self, accepts: Callable[[Array], bool] = lambda _: True, *, bind: str | None = None
    ) -> Constant:
        return Constant(accepts, bind)

    def scalar(self, value: float | None = None, *, bind: str | None = None) -> Constant:
        """A constant of one element, near `value` when it is given."""

        def accepts(data: Array) -> bool:
            if data.size != 1:
                return False
            return value is None or is_close(float(data.reshape(())), value)

        return Constant(accepts, bind)


def is_close(found: float, wanted: float) -> bool:
    """Whether two spellings of a constant mean the same number, in half precision too."""
    near = abs(found - wanted) <= SCALAR_TOLERANCE * abs(wanted)
    return near or any(found == float(np.asarray(wanted, d.numpy)) for d in HALVES)


@dataclass(frozen=True, slots=True)
class Reject:
    """A refusal to rewrite, with its reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Match:
    """A place where a pattern fits: `root` and what its names are bound to."""

    root: Node
    bindings: Bindings

    def __getitem__(self, name: str) -> Value:
        return self.bindings[name]

    def get(self, name: str) -> Value | None:
        return self.bindings.get(name)

    def node(self, name: str) -> Node:
        """The producer of the value bound to `name`."""
        producer = self.bindings[name].producer
        assert producer is not None, name
        return producer

    def scalar(self, name: str) -> float:
        """The number that the constant bound to `name` holds."""
        data = self.bindings[name].data
        assert data is not None, name
        return float(data.reshape(()))


class Builder:
    """Writes new nodes: `g.linear(x, w, None, None, activation="none")`.

    New nodes are named after the node that they replace.
    """

    def __init__(self, graph: Graph, name: str):
        self.graph = graph
        self.name = name

    def __getattr__(self, op: str) -> Callable[..., Value]:
        def add(*inputs: Value | None, **attrs: Any) -> Value:
            return self.graph.add(op, inputs, attrs, name=self.name)

        return add

    def constant(self, data: Array, name: str | None = None) -> Value:
        return self.graph.add_constant(data, name or f"{self.name}.constant")

    def scalar(self, value: float, like: Value) -> Value:
        """A constant of rank 0 with the dtype of `like`."""
        return self.constant(np.asarray(value, like.type.dtype.numpy))


class RewriteRule:
    """A rewrite of the root node's output. Subclasses say what, when and into what."""

    def pattern(self, p: Pattern) -> Term:
        raise NotImplementedError

    def check(self, m: Match) -> Reject | None:
        return None

    def rewrite(self, m: Match, g: Builder) -> Value:
        raise NotImplementedError

    @property
    def name(self) -> str:
        return type(self).__name__


def apply_rules(graph: Graph, rules: Sequence[RewriteRule]) -> PassResult:
    """Applies rules until none fits any more; the graph is left sorted and without dead nodes.

    The notes are the refusals that stood at the end.
    """
    return _Rewriter(graph, rules).run()


def matches(term: Term, value: Value, bindings: Bindings) -> Iterator[Bindings]:
    """All ways in which `term` fits the computation of `value`."""
    match term:
        case str():
            yield from _bind(bindings, term, value)
        case Constant(accepts, bind):
            if value.data is not None and accepts(value.data):
                yield from _bind(bindings, bind, value)
        case Choice(terms):
            for one in terms:
                yield from matches(one, value, bindings)
        case Apply():
            yield from _match_apply(term, value, bindings)


def read_once(value: Value, graph_outputs: Sequence[Value] = ()) -> bool:
    """Whether one operand of one node reads `value`, and none of the graph's outputs is it."""
    return len(value.uses) == 1 and value not in graph_outputs


# They move elements of their first operand, and leave each as it is.
VIEWS = frozenset({"reshape", "transpose", "broadcast_to", "slice", "gather"})


def is_row(constant: Value, channels: Dim) -> bool:
    """Whether a constant has one value per channel: its last axis, the others being of size 1."""
    shape = constant.type.shape
    return constant.type.elements == channels and (not shape or shape[-1] == channels)


def as_row(constant: Value, g: Builder) -> Value:
    """A constant of `is_row` without its leading axes of size 1."""
    if constant.type.rank == 1:
        return constant
    assert constant.data is not None, constant
    return g.constant(constant.data.reshape(-1), g.graph.base_name(constant.name))


def replace_node(
    graph: Graph,
    old: Node,
    op: str,
    inputs: Sequence[Value | None],
    attrs: Mapping[str, Any],
) -> Node:
    """A new node in the place of `old`, with its name; outputs that are new come after its own.

    The new node is the last of the graph: sort the graph when all are replaced.
    """
    name = old.name
    new = graph.add_node(op, inputs, attrs, name=name)
    for ours, theirs in zip(old.outputs, new.outputs, strict=False):
        graph.replace_uses(ours, theirs)
    graph.erase(old)
    graph.rename(new, name)
    return new


def _match_apply(term: Apply, value: Value, bindings: Bindings) -> Iterator[Bindings]:
    node = value.producer
    if node is not None and node.op in term.ops:
        for bound in _bind(bindings, term.bind, value):
            yield from _match_args(term.args, node.inputs, bound)
            if len(term.args) == 2 and node.op in COMMUTATIVE:
                yield from _match_args(term.args, node.inputs[::-1], bound)
    if term.optional:
        yield from matches(term.args[0], value, bindings)


def _match_args(
    args: Sequence[Term], values: Sequence[Value | None], bindings: Bindings
) -> Iterator[Bindings]:
    if not args:
        yield bindings
        return
    if not values or values[0] is None:
        return
    for bound in matches(args[0], values[0], bindings):
        yield from _match_args(args[1:], values[1:], bound)


def _bind(bindings: Bindings, name: str | None, value: Value) -> Iterator[Bindings]:
    if name is None:
        yield bindings
    elif name not in bindings:
        yield {**bindings, name: value}
    elif bindings[name] is value:
        yield bindings


@dataclass(slots=True)
class _Rewriter:
    """The driver: a work list of nodes, so that one rewrite looks again only at its readers."""

    graph: Graph
    rules: Sequence[RewriteRule]
    by_op: dict[str, list[tuple[RewriteRule, Term]]] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    alive: set[Node] = field(default_factory=set)
    made: set[tuple[str, Node]] = field(default_factory=set)

    def run(self) -> PassResult:
        for rule in self.rules:
            term = rule.pattern(Pattern())
            for op in _root_ops(term):
                self.by_op.setdefault(op, []).append((rule, term))
        self.graph.drop_dead_nodes()
        changed = 0
        while count := self._sweep():
            changed += count
        self.graph.sort()
        self.graph.drop_dead_nodes()
        notes = tuple(f"{rule} at {node}: {why}" for (rule, node), why in self.refused.items())
        return PassResult(changed, notes)

    def _sweep(self) -> int:
        """Looks at every node once, and again at the readers of what was rewritten."""
        self.refused.clear()
        self.alive = set(self.graph.nodes)
        work = list(reversed(self.graph.nodes))
        changed = 0
        while work:
            node = work.pop()
            if node not in self.alive:
                continue
            new = self._rewrite_node(node)
            if new is None:
                continue
            changed += 1
            work += [user for user in reversed(new.users)]
            if new.producer is not None:
                work.append(new.producer)
        return changed

    def _rewrite_node(self, node: Node) -> Value | None:
        for rule, term in self.by_op.get(node.op, ()):
            for bindings in matches(term, node.outputs[0], {}):
                match = Match(node, bindings)
                reject = rule.check(match)
                new = None if reject else self._apply(rule, match)
                if new is not None:
                    self.refused.pop((rule.name, node.name), None)
                    return new
                if reject is not None and (rule.name, node) not in self.made:
                    self.refused.setdefault((rule.name, node.name), reject.reason)
        return None

    def _apply(self, rule: RewriteRule, match: Match) -> Value | None:
        old = match.root.output
        first_new = len(self.graph.nodes)
        name = self.graph.base_name(match.root.name)
        new = rule.rewrite(match, Builder(self.graph, name))
        added = self.graph.nodes[first_new:]
        if (new.type.dtype, new.type.shape) != (old.type.dtype, old.type.shape):
            for node in reversed(added):
                self.graph.erase(node)
            reason = f"the result would be {new.type}, not {old.type}"
            self.refused.setdefault((rule.name, match.root.name), reason)
            return None
        self.alive.update(added)
        self.made.update((rule.name, node) for node in added)
        self.graph.replace_uses(old, new)
        self._erase_dead(match.root)
        if added and new.producer is added[-1]:
            self.graph.rename(added[-1], name)
        return new

    def _erase_dead(self, root: Node) -> None:
        """Erases `root` and all that only it read, so that counts of uses stay true."""
        stack = [root]
        while stack:
            node = stack.pop()
            read = any(v.uses or v in self.graph.outputs for v in node.outputs)
            if read or node not in self.alive:
                continue
            self.graph.erase(node)
            self.alive.discard(node)
            stack += [v.producer for v in node.inputs if v is not None and v.producer]


def _root_ops(term: Term) -> Iterator[str]:
    match term:
        case Apply(ops=ops):
            yield from ops
        case Choice(terms):
            yield from dict.fromkeys(op for one in terms for op in _root_ops(one))
        case _:
            raise AssertionError(f"a pattern's root is an op, not {term}")
