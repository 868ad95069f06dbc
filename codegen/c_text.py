"""Text of C: names, string literals, comments, numbers, and expressions of dims."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from sparsec.ir import dims
from sparsec.ir.dims import Call, Dim, Expr, Monomial, Symbol

_RESERVED = """
    auto break case char const continue default do double else enum extern float for goto if
    inline int long register restrict return short signed sizeof static struct switch typedef
    union unsigned void volatile while _Bool NULL NAN INFINITY main
"""
_KEYWORDS = frozenset(_RESERVED.split())

C_TYPES = {
    "bool": "uint8_t",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int16": "int16_t",
    "uint16": "uint16_t",
    "int32": "int32_t",
    "uint32": "uint32_t",
    "int64": "int64_t",
    "uint64": "uint64_t",
    "float16": "uint16_t",
    "float32": "float",
    "float64": "double",
}


def c_names(names: Sequence[str], taken: Iterable[str]) -> list[str]:
    """A C identifier for each name: the name itself where C allows it and nothing has it."""
    used = set(taken) | _KEYWORDS
    result: list[str] = []
    for name in names:
        base = re.sub(r"\W", "_", name, flags=re.ASCII)
        if not base or base[0].isdigit():
            base = f"n{base}"
        while base in used or base.startswith("sparsec_"):
            base = f"{base}_" if not base.startswith("sparsec_") else f"n_{base}"
        used.add(base)
        result.append(base)
    return result


def c_string(text: str) -> str:
    """A string literal; bytes that are not plain ASCII are octal escapes."""
    return '"' + "".join(_escaped(byte) for byte in text.encode()) + '"'


def comment_text(text: str) -> str:
    """`text` as it may stand within a comment, on one line."""
    return " ".join(text.split()).replace("*/", "* /").replace("/*", "/ *")


def c_float(value: float) -> str:
    """The shortest literal that is the same float32."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    if np.isnan(single):
        return "NAN"
    if np.isinf(single):
        return "INFINITY" if single > 0 else "-INFINITY"
    text = str(single)
    return f"{text}f" if any(c in text for c in ".e") else f"{text}.0f"


def magnitude(values: Iterable[Dim]) -> Dim:
    """A polynomial without negative terms that is at least the absolute value of each dim, and
    of everything on the way to it, for all symbols >= 1."""
    largest: dict[Monomial, int] = {}
    for value in values:
        for monomial, coefficient in _terms(_bound(value)):
            largest[monomial] = max(coefficient, largest.get(monomial, 0))
    total: Dim = 0
    for monomial, coefficient in largest.items():
        total = total + (Expr(((monomial, coefficient),)) if monomial else coefficient)
    return total


def _bound(value: Dim) -> Dim:
    total: Dim = 0
    for monomial, coefficient in _terms(value):
        term: Dim = abs(coefficient)
        for atom in monomial:
            match atom:
                case Symbol(name):
                    term = term * dims.symbol(name)
                case Call("floordiv", (a, _)):
                    term = term * _bound(a)
                case Call(_, (a, b)):
                    term = term * (_bound(a) + _bound(b))
        total = total + term
    return total


def _terms(value: Dim) -> list[tuple[Monomial, int]]:
    if isinstance(value, Expr):
        return list(value.terms)
    return [((), value)] if value else []


def _escaped(byte: int) -> str:
    char = chr(byte)
    if char == "\n":
        return "\\n"
    if char in '"\\?':  # "??" would start a trigraph
        return f"\\{char}"
    return char if 32 <= byte < 127 else f"\\{byte:03o}"
