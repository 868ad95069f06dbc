"""Einsum of one or two operands as transposes, sums and one matmul."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend.builder import Builder, Operand
from sparsec.ir.dims import Dim, product

Labels = list[str]


def einsum(g: Builder, equation: str, operands: Sequence[Operand]) -> Operand:
    """The value of an einsum equation such as `bqd,bkd->bqk`."""
    ranks = [x.type.rank for x in operands]
    terms, output = _parse(equation.replace(" ", ""), ranks)
    if len(operands) == 1:
        return _arranged(g, operands[0], terms[0], output)
    if len(operands) != 2:
        raise UnsupportedOp(f"Einsum of {len(operands)} operands is not supported, only 1 or 2")
    return _product(g, operands[0], operands[1], terms[0], terms[1], output)


def _parse(equation: str, ranks: list[int]) -> tuple[list[Labels], Labels]:
    left, arrow, right = equation.partition("->")
    texts = left.split(",")
    if len(texts) != len(ranks):
        raise InvalidModel(f"the equation {equation!r} does not have {len(ranks)} operands")
    dots = [r - len(t.replace("...", "")) for t, r in zip(texts, ranks, strict=True)]
    terms = [_labels(t, n) for t, n in zip(texts, dots, strict=True)]
    for term, rank in zip(terms, ranks, strict=True):
        if len(term) != rank:
            raise InvalidModel(f"a term of {equation!r} does not fit an operand of {rank} axes")
        if len(set(term)) != len(term):
            raise UnsupportedOp(f"Einsum {equation!r} repeats a label in one operand")
    if arrow:
        return terms, _labels(right, max(dots))
    flat = [label for term in terms for label in term]
    once = sorted(label for label in set(flat) if flat.count(label) == 1 and label.isalpha())
    spread = [label for label in _labels("...", max(dots)) if label in flat]
    return terms, spread + once


def _labels(text: str, dots: int) -> Labels:
    """One label per axis; an ellipsis is the labels ".n" to ".1", counted from its end."""
    before, ellipsis, after = text.partition("...")
    middle = [f".{i}" for i in range(dots, 0, -1)] if ellipsis else []
    return [*before, *middle, *after]


def _arranged(g: Builder, x: Operand, labels: Labels, output: Labels) -> Operand:
    """`x` summed over the labels that are not in `output`, in the order of `output`."""
    extra = tuple(i for i, label in enumerate(labels) if label not in output)
    if extra:
        x = g.add("reduce_sum", [x], axes=extra, keepdims=False)
    kept = [label for label in labels if label in output]
    if set(kept) != set(output):
        raise InvalidModel(f"the result has the labels {output}, the operand {labels}")
    return g.transpose(x, [kept.index(label) for label in output])


def _product(
    g: Builder, a: Operand, b: Operand, left: Labels, right: Labels, output: Labels
) -> Operand:
    """[batch, rows, inner] x [batch, inner, cols], each group of labels flattened."""
    batch = [x for x in left if x in right and x in output]
    inner = [x for x in left if x in right and x not in output]
    rows = [x for x in left if x not in right and x in output]
    cols = [x for x in right if x not in left and x in output]
    if set(output) != {*batch, *rows, *cols}:
        raise InvalidModel(f"the result has labels {output} that no operand has")
    a = _arranged(g, a, left, batch + rows + inner)
    b = _arranged(g, b, right, batch + inner + cols)
    of_a = dict(zip(batch + rows + inner, a.type.shape, strict=True))
    of_b = dict(zip(batch + inner + cols, b.type.shape, strict=True))
    for label in batch + inner:
        g.joint_shape([(of_a[label],), (of_b[label],)])
    of_a = dict(zip(batch + rows + inner, a.type.shape, strict=True))
    of_b = dict(zip(batch + inner + cols, b.type.shape, strict=True))
    n, k = [of_a[x] for x in batch], [of_a[x] for x in inner]
    m, c = [of_a[x] for x in rows], [of_b[x] for x in cols]
    flat_a = g.reshape(a, [*n, product(m), product(k)])
    flat_b = g.reshape(b, [*n, product(k), product(c)])
    result = g.add("matmul", [flat_a, flat_b])
    shape: list[Dim] = [*n, *m, *c]
    return _arranged(g, g.reshape(result, shape), batch + rows + cols, output)
