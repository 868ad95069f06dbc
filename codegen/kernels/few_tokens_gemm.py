"""`linear` in fp32 for at most 8 tokens: channels in the lanes.

Tokens in the lanes would leave most lanes empty. Weights are those of dense_gemm.py: strips of 6
rows in runs of 8 channels, so that a vector is a run of one or two rows. It is multiplied by the
same run of channels of each token, in every half. At the end the 8 sums of a row and token are
added up by a tree of shuffles. Every weight is read once for up to 8 tokens (AVX2: 4), so one
token runs at the rate of memory.

A call first copies the activations, one token panel, to scratch memory as `[k / 8][tokens][8]`.
Sums, bias and results pass through the start of the scratch memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VectorIsa
from sparsec.codegen.isa.polynomials import ACTIVATIONS
from sparsec.codegen.isa.vector import alone, keep, prefetch, ramp, shuffle, splat, transpose
from sparsec.codegen.kernels.base import TirKernel
from sparsec.codegen.kernels.panels import GROUP, WIDTH, const, div, loop, mod
from sparsec.codegen.program import Kind, Parameter

MOST_TOKENS = 8
RUN = 8  # channels of a row that lie side by side
STRIP = 6  # rows
VECTORS = 6  # of a run of channels of the rows of one item
# Of 16 and 32 registers; operands, fewer than the rest, are there too.
ACCUMULATORS = {8: 12, 16: 24}
LINE = 16  # floats of a line of the caches
# Weights come from L3 or memory; the CPU's own prefetcher starts anew every 4 KB and strip.
WORDS_AHEAD = 8192
# Scratch memory in floats: the bias of an item, its results, the sums of a register block, x.
RESULTS0, SUMS0, X0 = 32, 96, 96 + 24 * 16


@dataclass(frozen=True, slots=True)
class FewTokensGemm(TirKernel):
    """One instruction set with one epilogue. One item is a block of `rows` output channels."""

    scratch: ClassVar[str | None] = "float32"
    vector: VectorIsa
    activation: str
    has_residual: bool

    @property
    def name(self) -> str:
        end = ("" if self.activation == "none" else f"_{self.activation}") + (
            "_residual" if self.has_residual else ""
        )
        return f"few_tokens_gemm_f32{end}_{self.isa}"

    @property
    def halves(self) -> int:
        """Runs of channels in a vector, of as many rows."""
        return self.vector.lanes // RUN

    @property
    def rows(self) -> int:
        return VECTORS * self.halves

    @property
    def strips(self) -> int:
        return self.rows // STRIP

    @staticmethod
    def scratch_bytes(k: int) -> int:
        return 4 * (X0 + -(-k // RUN) * (RUN * MOST_TOKENS))

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        pointers = ["x", "w", "bias", *(["residual"] if self.has_residual else []), "y"]
        return (
            *(Parameter(n) for n in pointers),
            *(Parameter(n, Kind.INT) for n in ("tokens", "m", "k", "kc")),
        )

    def _body(self, s: tir.KernelScope) -> None:
        """The tokens of a call are `slots` of x: a power of 2 that they fit in."""
        slots = keep(T.Select(s["tokens"] > 2, const(4), s["tokens"]))
        slots = keep(T.Select(s["tokens"] > 4, const(8), slots))
        self._copy_x(s, slots)
        blocks = keep(div(s["m"] + (self.rows - 1), self.rows))
        most = ACCUMULATORS[self.vector.lanes] // (VECTORS // 2)  # tokens of a pass
        with loop(s.begin, s.end) as block:
            row0 = keep(block * self.rows)
            for start in range(0, self.rows, 2):
                T.buffer_store(s.scratch, s["bias"][ramp(row0 + start, 2)], [ramp(start, 2)])
            with loop(0, div(s["tokens"] + (most - 1), most)) as p:
                at = _Place(block, blocks, slots, keep(p * most))
                count = keep(T.min(const(most), s["tokens"] - at.first))
                for size in (1, 2, 4, 8):
                    with T.If(T.And(count > size // 2, count <= size)), T.Then():
                        if size <= most:
                            self._pass(s, at, count, size)

    def _copy_x(self, s: tir.KernelScope, slots: Any) -> None:
        x, whole = s["x"], keep(div(s["k"], RUN))
        for size in (1, 2, 4, 8):
            with T.If(slots == size), T.Then(), loop(0, whole) as run:
                start = keep(run * (RUN * WIDTH))
                rows = transpose([keep(x[ramp(start + c * WIDTH, RUN)]) for c in range(RUN)])
                for t, row in enumerate(rows[:size]):
                    T.buffer_store(s.scratch, row, [ramp((run * size + t) * RUN + X0, RUN)])
        with T.If(whole * RUN < s["k"]), T.Then(), loop(0, slots) as t:
            start = keep((whole * slots + t) * RUN + X0)
            T.buffer_store(s.scratch, splat(0.0, RUN), [ramp(start, RUN)])
            with loop(whole * RUN, s["k"]) as c:
                value = x[alone(c * WIDTH + t)]
                T.buffer_store(s.scratch, value, [start + (c - whole * RUN)])

    def _pass(self, s: tir.KernelScope, at: _Place, count: Any, slots: int) -> None:
        """An item for `count` tokens, of which `slots` is the power of 2."""
        is_whole = VECTORS * slots <= ACCUMULATORS[self.vector.lanes]
        vectors = VECTORS if is_whole else VECTORS // 2
        with loop(0, VECTORS // vectors) as part:
            vector = keep(part * vectors)
            for tokens in range(slots // 2 + 1, slots + 1):
                with T.If(count == tokens), T.Then():
                    self._sum(s, at, vector, (vectors, tokens, slots))
            self._finish(s, at, vector, (vectors, slots))

    def _sum(
        self, s: tir.KernelScope, at: _Place, vector: Any, size: tuple[int, int, int]
    ) -> None:
        """Products of the weights from `vector` on and some tokens; 8 sums each to scratch."""
        n, (vectors, tokens, slots) = self.vector.lanes, size
        sums = [[tir.registers("float32", n) for _ in range(tokens)] for _ in range(vectors)]
        for total in (total for totals in sums for total in totals):
            T.buffer_store(total, splat(0.0, n), [ramp(0, n)])
        strip = STRIP * RUN // n  # vectors
        with loop(0, div(s["k"] + s["kc"] - 1, s["kc"])) as kb:
            k0 = keep(kb * s["kc"])
            depth = keep(whole_runs(T.min(s["kc"], s["k"] - k0)))
            start = keep((k0 * at.blocks + at.block * depth) * self.rows)
            starts = [
                keep(start + div(v, strip) * (depth * STRIP) + mod(v, strip) * n)
                for v in (vector + i for i in range(0, vectors, min(strip, vectors)))
            ]
            x0 = keep(k0 * at.slots + (at.first * RUN + X0))
            with loop(0, div(depth, RUN)) as run:
                weights = [
                    starts[v // strip] + (run * (STRIP * RUN) + v % strip * n)
                    for v in range(vectors)
                ]
                self._multiply(s, sums, weights, keep(x0 + run * (at.slots * RUN)))
        for v, totals in enumerate(sums):
            for t in range(slots):  # past the last token another number, which y may have
                where = ramp((v * slots + t) * n + SUMS0, n)
                T.buffer_store(s.scratch, totals[min(t, tokens - 1)][ramp(0, n)], [where])

    def _multiply(self, s: tir.KernelScope, sums: list[Any], weights: list[Any], x0: Any) -> None:
        """One run of channels. The fewer operands, of weights and tokens, rest in registers."""
        n, count = self.vector.lanes, len(sums[0])
        for v in range(0, len(sums), LINE // n):
            prefetch(s["w"], weights[v] + WORDS_AHEAD, level=2)

        def token(t: int) -> Any:
            run = keep(s.scratch[ramp(x0 + t * RUN, RUN)])
            return run if n == RUN else keep(shuffle(run, run, [i % RUN for i in range(n)]))

        def weight(v: int) -> Any:
            return keep(s["w"][ramp(weights[v], n)])

        def add(v: int, t: int, w: Any, x: Any) -> None:
            T.buffer_store(sums[v][t], sums[v][t][ramp(0, n)] + w * x, [ramp(0, n)])

        if count <= len(sums):
            xs = [token(t) for t in range(count)]
            for v in range(len(sums)):
                w = weight(v)
                for t in range(count):
                    add(v, t, w, xs[t])
            return
        ws = [weight(v) for v in range(len(sums))]
        for t in range(count):
            x = token(t)
            for v in range(len(sums)):
                add(v, t, ws[v], x)

    def _finish(self, s: tir.KernelScope, at: _Place, vector: Any, size: tuple[int, int]) -> None:
        """Adds up the sums of a register block, 8 vectors at once; then its rows of y."""
        n, scratch, (vectors, slots) = self.vector.lanes, s.scratch, size
        rows = RUN // slots * self.halves  # in one tree
        first = keep(vector * self.halves)
        with loop(0, -(-vectors * slots // RUN)) as tree:
            start = keep(tree * (RUN * n) + SUMS0)
            sums = add_up([keep(scratch[ramp(start + i * n, n)]) for i in range(RUN)], n)
            bias = keep(scratch[ramp(first + tree * rows, n)])
            lanes = [i % RUN // slots * self.halves + i // RUN for i in range(n)]
            total = keep(sums + shuffle(bias, bias, lanes))
            value = ACTIVATIONS[self.activation](self.vector, total)
            T.buffer_store(scratch, value, [ramp(tree * n + RESULTS0, n)])
        row0 = keep(at.block * self.rows + first)
        with loop(0, T.min(const(vectors * self.halves), s["m"] - row0)) as row:
            slot = keep(div(row, self.halves) * slots)
            half = keep(div(slot, RUN) * self.halves + mod(row, self.halves))
            result = keep(half * RUN + mod(slot, RUN) + RESULTS0)
            self._row(s, at, (result, keep((row0 + row) * WIDTH)), slots)

    def _row(self, s: tir.KernelScope, at: _Place, places: tuple[Any, Any], slots: int) -> None:
        """One row of results, of which the second place is in y."""
        n, (result, start) = self.vector.lanes, places
        with T.If(at.first == 0), T.Then():
            # Others read whole groups of lanes: what is past the last token is a number too.
            for lane in range(0, GROUP, n):
                T.buffer_store(s["y"], splat(0.0, n), [ramp(start + lane, n)])
        column = keep(alone(start + at.first))

        def tokens(first: Any) -> Any:
            return first if slots == 1 else ramp(first, slots)

        value = s.scratch[tokens(result)]
        if self.has_residual:
            value = value + s["residual"][tokens(column)]
        T.buffer_store(s["y"], value, [tokens(column)])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the loops the code is: one of `blocks` items, a pass of tokens from `first` on."""

    block: Any
    blocks: Any
    slots: Any  # of x
    first: Any


def whole_runs(channels: Any) -> Any:
    """Channels, rounded up to whole runs."""
    return div(channels + (RUN - 1), RUN) * RUN


def add_up(vectors: list[Any], lanes: int) -> Any:
    """The sums of the runs of 8 lanes of 8 vectors: lane 8 h + i is that of run h of vector i."""
    # Within 128 bits: neighbours of the first vector, then of the second; one shuffle a part.
    neighbours = [
        [q + at + part for q in range(0, lanes, 4) for at in (0, 2, lanes, lanes + 2)]
        for part in (0, 1)
    ]
    quarters = [
        [i - i % RUN + i % 4 + 4 * part + lanes * (i % RUN // 4) for i in range(lanes)]
        for part in (0, 1)
    ]
    for low, high in (neighbours, neighbours, quarters):
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [keep(shuffle(a, b, low) + shuffle(a, b, high)) for a, b in pairs]
    return vectors[0]
