"""What a kernel call computes and how: plain data for passes, code generation and tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

# Up to each of these numbers of tokens, and above the last, a node may have another schedule.
BUCKET_LIMITS = (4, 8, 16, 32, 64, 128, 384)


@dataclass(frozen=True, slots=True)
class Bucket:
    """The numbers of tokens above `above` and up to `most`; None: all above."""

    above: int = 0
    most: int | None = None

    def __contains__(self, tokens: int) -> bool:
        return self.above < tokens and (self.most is None or tokens <= self.most)

    def __str__(self) -> str:
        if self.most is None:
            return f"over {self.above} tokens" if self.above else ""
        return f"{self.above + 1} to {self.most} tokens"


EVERY = Bucket()


def buckets() -> Iterator[Bucket]:
    """All buckets, fewest tokens first: together they hold every number once."""
    edges = (0, *BUCKET_LIMITS, None)
    for above, most in pairwise(edges):
        assert above is not None
        yield Bucket(above, most)


def bucket_of(tokens: int) -> Bucket:
    """The one that holds a number of tokens, at least 1."""
    return next(bucket for bucket in buckets() if tokens in bucket)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is computed: an op, its static sizes, its types and its epilogue.

    `sizes` are the sizes that are known at compile time, by the names the kernel family uses
    (`m` output channels, `k` input channels, `head_size`). `density` is the share of non-zero
    blocks of a sparse weight, 1.0 when dense. `bucket` says for how many tokens.
    """

    op: str
    sizes: tuple[tuple[str, int], ...]
    dtype: str
    layout: str = "dense"
    epilogue: str = ""
    density: float = 1.0
    bucket: Bucket = EVERY

    def size(self, name: str) -> int:
        return dict(self.sizes)[name]

    def __str__(self) -> str:
        sizes = " ".join(f"{n}{v}" for n, v in self.sizes)
        parts = [self.op, self.dtype, sizes, self.layout, self.epilogue, str(self.bucket)]
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


@dataclass(frozen=True, slots=True)
class Choice:
    """The schedule of a node for the token counts of a bucket."""

    schedule: Schedule
    bucket: Bucket = EVERY

    def __str__(self) -> str:
        return f"{self.schedule} {self.bucket}".rstrip()
