"""`linear` in fp32 for at most 8 tokens: output channels in the lanes, tokens broadcast.

Tokens in the lanes would leave most lanes empty. Here a register block is `ROWS` vectors of output
channels by all tokens; every weight is read once, so one token runs at the rate of memory. Weights
are those of dense_gemm.py, `[ceil(k / kc)][ceil(m / rows)][kc][rows]`. The activations are those
of one token panel: sums go through the stack into its columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VectorIsa
from sparsec.codegen.isa.polynomials import ACTIVATIONS
from sparsec.codegen.isa.vector import keep, ramp, splat
from sparsec.codegen.kernels.panels import GROUP, WIDTH, const, div, loop
from sparsec.codegen.program import Kind, Parameter

MOST_TOKENS = 8
ROWS = 3  # vectors
# Up to so many tokens: the tokens of each pass over the weights, as many as registers allow.
PASSES: dict[int, dict[int, tuple[int, ...]]] = {
    8: {1: (1,), 2: (2,), 4: (4,), MOST_TOKENS: (4, 4)},
    16: {1: (1,), 2: (2,), 4: (4,), 6: (6,), MOST_TOKENS: (8,)},
}


@dataclass(frozen=True, slots=True)
class FewTokensGemm:
    """One instruction set with one epilogue. One item is a block of `rows` output channels."""

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
    def rows(self) -> int:
        return ROWS * self.vector.lanes

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        pointers = ["x", "w", "bias", *(["residual"] if self.has_residual else []), "y"]
        return (
            *(Parameter(n) for n in pointers),
            *(Parameter(n, Kind.INT) for n in ("tokens", "m", "k", "kc")),
        )

    @property
    def has_scratch(self) -> bool:
        return False

    @property
    def isa(self) -> str:
        return self.vector.name

    def build(self) -> Any:
        return tir.kernel_function(self.name, self.parameters, self._body)

    def _body(self, s: tir.KernelScope) -> None:
        fewer = 0
        for most, passes in PASSES[self.vector.lanes].items():
            is_case = T.And(s["tokens"] > fewer, s["tokens"] <= most)
            with T.If(is_case), T.Then(), loop(s.begin, s.end) as block:
                first = 0
                for count in passes:
                    self._register_block(s, block, first, count)
                    first += count
            fewer = most

    def _register_block(self, s: tir.KernelScope, block: Any, first: int, count: int) -> None:
        """`count` tokens from `first` on."""
        n, row0 = self.vector.lanes, keep(block * self.rows)
        lanes = [ramp(i * n, n) for i in range(ROWS)]
        sums = [tir.registers("float32", ROWS * n) for _ in range(count)]
        for i, at in enumerate(lanes):
            bias = keep(s["bias"][ramp(row0 + i * n, n)])
            for total in sums:
                T.buffer_store(total, bias, [at])
        blocks = keep(div(s["m"] + (self.rows - 1), self.rows))
        with loop(0, div(s["k"] + s["kc"] - 1, s["kc"])) as kb:
            k0 = keep(kb * s["kc"])
            depth = keep(T.min(s["kc"], s["k"] - k0))
            weights = keep((k0 * blocks + block * depth) * self.rows)
            with loop(0, depth) as c:
                self._multiply(s, sums, keep(weights + c * self.rows), (k0 + c) * WIDTH + first)
        self._finish(s, sums, row0, first)

    def _multiply(self, s: tir.KernelScope, sums: list[Any], start: Any, x0: Any) -> None:
        """One channel: its weights from `start` on, of all tokens from `x0` on."""
        n = self.vector.lanes
        lanes = [ramp(i * n, n) for i in range(ROWS)]
        w = [keep(s["w"][ramp(start + i * n, n)]) for i in range(ROWS)]
        for t, total in enumerate(sums):
            x = keep(splat(s["x"][x0 + t], n))
            for at, weight in zip(lanes, w, strict=True):
                T.buffer_store(total, total[at] + weight * x, [at])

    def _finish(self, s: tir.KernelScope, sums: list[Any], row0: Any, first: int) -> None:
        n, count = self.vector.lanes, len(sums)
        activation = ACTIVATIONS[self.activation]
        for i, at in enumerate(ramp(i * n, n) for i in range(ROWS)):
            part = tir.registers("float32", count * n)
            for t, total in enumerate(sums):
                T.buffer_store(part, activation(self.vector, total[at]), [ramp(t * n, n)])
            self._columns(s, part, (keep(row0 + i * n), first, count))

    def _columns(self, s: tir.KernelScope, part: Any, place: tuple[Any, int, int]) -> None:
        """`part` [token][row] into the panel, whose rows are channels."""
        row0, first, count = place
        n = self.vector.lanes
        with loop(0, T.min(const(n), s["m"] - row0)) as row:
            start = keep((row0 + row) * WIDTH)
            if first == 0:
                # Others read whole groups of lanes: what is past the last token is a number too.
                for lane in range(0, GROUP, n):
                    T.buffer_store(s["y"], splat(0.0, n), [ramp(start + lane, n)])
            for t in range(count):
                where = keep(start + (first + t))
                value = part[row + t * n]
                if self.has_residual:
                    value = value + s["residual"][where]
                T.buffer_store(s["y"], value, [where])
