"""Symbolic dims: integer polynomials over named symbols, such as `batch * seq * 3`.

A `Dim` is an `int` when it is known and an `Expr` when it depends on the inputs. Every symbol
stands for a size that is at least 1. Division that is not exact, remainders, minimum and maximum
are opaque atoms of the polynomial, so equal expressions stay equal and print the same.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Symbol:
    """A size that is bound when the model runs."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Call:
    """An opaque function of dims: `floordiv`, `mod`, `max` or `min`.

    The first two are of natural numbers, whose quotients are the same in C and in Python: who
    makes one of a dim that may be negative adds a limit to the graph that refuses such shapes.
    """

    function: str
    args: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(str(a) for a in self.args)})"


Atom = Symbol | Call
Monomial = tuple[Atom, ...]  # sorted by text; a power is a repetition; () is the constant


@dataclass(frozen=True, slots=True)
class Expr:
    """A polynomial that is not constant: sorted (monomial, coefficient) pairs."""

    terms: tuple[tuple[Monomial, int], ...]

    def __add__(self, other: Dim) -> Dim:
        return _sum(_terms(self) + _terms(other))

    def __radd__(self, other: int) -> Dim:
        return self + other

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim) -> Dim:
        return self + other * -1

    def __rsub__(self, other: int) -> Dim:
        return -self + other

    def __mul__(self, other: Dim) -> Dim:
        return _sum([(_monomial(a + b), x * y) for a, x in _terms(self) for b, y in _terms(other)])

    def __rmul__(self, other: int) -> Dim:
        return self * other

    def __floordiv__(self, other: Dim) -> Dim:
        return floordiv(self, other)

    def __rfloordiv__(self, other: int) -> Dim:
        return floordiv(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return mod(self, other)

    def __rmod__(self, other: int) -> Dim:
        return mod(other, self)

    def __str__(self) -> str:
        return " + ".join(_term_text(m, c) for m, c in self.terms).replace("+ -", "- ")

    def __repr__(self) -> str:
        return f"Expr({self})"


Dim = int | Expr


def symbol(name: str) -> Expr:
    """The dim that is the value of `name` at run time."""
    return Expr((((Symbol(name),), 1),))


def floordiv(a: Dim, b: Dim) -> Dim:
    """`a // b`, exact where the polynomial divides."""
    quotient = _exact_quotient(a, b)
    return quotient if quotient is not None else _call("floordiv", (a, b))


def mod(a: Dim, b: Dim) -> Dim:
    """`a % b`, 0 where the polynomial divides."""
    return 0 if _exact_quotient(a, b) is not None else _call("mod", (a, b))


def ceildiv(a: Dim, b: int) -> Dim:
    """`a / b` rounded up."""
    return floordiv(a + (b - 1), b)


def round_up(a: Dim, b: int) -> Dim:
    """`a` rounded up to a multiple of `b`."""
    return ceildiv(a, b) * b


def maximum(a: Dim, b: Dim) -> Dim:
    """The larger of two dims, decided now when bounds allow."""
    larger = _order(a, b)
    if larger is not None:
        return a if larger else b
    low, high = sorted((a, b), key=str)
    return _call("max", (low, high))


def minimum(a: Dim, b: Dim) -> Dim:
    """The smaller of two dims, decided now when bounds allow."""
    larger = _order(a, b)
    if larger is not None:
        return b if larger else a
    low, high = sorted((a, b), key=str)
    return _call("min", (low, high))


def _order(a: Dim, b: Dim) -> bool | None:
    """True when always `a >= b`, False when always `a <= b`, else None."""
    low, high = bounds(a - b)
    if low is not None and low >= 0:
        return True
    return False if high is not None and high <= 0 else None


def product(dims: Iterable[Dim]) -> Dim:
    """The product of all dims; 1 when there is none."""
    result: Dim = 1
    for dim in dims:
        result = result * dim
    return result


def compare(a: Dim, b: Dim) -> int | None:
    """The sign of `a - b` if it is the same for all values of the symbols, else None."""
    difference = a - b
    if isinstance(difference, int):
        return (difference > 0) - (difference < 0)
    low, high = bounds(difference)
    if low is not None and low > 0:
        return 1
    if high is not None and high < 0:
        return -1
    return None


def bounds(dim: Dim) -> tuple[int | None, int | None]:
    """The least and the greatest value over all symbols >= 1; None where there is no bound."""
    if isinstance(dim, int):
        return dim, dim
    low: int | None = 0
    high: int | None = 0
    for monomial, coefficient in dim.terms:
        leasts = [_atom_least(atom) for atom in monomial]
        if not monomial:
            low = None if low is None else low + coefficient
            high = None if high is None else high + coefficient
            continue
        if any(least is None for least in leasts):
            return None, None
        least = math.prod(n for n in leasts if n is not None)
        if coefficient > 0:
            low, high = (None if low is None else low + coefficient * least), None
        else:
            high, low = (None if high is None else high + coefficient * least), None
    return low, high


def symbols(dim: Dim) -> set[str]:
    """The names of all symbols that `dim` depends on."""
    if isinstance(dim, int):
        return set()
    names: set[str] = set()
    for monomial, _ in dim.terms:
        for atom in monomial:
            match atom:
                case Symbol(name):
                    names.add(name)
                case Call(_, args):
                    names |= {n for a in args for n in symbols(a)}
    return names


def evaluate(dim: Dim, env: Mapping[str, int]) -> int:
    """The value of `dim` under `env`; KeyError names a symbol that is not bound."""
    if isinstance(dim, int):
        return dim
    return sum(c * math.prod(_atom_value(a, env) for a in m) for m, c in dim.terms)


def substitute(dim: Dim, env: Mapping[str, Dim]) -> Dim:
    """`dim` with the symbols in `env` replaced; other symbols stay."""
    return _replaced(dim, {Symbol(name): value for name, value in env.items()})


def replace_atom(dim: Dim, old: Atom, new: Dim) -> Dim:
    """`dim` with every occurrence of `old`, inside of calls too, replaced by `new`."""
    return _replaced(dim, {old: new})


def _replaced(dim: Dim, by: Mapping[Atom, Dim]) -> Dim:
    if isinstance(dim, int):
        return dim
    result: Dim = 0
    for monomial, coefficient in dim.terms:
        result = result + coefficient * product(_replaced_atom(atom, by) for atom in monomial)
    return result


def _replaced_atom(atom: Atom, by: Mapping[Atom, Dim]) -> Dim:
    if atom in by:
        return by[atom]
    match atom:
        case Call(function, args):
            a, b = (_replaced(x, by) for x in args)
            return _FUNCTIONS[function](a, b)
    return Expr((((atom,), 1),))


def only_atom(dim: Dim) -> Atom | None:
    """The atom when `dim` is nothing but one atom, else None."""
    match dim:
        case Expr(terms=(((atom,), 1),)):
            return atom
    return None


def parse(text: str) -> Dim:
    """The dim that prints as `text`; ValueError when none does."""
    try:
        return _parsed(ast.parse(text, mode="eval").body)
    except SyntaxError:
        raise ValueError(f"{text!r} is no dim") from None


def _parsed(node: ast.expr) -> Dim:
    match node:
        case ast.Constant(int(value)):
            return value
        case ast.Name(name):
            return symbol(name)
        case ast.UnaryOp(ast.USub(), operand):
            return _parsed(operand) * -1
        case ast.BinOp(left, ast.Add(), right):
            return _parsed(left) + _parsed(right)
        case ast.BinOp(left, ast.Sub(), right):
            return _parsed(left) - _parsed(right)
        case ast.BinOp(left, ast.Mult(), right):
            return _parsed(left) * _parsed(right)
        case ast.Call(ast.Name(function), [a, b]) if function in _FUNCTIONS:
            return _FUNCTIONS[function](_parsed(a), _parsed(b))
    raise ValueError(f"{ast.unparse(node)!r} is no dim")


def c_text(dim: Dim) -> str:
    """`dim` as a C expression over int64_t variables named like the symbols."""
    if isinstance(dim, int):
        return str(dim)
    return " + ".join(
        " * ".join(([str(c)] if c != 1 or not m else []) + [_atom_c(a) for a in m])
        for m, c in dim.terms
    )


def _atom_c(atom: Atom) -> str:
    match atom:
        case Symbol(name):
            return name
        case Call("floordiv", (a, b)):
            return f"(({c_text(a)}) / ({c_text(b)}))"
        case Call("mod", (a, b)):
            return f"(({c_text(a)}) % ({c_text(b)}))"
        case Call(function, (a, b)):
            return f"sparsec_{function}({c_text(a)}, {c_text(b)})"
    raise AssertionError(atom)


def _atom_value(atom: Atom, env: Mapping[str, int]) -> int:
    match atom:
        case Symbol(name):
            return env[name]
        case Call("floordiv", (a, b)):
            return evaluate(a, env) // evaluate(b, env)
        case Call("mod", (a, b)):
            return evaluate(a, env) % evaluate(b, env)
        case Call("max", args):
            return max(evaluate(a, env) for a in args)
        case Call("min", args):
            return min(evaluate(a, env) for a in args)
    raise AssertionError(atom)


_FUNCTIONS = {"floordiv": floordiv, "mod": mod, "max": maximum, "min": minimum}


def _atom_least(atom: Atom) -> int | None:
    """A bound from below that is at least 0, or None when the atom may be negative."""
    if isinstance(atom, Symbol):
        return 1
    leasts = [bounds(a)[0] for a in atom.args]
    known = [n for n in leasts if n is not None and n >= 0]
    if atom.function == "max":
        return max(known, default=None)
    if len(known) < len(leasts):
        return None
    divisor = atom.args[1]
    if atom.function == "floordiv" and isinstance(divisor, int) and divisor:
        return known[0] // divisor
    return min(known) if atom.function == "min" else 0


def _terms(dim: Dim) -> list[tuple[Monomial, int]]:
    if isinstance(dim, Expr):
        return list(dim.terms)
    return [((), int(dim))] if dim else []


def _sum(terms: list[tuple[Monomial, int]]) -> Dim:
    total: dict[Monomial, int] = {}
    for monomial, coefficient in terms:
        total[monomial] = total.get(monomial, 0) + coefficient
    left = {m: c for m, c in total.items() if c}
    if not left:
        return 0
    if set(left) == {()}:
        return left[()]
    ordered = sorted(left.items(), key=lambda t: (-len(t[0]), [str(a) for a in t[0]]))
    return Expr(tuple(ordered))


def _monomial(atoms: Monomial) -> Monomial:
    return tuple(sorted(atoms, key=str))


def _call(function: str, args: tuple[Dim, Dim]) -> Dim:
    a, b = args
    if isinstance(a, int) and isinstance(b, int):
        return _atom_value(Call(function, args), {})
    return Expr((((Call(function, args),), 1),))


def _exact_quotient(a: Dim, b: Dim) -> Dim | None:
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    divisor = _terms(b)
    if len(divisor) != 1:
        return 1 if a == b else None
    (atoms, scale), *_ = divisor
    quotient: list[tuple[Monomial, int]] = []
    for monomial, coefficient in _terms(a):
        rest = list(monomial)
        for atom in atoms:
            if atom not in rest:
                return None
            rest.remove(atom)
        if coefficient % scale:
            return None
        quotient.append((tuple(rest), coefficient // scale))
    return _sum(quotient)


def _term_text(monomial: Monomial, coefficient: int) -> str:
    factors = [str(a) for a in monomial]
    if not factors:
        return str(coefficient)
    if coefficient == 1:
        return "*".join(factors)
    return "*".join([str(coefficient), *factors])
