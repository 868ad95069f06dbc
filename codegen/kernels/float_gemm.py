"""`linear` in bf16, and with a sparse weight in fp32 too: y = activation(W x + bias) + residual.

Weights are broadcast, tokens lie in the lanes. A *step* is what one multiply-add takes of the
input: a channel in fp32, two channels in bf16. There is one loop nest with two ways to come by x:

    dense     all channels in turn, a row of the panel to a step
    sparse    the channels that an index list per strip of rows names. In bf16 a step has an even
              channel and an odd one, of any two rows of pairs: one blend puts them together, so
              that blocks of R x 1 cost no more than their values.

Loops, outermost first:

    group of panels     their channels stay in L2 for all rows
    block of rows       its weights stay in L1 or L2 for all panels of the group
    panel, up to `nv` vectors of it, strip of rows, step

A strip is the rows of a register block. Where a panel ends in few vectors, a dense block takes
all its strips at once: there are always enough sums to hide the latency. Sums go through L1 to
the epilogue, a loop over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.numbers import Numbers
from sparsec.codegen.isa.polynomials import ACTIVATIONS
from sparsec.codegen.isa.vector import keep, prefetch, ramp, splat
from sparsec.codegen.kernels.base import TirKernel
from sparsec.codegen.kernels.panels import GROUP, WIDTH, div, groups_in_panel, loop
from sparsec.codegen.program import Kind, Parameter

WORDS_AHEAD = 256  # fetched while others are multiplied: 1 KB, past the end too
CHAINS = 8  # sums in flight that hide the latency of a multiply-add
ACCUMULATORS = {8: 12, 16: 24}  # of 16 and 32 registers; vectors of x and a weight are there too


@dataclass(frozen=True, slots=True)
class FloatEpilogue:
    """`result` is "f32" or "bf16"; a bf16 result has no residual."""

    activation: str = "none"
    has_residual: bool = False
    result: str = "f32"

    @property
    def suffix(self) -> str:
        activation = "" if self.activation == "none" else f"_{self.activation}"
        return f"_{self.result}{activation}" + "_residual" * self.has_residual


@dataclass(frozen=True, slots=True)
class FloatGemm(TirKernel):
    """A block has `strips` strips of `strip` rows; `nv` vectors of tokens to a register block."""

    scratch: ClassVar[str | None] = "float32"
    numbers: Numbers
    is_sparse: bool
    strip: int
    strips: int
    nv: int
    epilogue: FloatEpilogue

    @property
    def name(self) -> str:
        form = "sparse" if self.is_sparse else "dense"
        block = f"{self.strips}x{self.strip}x{self.nv * self.lanes}"
        return f"linear_{self.numbers.name}_{form}_{block}{self.epilogue.suffix}_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """`steps` is the rows of a panel of x: all its channels, or its pairs of them."""
        dtype = self.numbers.dtype
        lists = (Parameter("starts", dtype="int32"), Parameter("indices", dtype="uint16"))
        y = Parameter("y", dtype="float32" if self.epilogue.result == "f32" else "int32")
        return (
            Parameter("x", dtype=dtype),
            Parameter("words", dtype=dtype),
            *((Parameter("tiles", dtype="uint8"),) if self.has_tiles else ()),
            *(lists if self.is_sparse else ()),
            Parameter("bias"),
            *((Parameter("residual"),) if self.epilogue.has_residual else ()),
            y,
            *(Parameter(n, Kind.INT) for n in ("tokens", "m", "steps", "group")),
        )

    @property
    def has_tiles(self) -> bool:
        """Whether it takes the shapes of tile registers, `tiles`."""
        return False

    @property
    def scratch_bytes(self) -> int:
        return self.rows * WIDTH * 4

    @property
    def isa(self) -> str:
        return self.numbers.vector.name

    @property
    def lanes(self) -> int:
        return self.numbers.vector.lanes

    @property
    def rows(self) -> int:
        """Rows of one work item."""
        return self.strip * self.strips

    def _body(self, s: tir.KernelScope) -> None:
        group = s["group"]
        panels = keep(div(s["tokens"] + (WIDTH - 1), WIDTH))
        blocks = keep(div(s["m"] + (self.rows - 1), self.rows))
        with loop(div(s.begin, blocks), div(s.end + blocks - 1, blocks)) as g:
            first = keep(T.max(s.begin - g * blocks, T.int64(0)))
            last = keep(T.min(s.end - g * blocks, blocks))
            with (
                loop(first, last) as block,
                loop(g * group, T.min((g + 1) * group, panels)) as panel,
            ):
                self._panel(s, block, panel)

    def _panel(self, s: tir.KernelScope, block: Any, panel: Any) -> None:
        """One block of rows for all tokens of one panel."""
        step = self.nv * self.lanes
        tokens = keep(groups_in_panel(s["tokens"], panel) * GROUP)
        with loop(0, div(tokens, step)) as i:
            self._columns(s, block, panel, keep(i * step), self.nv)
        tail = keep(div(tokens, step) * step)
        for nv in range(1, self.nv):
            if nv * self.lanes % GROUP == 0:
                with T.If(tokens - tail == nv * self.lanes), T.Then():
                    self._columns(s, block, panel, tail, nv)
        self._forget_constants()
        self._epilogue(s, block, panel, tokens)

    def _columns(self, s: tir.KernelScope, block: Any, panel: Any, column: Any, nv: int) -> None:
        """One block of rows for `nv` vectors of tokens, from lane `column` of the panel on."""
        most = ACCUMULATORS[self.lanes] // (nv * self.strip)
        together = max(n for n in range(1, most + 1) if self.strips % n == 0)
        together = 1 if self.is_sparse else together  # each strip has channels of its own
        x0 = keep(panel * s["steps"] * WIDTH + column)
        with loop(0, self.strips // together) as part:
            strip = keep(block * self.strips + part * together)
            place = keep(part * (together * self.strip * WIDTH) + column)
            if self.is_sparse:
                first = keep(T.cast(s["starts"][strip], "int64"))
                steps = keep(T.cast(s["starts"][strip + 1], "int64") - first)
            else:
                first, steps = keep(strip * s["steps"]), s["steps"]
            block_of = _Strips(strip, together, first, steps, x0, place, nv)
            self._register_block(s, block_of)

    def _register_block(self, s: tir.KernelScope, at: _Strips) -> None:
        """Sums of the rows of some strips, left in scratch memory."""
        self._forget_constants()
        n, rows = self.lanes, at.together * self.strip
        sets = 1 if rows * at.nv >= CHAINS else 2
        sums = [[tir.registers("float32", at.nv * n) for _ in range(rows)] for _ in range(sets)]
        lanes = [ramp(i * n, n) for i in range(at.nv)]
        for index, group in enumerate(sums):
            for r, total in enumerate(group):
                bias = s["bias"][at.strip * self.strip + r] if index == 0 else 0.0
                for lane in lanes:
                    T.buffer_store(total, splat(bias, n), [lane])
        with loop(0, div(at.steps, sets)) as round:
            for index, group in enumerate(sums):
                self._step(s, at, round * sets + index, group)
        if sets > 1:
            with T.If(at.steps % sets != 0), T.Then():
                self._step(s, at, at.steps - 1, sums[0])
        for r in range(rows):
            for i, lane in enumerate(lanes):
                total = sums[0][r][lane]
                for group in sums[1:]:
                    total = total + group[r][lane]
                T.buffer_store(s.scratch, total, [ramp(at.place + (r * WIDTH + i * n), n)])

    def _forget_constants(self) -> None:
        """Those of the epilogue would take the registers of sums."""
        if self.lanes == 16:
            tir.empty_registers()

    def _step(self, s: tir.KernelScope, at: _Strips, step: Any, sums: list[Any]) -> None:
        n, numbers = self.lanes, self.numbers
        xs = self._operands(s, at, keep(step))
        starts = [keep((at.first + i * at.steps + step) * self.strip) for i in range(at.together)]
        for start in starts:
            prefetch(s["words"], start + WORDS_AHEAD)
        for r, total in enumerate(sums):
            word = s["words"][starts[r // self.strip] + r % self.strip]
            weight = keep(T.broadcast(word, n))
            for i, x in enumerate(xs):
                lane = ramp(i * n, n)
                T.buffer_store(total, numbers.dot(total[lane], x, weight), [lane])

    def _operands(self, s: tir.KernelScope, at: _Strips, step: Any) -> list[Any]:
        """The vectors of x of one step."""
        if not self.is_sparse:
            return self._row(s, at, step)
        per_step = self.numbers.indices_per_step
        indices = [
            keep(T.cast(s["indices"][(at.first + step) * per_step + i], "int64"))
            for i in range(per_step)
        ]
        rows = [self._row(s, at, index) for index in indices]
        return [self.numbers.join(parts) for parts in zip(*rows, strict=True)]

    def _row(self, s: tir.KernelScope, at: _Strips, row: Any) -> list[Any]:
        n, start = self.lanes, keep(at.x0 + row * WIDTH)
        return [keep(s["x"][ramp(start + i * n, n)]) for i in range(at.nv)]

    def _epilogue(self, s: tir.KernelScope, block: Any, panel: Any, tokens: Any) -> None:
        n, row0 = self.lanes, keep(block * self.rows)
        rows = keep(T.min(T.int64(self.rows), s["m"] - row0))
        activation = ACTIVATIONS[self.epilogue.activation]

        def value(place: Any) -> Any:
            return keep(activation(self.numbers.vector, keep(s.scratch[ramp(place, n)])))

        store: Callable[[Any, Any], None]
        if self.epilogue.result == "f32":
            start, count, per_row = keep((panel * s["m"] + row0) * WIDTH), rows, WIDTH

            def store(place: Any, where: Any) -> None:
                result = value(place)
                if self.epilogue.has_residual:
                    result = result + s["residual"][ramp(where, n)]
                T.buffer_store(s["y"], result, [ramp(where, n)])
        else:
            start = keep(div(panel * s["m"] + row0, 2) * WIDTH)
            count, per_row = keep(div(rows, 2)), 2 * WIDTH

            def store(place: Any, where: Any) -> None:
                pairs = self.numbers.pairs_of(value(place), value(place + WIDTH))
                T.buffer_store(s["y"], pairs, [ramp(where, n)])

        with loop(0, count) as r, loop(0, div(tokens, n)) as i:
            store(keep(r * per_row + i * n), keep(start + r * WIDTH + i * n))


@dataclass(frozen=True, slots=True)
class _Strips:
    """`together` strips from number `strip` on: their first step, how many each has.

    `x0` is the first element of x, `place` of the sums in scratch memory, `nv` the vectors.
    """

    strip: Any
    together: int
    first: Any
    steps: Any
    x0: Any
    place: Any
    nv: int
