"""`attention` in fp32 over token panels, computed transposed: keys down, queries in the lanes.

One item is one head of one panel of queries. Sequences are packed without gaps, so a panel may
hold parts of several. A run of queries of one sequence is computed at a time:

    scores[key][query] = scale * sum_d k[d][key] q[d][query] + mask
    p = exp(scores - max over keys)
    y[d][query] = sum_key v[d][key] p[key][query] / sum of p

k, v are broadcast scalars; q, p, y are vectors as they lie in the panels: nothing is transposed,
and nothing is added across lanes. A full mask is transposed into the scores first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, by_name, vector_isas
from sparsec.codegen.isa.pack8 import Packer
from sparsec.codegen.isa.polynomials import exp_negative
from sparsec.codegen.isa.vector import keep, ramp, splat
from sparsec.codegen.kernels.attention_args import (
    attention_call,
    attention_parameters,
    longest_sequence,
    mask_kind,
    result_of,
)
from sparsec.codegen.kernels.base import Binder, TirKernel
from sparsec.codegen.kernels.full_mask import transpose_mask
from sparsec.codegen.kernels.panels import (
    GROUP,
    WIDTH,
    const,
    div,
    is_planar,
    loop,
    mod,
)
from sparsec.codegen.kernels.query_blocks import (
    PACKED,
    Sequences,
    over_query_blocks,
    queries_before,
    store_context,
)
from sparsec.codegen.program import Kernel, KernelCall, Parameter
from sparsec.ir.dims import round_up
from sparsec.ir.graph import Node
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

# (groups of 16 queries at once, keys or channels at once) per vector length
REGISTER_BLOCKS = {8: ((1, 6),), 16: ((4, 4), (2, 8))}
MASKS = ("none", "key", "full", PACKED)
RESULTS = ("f32", "u8")
LOWEST = -3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Attention(TirKernel):
    """`mask` is "none", "key" (one value per key), "full" (one per query and key) or "packed":
    sequences of any lengths side by side, with one value per key.

    `result` is "f32" or "u8", quantised.
    """

    scratch: ClassVar[str | None] = "float32"
    vector: VectorIsa
    groups: int
    rows: int
    mask: str
    result: str = "f32"

    @property
    def name(self) -> str:
        to = "" if self.result == "f32" else f"_to_{self.result}"
        return f"attention_f32_{self.rows}x{self.groups * GROUP}_mask_{self.mask}{to}_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return attention_parameters(self.mask, self.result)

    def _body(self, s: tir.KernelScope) -> None:
        def compute(head: Any, first: Any, sequence: Any, groups: int) -> None:
            self._run(s, head, first, sequence, groups)

        sequences = Sequences(s, self.mask == PACKED)
        over_query_blocks(s, sequences, (self.groups,) if self.groups > 1 else (), compute)

    def _run(self, s: tir.KernelScope, head: Any, token: Any, sequence: Any, groups: int) -> None:
        """All that `groups` groups of queries from `token` on need of one sequence."""
        sequences = Sequences(s, self.mask == PACKED)
        block = QueryBlock(self, s, sequences, head, token, sequence, groups)
        block.load_mask()
        block.compute_scores()
        block.exponentiate()
        block.compute_context()


class QueryBlock:
    """Code for one run of queries against the keys [start, stop)."""

    shift: Any = 0  # the row of the scores that the first key has

    def __init__(
        self, kernel: Attention, s: tir.KernelScope, sequences: Sequences, head: Any, token: Any,
        sequence: Any, groups: int,
    ):  # fmt: skip
        self.kernel, self.s, self.v = kernel, s, kernel.vector
        self.head, self.token = head, token
        self.start = keep(sequences.start(sequence))
        self.stop = keep(sequences.stop(sequence))
        self.lanes = kernel.vector.lanes
        self.width = groups * GROUP  # queries
        self.count = self.width // self.lanes  # vectors
        self.packer: Packer | None = None
        # Only a single group may have queries of other sequences among its lanes.
        self.before = queries_before(self.start, token) if groups == 1 else None
        # Keys or channels at a time: as many accumulators for few queries as for many.
        most = kernel.rows * (kernel.groups // groups)
        self.steps = tuple(n for n in (most, 4, 1) if n <= most)
        self.at = [ramp(i * self.lanes, self.lanes) for i in range(self.count)]
        self.highest = tir.registers("float32", self.width)
        self.total = tir.registers("float32", self.width)
        if kernel.mask == PACKED:
            self.mask0 = self.start
        elif kernel.mask != "none":
            self.mask0 = keep(sequence * s["batch_step"] + head * s["head_step"])

    def load_mask(self) -> None:
        """The mask of these queries, keys down, into the scores."""
        if self.kernel.mask != "full":
            return

        def store(key: Any, query: Any, value: Any, lanes: int) -> None:
            at = (key + self.shift) * self.width + query
            T.buffer_store(self.s.scratch, value, [ramp(at, lanes) if lanes > 1 else at])

        query = self.token - self.start
        transpose_mask(self.s, self.mask0, query, self.width, self.lanes, store)

    def compute_scores(self) -> None:
        """scores, and the highest of each query."""
        for at in self.at:
            T.buffer_store(self.highest, splat(float("-inf"), self.lanes), [at])
        self._for_keys(self._score_keys, self.steps)

    def _for_keys(self, body: Callable[[Any, Any, int], None], steps: tuple[int, ...]) -> None:
        """`body(panel, lane, count)` over all keys: each panel's in `steps`."""
        with loop(div(self.start, WIDTH), div(self.stop - 1, WIDTH) + 1) as panel:
            first = keep(T.max(self.start - panel * WIDTH, const(0)))
            last = keep(T.min(self.stop - panel * WIDTH, const(WIDTH)))
            in_steps(first, last, steps, lambda lane, count: body(panel, lane, count))

    def _score_keys(self, panel: Any, lane: Any, rows: int) -> None:
        s, n = self.s, self.lanes
        acc = self._zeros(rows)
        query_panel = div(self.token, WIDTH)
        q0 = keep(self._row("q", query_panel) + mod(self.token, WIDTH))
        k0 = keep(self._row("k", panel) + lane)
        with loop(0, s["head_size"]) as d:
            qs = [keep(s["q"][ramp(q0 + d * WIDTH + i * n, n)]) for i in range(self.count)]
            for r in range(rows):
                key = keep(splat(s["k"][k0 + d * WIDTH + r], n))
                for q, at in zip(qs, self.at, strict=True):
                    T.buffer_store(acc[r], acc[r][at] + key * q, [at])
        key0 = keep(panel * WIDTH + lane - self.start)
        for r in range(rows):
            for i, at in enumerate(self.at):
                where = ramp((key0 + r) * self.width + i * n, n)
                score = keep(self._masked(acc[r][at] * splat(s["scale"], n), key0 + r, where))
                T.buffer_store(s.scratch, score, [where])
                T.buffer_store(self.highest, higher(self.highest[at], score), [at])

    def _row(self, operand: str, panel: Any) -> Any:
        """Where this head's first channel of a panel of q, k or v starts."""
        channels, offset = self.s[f"{operand}_channels"], self.s[f"{operand}_offset"]
        return (panel * channels + offset + self.head * self.s["head_size"]) * WIDTH

    def _masked(self, score: Any, key: Any, where: Any) -> Any:
        match self.kernel.mask:
            case "key" | "packed":
                return score + splat(self.s["mask"][self.mask0 + key], self.lanes)
            case "full":
                return score + self.s.scratch[where]
        return score

    def exponentiate(self) -> None:
        """scores become exp(score - highest); their sums.

        Where all scores are -inf the difference is taken to the lowest number: never NaN.
        """
        n = self.lanes
        highest = [keep(higher(splat(LOWEST, n), self.highest[at])) for at in self.at]
        for at in self.at:
            T.buffer_store(self.total, splat(0.0, n), [at])
        with loop(0, self.stop - self.start) as key:
            for i, at in enumerate(self.at):
                where = ramp(key * self.width + i * n, n)
                p = exp_negative(self.v, keep(self.s.scratch[where] - highest[i]))
                T.buffer_store(self.s.scratch, p, [where])
                T.buffer_store(self.total, self.total[at] + p, [at])

    def compute_context(self) -> None:
        """y; 0 where all scores are -inf."""
        for at in self.at:
            inverse = keep(splat(1.0, self.lanes) / self.total[at])
            dead = self.highest[at] < splat(LOWEST, self.lanes)
            T.buffer_store(self.total, T.Select(dead, splat(0.0, self.lanes), inverse), [at])
        if self.kernel.result == "u8":
            zero_point = self.s["zero_point"]
            self.packer = Packer.of(self.v, "uint8", self.s["inverse"], zero_point)
        self._sum_channels()

    def _sum_channels(self) -> None:
        size = self.s["head_size"]
        in_steps(const(0), size, self._channel_steps, self._context_channels)

    @property
    def _channel_steps(self) -> tuple[int, ...]:
        return self.steps

    def _context_channels(self, channel: Any, rows: int) -> None:
        s, n = self.s, self.lanes
        acc = self._zeros(rows)

        def add_keys(panel: Any, lane: Any, count: int) -> None:
            at_key = keep((panel * WIDTH + lane - self.start) * self.width)
            v0 = keep(self._row("v", panel) + channel * WIDTH + lane)
            ps = [keep(s.scratch[ramp(at_key + i * n, n)]) for i in range(self.count)]
            for r in range(rows):
                value = keep(splat(s["v"][v0 + r * WIDTH], n))
                for p, at in zip(ps, self.at, strict=True):
                    T.buffer_store(acc[r], acc[r][at] + value * p, [at])

        self._for_keys(add_keys, (1,))
        panel = div(self.token, WIDTH)
        y0 = (panel * s["heads"] + self.head) * s["head_size"] + channel
        for r in range(rows):
            results = [keep(acc[r][at] * self.total[at]) for at in self.at]
            row = (y0 + r) * WIDTH + mod(self.token, WIDTH)
            store_context(s["y"], row, results, self.lanes, packer=self.packer, before=self.before)

    def _zeros(self, rows: int) -> list[Any]:
        acc = [tir.registers("float32", self.width) for _ in range(rows)]
        for row in acc:
            for at in self.at:
                T.buffer_store(row, splat(0.0, self.lanes), [at])
        return acc


def in_steps(
    first: Any, last: Any, steps: tuple[int, ...], body: Callable[[Any, int], None]
) -> None:
    """`body(index, count)` over [first, last): `steps[0]` at a time, the rest by smaller steps."""
    for step in dict.fromkeys(steps):
        whole = keep(div(last - first, step))
        with loop(0, whole) as run:
            body(keep(first + run * step), step)
        first = keep(first + whole * step)


def higher(a: Any, b: Any) -> Any:
    return T.Select(b > a, b, a)


class AttentionFamily:
    """`attention` in fp32."""

    ops = ("attention",)

    def workload(self, node: Node) -> Workload:
        q = node.input(0).type
        sizes = tuple((n, int(node.attrs[n])) for n in ("heads", "head_size"))
        kind = mask_kind(node)
        to = "" if node.attrs.get("out_scale") is None else " to u8"
        return Workload("attention", sizes, str(q.dtype), epilogue=f"mask {kind}{to}")

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        kind = workload.epilogue.split()[1]
        fits = workload.dtype == str(DType.F32) and kind in MASKS
        if not fits:
            return []
        return [
            Schedule("attention", v.name, (("groups", groups), ("rows", rows)))
            for v in vector_isas(target)
            for groups, rows in REGISTER_BLOCKS[v.lanes]
        ]

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        assert all(is_planar(v.type) for v in map(node.input, range(3))), node
        kernel = Attention(
            by_name(schedule.isa),
            schedule.param("groups"),
            schedule.param("rows"),
            mask_kind(node),
            result_of(node),
        )
        scratch_bytes = round_up(longest_sequence(node), GROUP) * (WIDTH * 4)
        own = {"scale": float(node.attrs["scale"])}
        return [attention_call(node, kernel, binder, scratch_bytes, own)]

    def variants(self) -> list[Kernel]:
        return [
            Attention(v, groups, rows, mask, result)
            for v in VECTOR_ISAS
            for groups, rows in REGISTER_BLOCKS[v.lanes]
            for mask in MASKS
            for result in RESULTS
        ]
