"""`linear` in fp32: y = activation(W x + bias) + residual over token panels.

Weights are packed `[ceil(k / kc)][ceil(m / mr)][kc / 8][mr][8]`, strips of mr rows in runs of 8
channels, and broadcast; few_tokens_gemm.py reads the same as vectors. Tokens lie in the lanes. A
register block is a strip by up to `nv` vectors of tokens. Few vectors, at the end of a panel, take
several strips at once: there are always enough accumulators to hide the latency. Loops, outermost
first:

    group of panels     x[group][kc] stays in L2 for all rows
    block of kc channels
    block of strips     its weights stay in L1 or L2 for all panels of the group
    panel, register block, channel

Weights are read from memory in order, once per group. Between blocks of kc channels the sums rest
in y.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import VECTOR_ISAS, VectorIsa, by_name, vector_isas
from sparsec.codegen.isa.polynomials import ACTIVATIONS
from sparsec.codegen.isa.vector import keep, ramp, splat
from sparsec.codegen.kernels.base import Binder, TirKernel
from sparsec.codegen.kernels.few_tokens_gemm import (
    ACCUMULATORS,
    MOST_TOKENS,
    RUN,
    STRIP,
    FewTokensGemm,
    whole_runs,
)
from sparsec.codegen.kernels.panels import (
    GROUP,
    LEAST_MACS,
    WIDTH,
    div,
    grain_of,
    groups_in_panel,
    is_planar,
    item_rectangles,
    loop,
    mod,
)
from sparsec.codegen.program import Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import Dim, ceildiv
from sparsec.ir.graph import Node
from sparsec.ir.op_spec import Array
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

# (mr, strips, nv) per vector length, the heuristic's choice first.
REGISTER_BLOCKS = {8: ((6, 1, 2),), 16: ((6, 2, 4), (8, 1, 3))}
DENSE, FEW_TOKENS = "dense_gemm", "few_tokens_gemm"
PARAMS = ("mr", "strips", "nv", "kc", "group")


@dataclass(frozen=True, slots=True)
class DenseGemm(TirKernel):
    """One register block with one epilogue."""

    vector: VectorIsa
    mr: int
    strips: int
    nv: int
    activation: str
    has_residual: bool

    @property
    def name(self) -> str:
        end = ("" if self.activation == "none" else f"_{self.activation}") + (
            "_residual" if self.has_residual else ""
        )
        block = f"{self.strips}x{self.mr}x{self.nv * self.vector.lanes}"
        return f"dense_gemm_f32_{block}{end}_{self.isa}"

    @property
    def rows(self) -> int:
        """Rows of one work item."""
        return self.mr * self.strips

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        pointers = ["x", "w", "bias", *(["residual"] if self.has_residual else []), "y"]
        sizes = ["tokens", "m", "k", "kc", "group"]
        return (*(Parameter(n) for n in pointers), *(Parameter(n, Kind.INT) for n in sizes))

    def _body(self, s: tir.KernelScope) -> None:
        k, kc, group = s["k"], s["kc"], s["group"]
        blocks = keep(div(s["m"] + (self.rows - 1), self.rows))
        with (
            item_rectangles(s, blocks, group) as (first, last, origin, end),
            loop(0, div(k + kc - 1, kc)) as kb,
        ):
            k0 = keep(kb * kc)
            depth = keep(T.min(kc, k - k0))
            whole = keep(whole_runs(depth))
            with loop(first, last) as block, loop(origin, end) as panel:
                weights = keep((k0 * blocks + block * whole) * self.rows)
                self._panel(s, _Place(block, panel, k0, depth, whole, weights))

    def _panel(self, s: tir.KernelScope, at: _Place) -> None:
        """One block of rows for all tokens of one panel."""
        step = self.nv * self.vector.lanes
        lanes = keep(groups_in_panel(s["tokens"], at.panel) * GROUP)
        with loop(0, div(lanes, step)) as i:
            self._columns(s, at, keep(i * step), self.nv)
        tail = keep(div(lanes, step) * step)
        for nv in range(1, self.nv):
            if nv * self.vector.lanes % GROUP == 0:
                with T.If(lanes - tail == nv * self.vector.lanes), T.Then():
                    self._columns(s, at, tail, nv)
        if self.activation != "none" or self.has_residual:
            with T.If(at.k0 + at.depth == s["k"]), T.Then():
                self._epilogue(s, at, lanes)

    def _columns(self, s: tir.KernelScope, at: _Place, column: Any, nv: int) -> None:
        """One block of rows for `nv` vectors of tokens, in as few register blocks as can be."""
        most = ACCUMULATORS[self.vector.lanes] // (nv * self.mr)
        strips = max(n for n in range(1, most + 1) if self.strips % n == 0)
        with loop(0, self.strips // strips) as part:
            first = keep(part * (strips * self.mr))
            row0 = keep(at.block * self.rows + first)
            with T.If(row0 < s["m"]), T.Then():
                weights = keep(at.weights + first * at.whole)
                self._register_block(s, at, (strips * self.mr, nv), (row0, column, weights))

    def _register_block(
        self, s: tir.KernelScope, at: _Place, size: tuple[int, int], start: tuple[Any, Any, Any]
    ) -> None:
        """`size` is rows by vectors; `start` is the first row, lane and weight."""
        (rows, nv), (row0, column, weights), n, y = size, start, self.vector.lanes, s["y"]
        sums = [tir.registers("float32", nv * n) for _ in range(rows)]
        lanes = [ramp(i * n, n) for i in range(nv)]
        # Rows past m do not exist in y: they load the last row and are not stored.
        starts = [
            keep((at.panel * s["m"] + T.min(row0 + r, s["m"] - 1)) * WIDTH + column)
            for r in range(rows)
        ]
        tiles = [(r, i) for r in range(rows) for i in range(nv)]
        with T.If(at.k0 == 0):
            with T.Then():
                for r, i in tiles:
                    T.buffer_store(sums[r], splat(s["bias"][row0 + r], n), [lanes[i]])
            with T.Else():
                for r, i in tiles:
                    T.buffer_store(sums[r], y[ramp(starts[r] + i * n, n)], [lanes[i]])
        x0 = keep((at.panel * s["k"] + at.k0) * WIDTH + column)
        strips = [keep(weights + i * at.whole) for i in range(0, rows, self.mr)]
        with loop(0, at.depth) as c:
            of_run = keep(mod(c, RUN))
            first = keep((c - of_run) * self.mr + of_run)
            xs = [keep(s["x"][ramp(x0 + c * WIDTH + i * n, n)]) for i in range(nv)]
            for r in range(rows):
                place = strips[r // self.mr] + first + r % self.mr * RUN
                weight = keep(splat(s["w"][place], n))
                for i in range(nv):
                    T.buffer_store(sums[r], sums[r][lanes[i]] + weight * xs[i], [lanes[i]])
        for r in range(rows):
            with T.If(row0 + r < s["m"]), T.Then():
                for i in range(nv):
                    T.buffer_store(y, sums[r][lanes[i]], [ramp(starts[r] + i * n, n)])

    def _epilogue(self, s: tir.KernelScope, at: _Place, lanes: Any) -> None:
        """In a loop of its own over the finished rows, still in L1: the code stays small."""
        n, y = self.vector.lanes, s["y"]
        row0 = keep(at.block * self.rows)
        with loop(row0, T.min(row0 + self.rows, s["m"])) as row:
            start = keep((at.panel * s["m"] + row) * WIDTH)
            with loop(0, div(lanes, n)) as i:
                where = ramp(start + i * n, n)
                value = ACTIVATIONS[self.activation](self.vector, keep(y[where]))
                if self.has_residual:
                    value = value + s["residual"][where]
                T.buffer_store(y, value, [where])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the loops the code is: a block of rows, a panel, `depth` channels from `k0` on."""

    block: Any
    panel: Any
    k0: Any
    depth: Any
    whole: Any  # depth in whole runs of channels
    weights: Any  # index of the first weight


def pack_weight(weight: Array, mr: int, strips: int, kc: int) -> Array:
    """`[m, k]` as `[ceil(k / kc)][ceil(m / (strips * mr)) * strips][kc / 8][mr][8]`.

    `kc` is a multiple of 8. Rows past m and channels past k are zero.
    """
    assert kc % RUN == 0, kc
    m, k = weight.shape
    block = mr * strips
    padded = np.zeros((-(-m // block) * block, -(-k // RUN) * RUN), np.float32)
    padded[:m, :k] = weight
    runs = padded.reshape(len(padded) // mr, mr, -1, RUN).transpose(0, 2, 1, 3)
    step = kc // RUN
    return np.concatenate([runs[:, i : i + step].ravel() for i in range(0, runs.shape[1], step)])


def pack_bias(bias: Array | None, m: int, block: int) -> Array:
    """The bias, or zeros, for whole blocks of `block` rows."""
    packed = np.zeros(-(-m // block) * block, np.float32)
    if bias is not None:
        packed[:m] = bias
    return packed


class DenseGemmFamily:
    """`linear` with an fp32 weight."""

    ops = ("linear",)

    def workload(self, node: Node) -> Workload:
        m, k = node.input(1).type.shape
        assert isinstance(m, int), node
        assert isinstance(k, int), node
        residual = node.optional_input(3) is not None
        epilogue = str(node.attrs["activation"]) + (" residual" if residual else "")
        return Workload("linear", (("m", m), ("k", k)), str(node.input(0).type.dtype), "dense",
                        epilogue)  # fmt: skip

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        if workload.dtype != str(DType.F32):
            return []
        most = workload.bucket.most
        few = most is not None and most <= MOST_TOKENS
        found = []
        for v in vector_isas(target):
            params = self._params(v, workload.size("k"), target)
            found += [Schedule(FEW_TOKENS, v.name, (("kc", params[0][3]),))] if few else []
            found += [Schedule(DENSE, v.name, tuple(zip(PARAMS, p, strict=True))) for p in params]
        return found

    def _params(self, v: VectorIsa, k: int, target: Target) -> list[tuple[int, ...]]:
        """PARAMS: x[group][kc] takes at most half of L2, but one panel at least."""
        found = []
        for block in REGISTER_BLOCKS[v.lanes]:
            for limit in (1024, 512, 2048):
                # Equal blocks of at most `limit` channels, in whole runs.
                kc = -(-k // (-(-k // limit) * RUN)) * RUN
                group = max(1, target.l2_bytes // 2 // (kc * WIDTH * 4))
                found.append((*block, kc, group))
        return list(dict.fromkeys(found))

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        x, weight, y = node.input(0), node.input(1), node.output
        bias, residual = node.optional_input(2), node.optional_input(3)
        assert all(is_planar(v.type) for v in (x, y)), node
        assert weight.data is not None, node
        (m, k), tokens = weight.data.shape, x.type.tokens
        scratch_bytes = 0
        v, epilogue = by_name(schedule.isa), (str(node.attrs["activation"]), residual is not None)
        kernel: DenseGemm | FewTokensGemm
        sizes: tuple[Dim, ...]
        panels: Dim
        if schedule.family == FEW_TOKENS:
            kernel = FewTokensGemm(v, *epilogue)
            mr, strips, kc, panels = STRIP, kernel.strips, schedule.param("kc"), 1
            scratch_bytes = kernel.scratch_bytes(k)
            sizes = (tokens, m, k, kc)
        else:
            mr, strips, nv, kc, group = (schedule.param(n) for n in PARAMS)
            kernel = DenseGemm(v, mr, strips, nv, *epilogue)
            sizes = (tokens, m, k, kc, group)
            panels = ceildiv(tokens, WIDTH)
        packed = pack_weight(weight.data, mr, strips, kc)
        packed_bias = pack_bias(None if bias is None else bias.data, m, kernel.rows)
        refs = [
            binder.weight(weight.name, packed),
            binder.weight(f"{node.name}.bias", packed_bias),
        ]
        refs += [] if residual is None else [binder.ref(residual)]
        return [
            KernelCall(
                kernel,
                (binder.ref(x), *refs, binder.ref(y), *sizes),
                panels * -(-m // kernel.rows),
                f"{node.name}: y[{m}] = w[{m}][{k}] x[{k}], {kernel.activation}",
                scratch_bytes=scratch_bytes,
                grain=grain_of(kernel.rows * k, tokens, LEAST_MACS["fp32"]),
                macs=tokens * (m * k),
            )
        ]

    def variants(self) -> list[Kernel]:
        found: list[Kernel] = []
        for v, activation, residual in product(VECTOR_ISAS, ACTIVATIONS, (False, True)):
            blocks = REGISTER_BLOCKS[v.lanes]
            found += [DenseGemm(v, *block, activation, residual) for block in blocks]
            found.append(FewTokensGemm(v, activation, residual))
        return found
