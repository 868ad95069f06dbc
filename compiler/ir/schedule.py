"""What a kernel call computes and how: plain data for passes, code generation and tuning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """What is computed: an op, its static sizes, its types and its epilogue.

    `sizes` are the sizes that are known at compile time, by the names the kernel family uses
    (`m` output channels, `k` input channels, `head_size`). `density` is the share of non-zero
    blocks of a sparse weight, 1.0 when dense.
    """

    op: str
    sizes: tuple[tuple[str, int], ...]
    dtype: str
    layout: str = "dense"
    epilogue: str = ""
    density: float = 1.0

    def size(self, name: str) -> int:
        return dict(self.sizes)[name]

    def __str__(self) -> str:
        sizes = " ".join(f"{n}{v}" for n, v in self.sizes)
        parts = [self.op, self.dtype, sizes, self.layout, self.epilogue]
        return " ".join(p for p in parts if p)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How it is computed: a kernel family and the parameters that its variants differ in."""

    family: str
    isa: str
    params: tuple[tuple[str, int], ...] = ()
    source: str = "heuristic"  # or "log exact", "log nearest"

    def param(self, name: str) -> int:
        return dict(self.params)[name]

    def __str__(self) -> str:
        params = ",".join(f"{n}={v}" for n, v in self.params)
        return f"{self.family}.{self.isa}({params})"
