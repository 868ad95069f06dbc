"""Passes: one transformation of the graph per file, and the order they run in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sparsec.ir.graph import Node
from sparsec.passes.absorb_16_bits import Absorb16Bits
from sparsec.passes.absorb_dynamic import AbsorbDynamic
from sparsec.passes.absorb_integer import AbsorbInteger
from sparsec.passes.absorb_qdq import AbsorbQdq, DropQdq, Roundings
from sparsec.passes.assign_layouts import AssignLayouts
from sparsec.passes.assign_schedules import AssignSchedules, ScheduleLookup
from sparsec.passes.balance import Balance, Unbalance, balanced_values
from sparsec.passes.base import Pass, PassResult
from sparsec.passes.canonicalize import Canonicalize
from sparsec.passes.choose_weight_layout import ChooseWeightLayout, LayoutChoice, by_density
from sparsec.passes.fold_quantize import FoldQuantize
from sparsec.passes.fuse_attention import FuseAttention
from sparsec.passes.fuse_channels import FuseChannels, FuseRotaryEmbedding
from sparsec.passes.fuse_embedding import FuseEmbedding
from sparsec.passes.fuse_epilogue import FuseEpilogue
from sparsec.passes.fuse_gelu import FuseGelu
from sparsec.passes.fuse_layer_norm import FuseLayerNorm
from sparsec.passes.fuse_linear import FuseLinear
from sparsec.passes.infer_types import InferTypes
from sparsec.passes.merge_qkv import MergeQkv
from sparsec.passes.move_residual import MoveResidual
from sparsec.passes.pack_tokens import PackTokens
from sparsec.passes.quantize import (
    Quantization,
    Quantize,
    int8_candidates,
    is_quantized,
    quantized_values,
)
from sparsec.passes.quantize_attention import (
    Objection,
    QuantizeAttention,
    attention_parts,
    attention_values,
)
from sparsec.passes.quantize_tables import QuantizeTables
from sparsec.passes.use_bf16 import UseBf16

__all__ = [
    "PASSES",
    "Balance",
    "LayoutChoice",
    "Pass",
    "PassResult",
    "Quantization",
    "Roundings",
    "ScheduleLookup",
    "Unbalance",
    "attention_parts",
    "attention_values",
    "balanced_values",
    "bf16_pipeline",
    "default_pipeline",
    "graph_pipeline",
    "int8_candidates",
    "int8_pipeline",
    "is_quantized",
    "quantized_values",
    "target_pipeline",
]

# The passes that need no argument, by name.
PASSES: Mapping[str, Callable[[], Pass]] = {
    "canonicalize": Canonicalize,
    "infer_types": InferTypes,
    "fuse_embedding": FuseEmbedding,
    "fuse_gelu": FuseGelu,
    "fuse_linear": FuseLinear,
    "fuse_layer_norm": FuseLayerNorm,
    "fuse_attention": FuseAttention,
    "fuse_rotary": FuseRotaryEmbedding,
    "fuse_channels": FuseChannels,
    "merge_qkv": MergeQkv,
    "fuse_epilogue": FuseEpilogue,
    "pack_tokens": PackTokens,
    "assign_layouts": AssignLayouts,
}


def graph_pipeline(
    fixed_dims: Mapping[str, int] | None = None, *, roundings: Roundings = Roundings.PRODUCTS
) -> list[Pass]:
    """The passes that know nothing of a target: a graph of core ops in rows.

    `roundings` of a quantised model are kept for int8_pipeline to make use of.
    """
    return [
        InferTypes(fixed_dims or {}),  # first: what is fixed can be folded
        AbsorbInteger(),
        Absorb16Bits(roundings),
        AbsorbQdq(roundings),  # before all patterns: they have no roundings inside
        AbsorbDynamic(roundings),
        Canonicalize(),
        FuseEmbedding(),  # before FuseLayerNorm, which would take the last sum as a residual
        FuseGelu(),
        FuseLinear(),
        FuseLayerNorm(),
        FuseRotaryEmbedding(),
        FuseAttention(roundings),
        DropQdq(roundings),
        Canonicalize(),  # the heads' reshapes and transposes meet and cancel
        FuseChannels(),
        MergeQkv(),
        FuseEpilogue(),  # after FuseLayerNorm, whose residual costs nothing
    ]


def int8_pipeline(
    quantization: Quantization,
    supported: Callable[[Node], bool] = lambda node: True,
    *,
    attention: bool = True,
    objection: Objection = lambda fp32, int8: None,
    all_roundings: bool = False,
) -> list[Pass]:
    """The passes that turn a graph of `graph_pipeline` into one of int8 ops.

    `supported` says whether a kernel computes a node on the target; without `attention` that
    stays fp32, and so does one to which there is an `objection`. With `all_roundings` so do the
    tables that the model itself has not in bytes, and what it rounds is rounded.
    """
    # Its operands are int8 by then.
    last = QuantizeAttention(
        quantization.ranges,
        supported,
        quantization.keep_fp32,
        quantization.fallback,
        objection,
    )
    return [
        Quantize(
            quantization.ranges,
            quantization.keep_fp32,
            quantization.dynamic,
            quantization.fallback,
            all_roundings,
        ),
        FoldQuantize(),
        MoveResidual(),
        *([last] if attention else []),
        QuantizeTables(
            quantization.keep_fp32,
            supported,
            fallback=quantization.fallback,
            only_own=all_roundings,
        ),
    ]


def bf16_pipeline(
    products: bool = True,
    attention: bool = True,
    keep_fp32: tuple[str, ...] = (),
    supported: Callable[[Node], bool] = lambda node: True,
) -> list[Pass]:
    """The passes that compute in bf16 what is fp32 so far, alone or after `int8_pipeline`."""
    return [UseBf16(products, attention, keep_fp32, supported), FoldQuantize("to_bf16")]


def target_pipeline(
    schedules: ScheduleLookup,
    choose_layout: LayoutChoice = by_density,
    *,
    keep_padding: bool = False,
) -> list[Pass]:
    """The passes after all changes of precision. `schedules` chooses per node."""
    packing: list[Pass] = [] if keep_padding else [PackTokens()]  # it knows the final ops
    return [
        ChooseWeightLayout(choose_layout),
        *packing,
        AssignLayouts(),  # last of the rewrites: it knows all producers and readers
        AssignSchedules(schedules),
    ]


def default_pipeline(
    *,
    schedules: ScheduleLookup,
    fixed_dims: Mapping[str, int] | None = None,
    quantization: Quantization | None = None,
    choose_layout: LayoutChoice = by_density,
    keep_padding: bool = False,
) -> list[Pass]:
    """The whole pipeline. `fixed_dims` gives sizes to symbols; without quantization it is fp32."""
    int8 = [] if quantization is None else int8_pipeline(quantization)
    roundings = Roundings.NONE if quantization is None else Roundings.PRODUCTS
    graph = graph_pipeline(fixed_dims, roundings=roundings)
    target = target_pipeline(schedules, choose_layout, keep_padding=keep_padding)
    return [*graph, *int8, *target]
