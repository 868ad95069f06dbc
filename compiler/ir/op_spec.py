"""What one row of the table of operations holds.

`infer` gives the output types; it raises InvalidGraph without naming the node (the caller does).
`evaluate` is the meaning: the interpreter over it is the oracle of every pass and every kernel,
and folds constants. Operands that are absent are None. Attributes may hold dims; `env` binds
their symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsec.ir.types import TensorType

Attrs = Mapping[str, Any]
Array = np.ndarray[Any, Any]
Types = Sequence[TensorType | None]
Arrays = Sequence[Array | None]
Infer = Callable[[Types, Attrs], list[TensorType]]
Evaluate = Callable[[Arrays, Attrs, Mapping[str, int]], list[Array]]


@dataclass(frozen=True, slots=True)
class PanelRule:
    """Which operands an op's kernels read in token panels; its outputs are panels then too,
    unless they are `rows`."""

    operands: tuple[int, ...]
    rows: bool = False


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One op. An `elementwise` op broadcasts as NumPy does.

    `attrs` names its attributes, `optional_attrs` those that a node may leave out. `binds` names
    the attribute that is a symbol whose value is found when the model runs: the op's first result,
    a scalar. The attribute `most` then bounds it.
    """

    name: str
    infer: Infer
    evaluate: Evaluate
    attrs: tuple[str, ...] = ()
    elementwise: bool = False
    panels: PanelRule | None = None
    optional_attrs: tuple[str, ...] = ()
    binds: str | None = None
