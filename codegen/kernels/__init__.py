"""The table of kernels: every family, every variant, and which one computes a node."""

from __future__ import annotations

from sparsec.codegen.kernels.attention import AttentionFamily
from sparsec.codegen.kernels.attention_bf16 import AttentionBf16Family
from sparsec.codegen.kernels.attention_int8 import AttentionInt8Family
from sparsec.codegen.kernels.base import KernelFamily
from sparsec.codegen.kernels.channels import ChannelsFamily
from sparsec.codegen.kernels.embedding import EmbeddingFamily
from sparsec.codegen.kernels.float_family import FloatGemmFamily
from sparsec.codegen.kernels.int8_family import Int8GemmFamily
from sparsec.codegen.kernels.layer_norm import LayerNormFamily
from sparsec.codegen.kernels.layout_change import LayoutChangeFamily
from sparsec.codegen.kernels.packing import PackingFamily
from sparsec.codegen.kernels.pointwise import PointwiseFamily
from sparsec.codegen.kernels.quantize import QuantizeFamily
from sparsec.codegen.kernels.quantize_tokens import QuantizeTokensFamily
from sparsec.codegen.kernels.to_bf16 import ToBf16Family
from sparsec.codegen.program import Kernel
from sparsec.ir.graph import Node
from sparsec.ir.schedule import Schedule
from sparsec.target import Target

_ALL: tuple[KernelFamily, ...] = (
    FloatGemmFamily(),
    Int8GemmFamily(),
    AttentionFamily(),
    AttentionInt8Family(),
    AttentionBf16Family(),
    LayerNormFamily(),
    EmbeddingFamily(),
    LayoutChangeFamily(),
    PointwiseFamily(),
    ChannelsFamily(),
    PackingFamily(),
    QuantizeFamily(),
    QuantizeTokensFamily(),
    ToBf16Family(),
)

FAMILIES: dict[str, KernelFamily] = {op: family for family in _ALL for op in family.ops}
KERNELS: tuple[Kernel, ...] = tuple(kernel for family in _ALL for kernel in family.variants())

__all__ = ["FAMILIES", "KERNELS", "KernelFamily", "family_for", "schedule_for"]


def family_for(node: Node) -> KernelFamily | None:
    """The family of the node's op."""
    return FAMILIES.get(node.op)


def schedule_for(node: Node, target: Target) -> Schedule | None:
    """The heuristic's schedule; None when no kernel here computes the node."""
    family = family_for(node)
    if family is None:
        return None
    return next(iter(family.schedules(family.workload(node), target)), None)
