"""Dims against plain integers: every identity is checked over a grid of symbol values."""

from __future__ import annotations

import itertools

import pytest

from sparsec.ir import dims
from sparsec.ir.dims import Dim, ceildiv, floordiv, maximum, minimum, mod, parse, round_up, symbol

BATCH, SEQ = symbol("batch"), symbol("seq")
GRID = [{"batch": b, "seq": s} for b, s in itertools.product((1, 2, 7), (1, 5, 128, 300))]

# expression, the same in integers
CASES = [
    (BATCH * SEQ * 3 - SEQ, lambda b, s: b * s * 3 - s),
    (5 - SEQ, lambda b, s: 5 - s),
    (floordiv(BATCH * SEQ * 6, SEQ * 2), lambda b, s: b * 3),
    (floordiv(SEQ + 1, 2), lambda b, s: (s + 1) // 2),
    (floordiv(100, SEQ), lambda b, s: 100 // s),
    (SEQ % 4, lambda b, s: s % 4),
    (100 % SEQ, lambda b, s: 100 % s),
    (mod(SEQ * 8, 4), lambda b, s: 0),
    (ceildiv(BATCH * SEQ, 64), lambda b, s: -(-b * s // 64)),
    (round_up(SEQ, 16), lambda b, s: (s + 15) // 16 * 16),
    (maximum(SEQ, 128), lambda b, s: max(s, 128)),
    (minimum(SEQ, 128) * BATCH, lambda b, s: min(s, 128) * b),
    (maximum(SEQ - 1, 0), lambda b, s: s - 1),
    (minimum(SEQ, SEQ * BATCH), lambda b, s: s),
]


@pytest.mark.parametrize(("dim", "plain"), CASES, ids=[str(c[0]) for c in CASES])
def test_evaluate_equals_integers(dim, plain):
    for env in GRID:
        assert dims.evaluate(dim, env) == plain(env["batch"], env["seq"])


@pytest.mark.parametrize(("dim", "plain"), CASES, ids=[str(c[0]) for c in CASES])
def test_bounds_hold(dim, plain):
    low, high = dims.bounds(dim)
    values = [plain(env["batch"], env["seq"]) for env in GRID]
    assert low is None or low <= min(values)
    assert high is None or high >= max(values)


def test_an_atom_that_may_be_negative_has_no_bound():
    assert dims.bounds(minimum(SEQ - 5, 3)) == (None, None)
    assert dims.bounds(minimum(SEQ, 3)) == (1, None)


def test_every_other_of_some_is_one_at_least():
    assert dims.bounds(ceildiv(SEQ, 2)) == (1, None)
    assert dims.bounds(ceildiv(SEQ + 6, 4)) == (2, None)
    assert dims.bounds(floordiv(SEQ, 2)) == (0, None)
    assert dims.bounds(floordiv(100, SEQ)) == (0, None)
    assert dims.bounds(ceildiv(SEQ - 2, 2)) == (0, None)
    assert dims.bounds(floordiv(SEQ - 2, 2)) == (None, None)


def test_equal_expressions_are_equal_and_print_alike():
    a, b = (SEQ + 1) * BATCH, BATCH + BATCH * SEQ
    assert a == b
    assert str(a) == str(b) == "batch*seq + batch"
    assert SEQ - SEQ == 0


def test_compare_is_none_only_where_it_depends():
    assert dims.compare(SEQ + 1, SEQ) == 1
    assert dims.compare(0, SEQ) == -1
    assert dims.compare(SEQ, 128) is None
    assert dims.compare(SEQ, BATCH) is None


def test_replace_atom_reaches_into_calls():
    clamped = minimum(SEQ, 128)
    atom = dims.only_atom(clamped)
    assert atom is not None
    dim: Dim = BATCH * clamped + floordiv(clamped, 3)
    assert dims.replace_atom(dim, atom, SEQ) == BATCH * SEQ + floordiv(SEQ, 3)
    assert dims.only_atom(SEQ + 1) is None


def test_substitute_and_symbols():
    dim = BATCH * SEQ + minimum(SEQ, 128)
    assert dims.symbols(dim) == {"batch", "seq"}
    assert dims.substitute(dim, {"seq": 10}) == BATCH * 10 + 10


def test_unbound_symbol_is_named():
    with pytest.raises(KeyError, match="seq"):
        dims.evaluate(SEQ, {"batch": 1})


@pytest.mark.parametrize(
    "text", ["7", "batch", "64*floordiv(batch*seq + 63, 64)", "2*seq - 1", "max(batch, seq)"]
)
def test_parse_reads_what_is_printed(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize("text", ["", "batch +", "import os", "f(1)", "batch.x", "1.5"])
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="no dim"):
        parse(text)
