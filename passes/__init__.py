"""Passes: one transformation of the graph per file, and the order they run in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sparsec.passes.assign_layouts import AssignLayouts
from sparsec.passes.assign_schedules import AssignSchedules, ScheduleLookup
from sparsec.passes.base import Pass, PassResult
from sparsec.passes.canonicalize import Canonicalize
from sparsec.passes.fuse_attention import FuseAttention
from sparsec.passes.fuse_embedding import FuseEmbedding
from sparsec.passes.fuse_epilogue import FuseEpilogue
from sparsec.passes.fuse_gelu import FuseGelu
from sparsec.passes.fuse_layer_norm import FuseLayerNorm
from sparsec.passes.fuse_linear import FuseLinear
from sparsec.passes.infer_types import InferTypes
from sparsec.passes.merge_qkv import MergeQkv

__all__ = ["PASSES", "Pass", "PassResult", "ScheduleLookup", "default_pipeline", "graph_pipeline"]

# The passes that need no argument, by name.
PASSES: Mapping[str, Callable[[], Pass]] = {
    "canonicalize": Canonicalize,
    "infer_types": InferTypes,
    "fuse_embedding": FuseEmbedding,
    "fuse_gelu": FuseGelu,
    "fuse_linear": FuseLinear,
    "fuse_layer_norm": FuseLayerNorm,
    "fuse_attention": FuseAttention,
    "merge_qkv": MergeQkv,
    "fuse_epilogue": FuseEpilogue,
    "assign_layouts": AssignLayouts,
}


def graph_pipeline(fixed_dims: Mapping[str, int] | None = None) -> list[Pass]:
    """The passes that know nothing of a target: a graph of core ops in rows."""
    return [
        InferTypes(fixed_dims or {}),  # first: what is fixed can be folded
        Canonicalize(),
        FuseEmbedding(),  # before FuseLayerNorm, which would take the last sum as a residual
        FuseGelu(),
        FuseLinear(),
        FuseLayerNorm(),
        FuseAttention(),
        Canonicalize(),  # the heads' reshapes and transposes meet and cancel
        MergeQkv(),
        FuseEpilogue(),  # after FuseLayerNorm, whose residual costs nothing
    ]


def default_pipeline(
    *, schedules: ScheduleLookup, fixed_dims: Mapping[str, int] | None = None
) -> list[Pass]:
    """The whole pipeline. `schedules` chooses per node; `fixed_dims` gives sizes to symbols."""
    return [
        *graph_pipeline(fixed_dims),
        AssignLayouts(),  # last of the rewrites: it knows all producers and readers
        AssignSchedules(schedules),
    ]
