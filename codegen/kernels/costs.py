"""The table of what schedules cost: one row per family of schedules that has a count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparsec.codegen.kernels import (
    attention_cost,
    dense_cost,
    float_cost,
    int8_cost,
    layer_norm_cost,
)
from sparsec.codegen.kernels.counts import Counts
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Target


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model is run on: `batch` sequences of `seq` tokens."""

    batch: int
    seq: int

    @property
    def tokens(self) -> int:
        return self.batch * self.seq


Count = Callable[[Workload, Schedule, Shape, Target], Counts]

COUNTS: Mapping[str, Count] = {
    "int8_gemm": lambda w, s, at, t: int8_cost.counts(w, s, at.tokens, t),
    "int8_bitmap": lambda w, s, at, t: int8_cost.bitmap_counts(w, at.tokens, t),
    "dense_gemm": lambda w, s, at, t: dense_cost.counts(w, s, at.tokens, t),
    "float_gemm": lambda w, s, at, t: float_cost.counts(w, s, at.tokens, t),
    "layer_norm": lambda w, s, at, t: layer_norm_cost.counts(w, s, at.tokens, t),
    "attention": lambda w, s, at, t: attention_cost.counts(w, s, at.batch, at.seq, t),
    "attention_int8": lambda w, s, at, t: attention_cost.counts_int8(w, s, at.batch, at.seq, t),
}
