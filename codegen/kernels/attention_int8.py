"""`attention_int8`: fused attention whose two products are integer products, softmax in fp32.

One item is one head of one panel of queries, as in `attention`; attention_int8_block.py says what
is computed for a run of queries of one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import amx
from sparsec.codegen.isa.int8 import AMX_INT8, AVX2_INT8, AVX512_VNNI, Int8Isa, int8_isa, int8_isas
from sparsec.codegen.kernels.attention_args import (
    attention_call,
    attention_parameters,
    longest_sequence,
    mask_kind,
    result_of,
)
from sparsec.codegen.kernels.attention_int8_block import Block
from sparsec.codegen.kernels.attention_int8_pairs import PairBlock
from sparsec.codegen.kernels.attention_int8_tiles import LEAST_HEAD_SIZE, TileBlock
from sparsec.codegen.kernels.base import Binder, TirKernel
from sparsec.codegen.kernels.query_blocks import PACKED, Sequences, over_query_blocks
from sparsec.codegen.program import Arg, Kernel, KernelCall, Parameter
from sparsec.ir.graph import Node
from sparsec.ir.layouts import Panels
from sparsec.ir.schedule import Schedule, Workload
from sparsec.ir.types import DType
from sparsec.target import Target

PANELS = 16  # with queries of one head in turn: its keys and values are prepared once
MASKS = ("none", "key", "full", PACKED)
RESULTS = ("f32", "u8")
BLOCKS: Mapping[Int8Isa, type[Block]] = {
    AVX2_INT8: PairBlock,
    AVX512_VNNI: Block,
    AMX_INT8: TileBlock,
}


@dataclass(frozen=True, slots=True)
class AttentionInt8(TirKernel):
    """`mask` is one of MASKS, as in `attention`, `result` "f32" or quantised, "u8"."""

    scratch: ClassVar[str | None] = "int32"
    int8: Int8Isa
    mask: str
    result: str

    @property
    def name(self) -> str:
        return f"attention_u8_mask_{self.mask}_to_{self.result}_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """`factor` is scale * q_scale * k_scale."""
        factors, steps = ("factor", "v_scale"), 2 if self.mask == "key" else 3
        tiles = [Parameter("tiles", dtype="uint8")] if self.has_tiles else []
        plain = attention_parameters(
            self.mask, self.result, operand="uint8", steps=steps, factors=factors
        )
        return (*plain, *tiles)

    @property
    def isa(self) -> str:
        return self.int8.name

    @property
    def has_tiles(self) -> bool:
        """Whether it takes the shapes of tile registers, `tiles`."""
        return self.int8 is AMX_INT8

    @property
    def block(self) -> type[Block]:
        """What computes a run of queries."""
        return BLOCKS[self.int8]

    def _body(self, s: tir.KernelScope) -> None:
        sequences = Sequences(s, self.mask == PACKED)
        prepared = tir.registers("int64", 2)
        for place in range(2):
            T.buffer_store(prepared, T.int64(-1), [place])

        def compute(head: Any, first: Any, sequence: Any, groups: int) -> None:
            kinds = self.mask, self.result
            places = head, first, sequence, groups
            self.block(self.int8, *kinds, s, sequences, prepared, *places).compute()

        if self.has_tiles:
            amx.configure(s["tiles"])
        over_query_blocks(s, sequences, (4, 2), compute, PANELS)
        if self.has_tiles:
            amx.release()


class AttentionInt8Family:
    """`attention_int8` on AVX2 and AVX512-VNNI, and on AMX where a head fills a tile."""

    ops = ("attention_int8",)

    def workload(self, node: Node) -> Workload:
        q, kind = node.input(0).type, mask_kind(node)
        sizes = tuple((n, int(node.attrs[n])) for n in ("heads", "head_size"))
        return Workload(node.op, sizes, str(q.dtype), epilogue=f"mask {kind} to {result_of(node)}")

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        kind = workload.epilogue.split()[1]
        if kind not in MASKS or workload.dtype != str(DType.U8):
            return []
        size = workload.size("head_size")
        found = [isa for isa in int8_isas(target) if size % BLOCKS[isa].unit == 0]
        if size < LEAST_HEAD_SIZE:
            found = [isa for isa in found if isa is not AMX_INT8]
        return [Schedule("attention_int8", isa.name) for isa in found]

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        attrs, mask = node.attrs, mask_kind(node)
        assert all(v.type.layout == Panels() for v in (*map(node.input, range(3)), node.output))
        kernel = AttentionInt8(int8_isa(schedule.isa), mask, result_of(node))
        heads, head_size = int(attrs["heads"]), int(attrs["head_size"])
        scale, q_scale, k_scale = (float(attrs[n]) for n in ("scale", "q_scale", "k_scale"))
        own: dict[str, Arg] = {"factor": scale * q_scale * k_scale}
        own["v_scale"] = float(attrs["v_scale"])
        if kernel.has_tiles:
            own["tiles"] = binder.weight(f"{node.name}.tiles", amx.ALL_FULL)
        scratch_bytes = kernel.block.scratch_bytes(longest_sequence(node), head_size, mask)
        return [attention_call(node, kernel, binder, scratch_bytes, own, per_panel=heads)]

    def variants(self) -> list[Kernel]:
        return [AttentionInt8(i, mask, to) for i in BLOCKS for mask in MASKS for to in RESULTS]
