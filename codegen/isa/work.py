"""What activations issue per vector, counted in polynomials.py, coarse.py and pieces.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsec.codegen.isa.pieces import PIECEWISE


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic instructions and divisions."""

    others: int
    divides: int = 0


EXP_NEGATIVE = Work(13)
_IN_PIECES = Work(4)  # ten for two vectors, and one scaling of each is left out
_FORMS: Mapping[str, Mapping[str, Work]] = {
    "coarse": {"gelu": Work(13), "gelu_tanh": Work(13)},
    "pieces": dict.fromkeys(PIECEWISE, _IN_PIECES),
}
_EXACT: Mapping[str, Work] = {
    "none": Work(0),
    "relu": Work(1),
    "gelu": Work(19, 1),
    "gelu_tanh": Work(21, 1),
    "tanh": Work(15, 1),
    "sigmoid": Work(16, 1),
    "silu": Work(17, 1),
}


def activation_work(name: str, form: str = "exact") -> Work:
    """Of one vector; a form that the activation does not have is the exact one."""
    return _FORMS.get(form, {}).get(name, _EXACT[name])
