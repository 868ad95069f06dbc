"""`attention_bf16`: the kernels of AVX512-BF16 and of AMX, and which one computes a node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsec.codegen import tir
from sparsec.codegen.isa import amx, by_name
from sparsec.codegen.isa.bf16 import AMX_BF16, AVX512_BF16, LANES
from sparsec.codegen.kernels.attention import MASKS, REGISTER_BLOCKS, Attention
from sparsec.codegen.kernels.attention_args import (
    attention_call,
    attention_parameters,
    longest_sequence,
    mask_kind,
    result_of,
)
from sparsec.codegen.kernels.attention_bf16_block import PairBlock
from sparsec.codegen.kernels.attention_bf16_tiles import TilePairBlock
from sparsec.codegen.kernels.base import Binder
from sparsec.codegen.kernels.panels import GROUP
from sparsec.codegen.kernels.query_blocks import PACKED, Sequences, over_query_blocks
from sparsec.codegen.program import Arg, Kernel, KernelCall, Parameter
from sparsec.ir.graph import Node
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Target

RESULTS = ("f32", "u8", "bf16")
BLOCKS: Mapping[str, type[PairBlock]] = {
    AVX512_BF16.name: PairBlock,
    AMX_BF16.name: TilePairBlock,
}
TILES = (4, 16)  # groups of queries, keys or channels at once


@dataclass(frozen=True, slots=True)
class AttentionBf16(Attention):
    """`result` may be "bf16" too. Channels of q, k and v are counted in pairs."""

    @property
    def name(self) -> str:
        block = f"{self.rows}x{self.groups * GROUP}"
        return f"attention_bf16_{block}_mask_{self.mask}_to_{self.result}_{self.isa}"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        tiles = [Parameter("tiles", dtype="uint8")] if self.has_tiles else []
        return (*attention_parameters(self.mask, self.result, operand="int32"), *tiles)

    @property
    def block(self) -> type[PairBlock]:
        """What computes a run of queries."""
        return BLOCKS[self.isa]

    @property
    def has_tiles(self) -> bool:
        """Whether it takes the shapes of tile registers, `tiles`."""
        return self.vector is AMX_BF16

    def _body(self, s: tir.KernelScope) -> None:
        if not self.has_tiles:
            Attention._body(self, s)
            return
        amx.configure(s["tiles"])
        sequences = Sequences(s, self.mask == PACKED)
        over_query_blocks(s, sequences, (4, 2), lambda *run: self._run(s, *run))
        amx.release()

    def _run(self, s: tir.KernelScope, head: Any, token: Any, sequence: Any, groups: int) -> None:
        sequences = Sequences(s, self.mask == PACKED)
        block = self.block(self, s, sequences, head, token, sequence, groups)
        block.load_mask()
        block.copy_values()
        block.compute_scores()
        block.exclude_others()
        block.exponentiate()
        block.compute_context()


class AttentionBf16Family:
    """`attention_bf16` on AVX512-BF16, and on AMX where a head is whole tiles."""

    ops = ("attention_bf16",)

    def workload(self, node: Node) -> Workload:
        q, kind = node.input(0).type, mask_kind(node)
        sizes = tuple((n, int(node.attrs[n])) for n in ("heads", "head_size"))
        result = result_of(node)
        return Workload("attention", sizes, str(q.dtype), epilogue=f"mask {kind} to {result}")

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        if not target.has(AVX512_BF16.isa) or workload.epilogue.split()[1] not in MASKS:
            return []
        tiles = (
            target.has(AMX_BF16.isa) and workload.size("head_size") % TilePairBlock.head_unit == 0
        )
        found = [(AMX_BF16, TILES)] if tiles else []
        found += [(AVX512_BF16, block) for block in REGISTER_BLOCKS[LANES]]
        return [
            Schedule("attention_bf16", isa.name, (("groups", groups), ("rows", rows)))
            for isa, (groups, rows) in found
        ]

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        groups, rows = schedule.param("groups"), schedule.param("rows")
        isa, mask = by_name(schedule.isa), mask_kind(node)
        kernel = AttentionBf16(isa, groups, rows, mask, result_of(node))
        own: dict[str, Arg] = {"scale": float(node.attrs["scale"])}
        if kernel.has_tiles:
            own["tiles"] = binder.weight(f"{node.name}.tiles", amx.ALL_FULL)
        head_size = int(node.attrs["head_size"])
        scratch_bytes = kernel.block.scratch_bytes(longest_sequence(node), head_size)
        return [attention_call(node, kernel, binder, scratch_bytes, own)]

    def variants(self) -> list[Kernel]:
        blocks = [(AVX512_BF16, *block) for block in REGISTER_BLOCKS[LANES]]
        return [
            AttentionBf16(isa, groups, rows, mask, result)
            for isa, groups, rows in (*blocks, (AMX_BF16, *TILES))
            for mask in MASKS
            for result in RESULTS
        ]
