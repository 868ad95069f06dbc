"""What activations issue per vector, counted in polynomials.py and coarse.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic instructions and divisions."""

    others: int
    divides: int = 0


EXP_NEGATIVE = Work(13)
_COARSE: Mapping[str, Work] = {"gelu": Work(13), "gelu_tanh": Work(13)}
_EXACT: Mapping[str, Work] = {
    "none": Work(0),
    "relu": Work(1),
    "gelu": Work(19, 1),
    "gelu_tanh": Work(21, 1),
    "tanh": Work(15, 1),
    "sigmoid": Work(16, 1),
    "silu": Work(17, 1),
}


def activation_work(name: str, *, coarse: bool) -> Work:
    """Of one vector; `coarse` where a coarse form may be used."""
    return _COARSE[name] if coarse and name in _COARSE else _EXACT[name]
