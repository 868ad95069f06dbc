"""GELU for results that are stored as u8: half the work of the one in polynomials.py.

    gelu(x) = max(x, 0) - g(|x|),  g(a) = a * (1 - gelu(a) / a)

g is a bump of height 0.17 that is under 2e-5 from LIMIT on: one polynomial and no division.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen.isa.polynomials import Unary, at_least, at_most, horner
from sparsec.codegen.isa.vector import VectorIsa, keep

MAX_ERROR = 5e-5  # absolute, rounding in fp32 included
LIMIT = 4.5
# g(a) = a * p(a) on [0, LIMIT], minimax: 1.5e-5 before rounding
_ERF_FORM = (0.49974462389945984, -0.39784568548202515, 0.0016804002225399017,
             0.052197471261024475, 0.028165698051452637, -0.037507228553295135,
             0.014884344302117825, -0.0029695997945964336, 0.00030500476714223623,
             -1.2893731764052063e-05)  # fmt: skip
_TANH_FORM = (0.49966007471084595, -0.3966531455516815, -0.003339543705806136,
              0.06216898560523987, 0.018347453325986862, -0.03220643848180771,
              0.01322324387729168, -0.0026669292710721493, 0.00027516557020135224,
              -1.1660225936793722e-05)  # fmt: skip


def _gelu(v: VectorIsa, x: Any, coefficients: Sequence[float]) -> Any:
    size = at_most(v, keep(T.abs(x)), LIMIT)
    return keep(at_least(v, x, 0.0) - size * horner(v, size, coefficients))


COARSE: dict[str, Unary] = {
    "gelu": lambda v, x: _gelu(v, x, _ERF_FORM),
    "gelu_tanh": lambda v, x: _gelu(v, x, _TANH_FORM),
}
