"""What attention kernels are given: the parameters of their functions, and a node's arguments.

A mask is read at batch, head, query and key times their steps; a key's step is 1. Of packed
sequences two lists say where they lie; others are all `seq` long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsec.codegen.kernels.base import Binder
from sparsec.codegen.kernels.panels import WIDTH
from sparsec.codegen.kernels.quantize import inverse_of
from sparsec.codegen.kernels.query_blocks import PACKED
from sparsec.codegen.program import Arg, Kernel, KernelCall, Kind, Parameter
from sparsec.ir.dims import Dim, ceildiv
from sparsec.ir.graph import Node
from sparsec.ir.types import DType, TensorType

_RESULTS = {DType.F32: "f32", DType.U8: "u8", DType.BF16: "bf16"}
_STORED = {"f32": "float32", "u8": "uint8", "bf16": "int32"}  # bf16 in pairs
_STEPS = ("batch_step", "head_step", "query_step")


def attention_parameters(
    mask: str, result: str, *,
    operand: str = "float32", steps: int = 3, factors: Sequence[str] = ("scale",),
) -> tuple[Parameter, ...]:  # fmt: skip
    """For elements `operand` of q, k and v, and the first `steps` of a mask that is not packed."""
    masked, packed = mask != "none", mask == PACKED
    sizes = ["tokens", *([] if packed else ["seq"]), "heads", "head_size"]
    sizes += [f"{x}_{what}" for x in "qkv" for what in ("channels", "offset")]
    sizes += _STEPS[:steps] if masked and not packed else []
    quantized = (Parameter("inverse", Kind.FLOAT), Parameter("zero_point", Kind.INT))
    return (
        *(Parameter(n, dtype=operand) for n in "qkv"),
        *((Parameter("mask"),) if masked else ()),
        *(Parameter(n, dtype="int64") for n in ("sequence_of", "starts") if packed),
        Parameter("y", dtype=_STORED[result]),
        *(Parameter(n, Kind.INT) for n in sizes),
        *(Parameter(n, Kind.FLOAT) for n in factors),
        *(quantized if result == "u8" else ()),
    )


def attention_call(
    node: Node, kernel: Kernel, binder: Binder, scratch_bytes: Dim, own: Mapping[str, Arg],
    per_panel: int = 0,
) -> KernelCall:  # fmt: skip
    """The call that computes a node; `own` are the arguments that not all kernels have."""
    heads, head_size = int(node.attrs["heads"]), int(node.attrs["head_size"])
    q, longest = node.input(0).type, longest_sequence(node)
    values = {**_values(node, binder), **own}
    kind = " in bf16" if q.dtype is DType.BF16 else ""
    return KernelCall(
        kernel,
        tuple(values[p.name] for p in kernel.parameters),
        ceildiv(q.tokens, WIDTH) * heads,
        f"{node.name}: {heads} heads of {head_size}{kind}, mask {mask_kind(node)}",
        scratch_bytes=scratch_bytes,
        macs=q.tokens * longest * (2 * heads * head_size),
        per_panel=per_panel,
    )


def _values(node: Node, binder: Binder) -> dict[str, Arg]:
    """All that a node has an argument for, by parameter."""
    names = ("q", "k", "v", "mask", "sequence_of", "starts")
    operands = {n: node.optional_input(i) for i, n in enumerate(names)}
    q, mask, attrs = node.input(0).type, operands["mask"], node.attrs
    unit = 2 if q.dtype is DType.BF16 else 1  # channels that lie in one element
    values: dict[str, Arg] = {n: binder.ref(v) for n, v in operands.items() if v is not None}
    values |= {"y": binder.ref(node.output), "tokens": q.tokens, "seq": q.shape[-2]}
    values |= {n: int(attrs[n]) for n in ("heads", "head_size")}
    for i, name in enumerate("qkv"):
        values[f"{name}_channels"] = node.input(i).type.channels // unit
        values[f"{name}_offset"] = int(attrs[f"{name}_offset"]) // unit
    if mask is not None:
        values |= zip(_STEPS, mask_steps(mask.type, q)[1], strict=False)
    if result_of(node) == "u8":
        values["inverse"] = inverse_of(attrs["out_scale"])
        values["zero_point"] = attrs.get("out_zero_point", 0)
    return values


def longest_sequence(node: Node) -> Dim:
    """The tokens of an attention's longest sequence."""
    if node.optional_input(4) is None:
        return node.input(0).type.shape[-2]
    longest: Dim = node.attrs["longest"]
    return longest


def result_of(node: Node) -> str:
    """How an attention's result is stored."""
    return _RESULTS[node.output.type.dtype]


def mask_kind(node: Node) -> str:
    """The mask of an attention: "none", "key", "full", PACKED, or "other" without a kernel."""
    q, mask = node.input(0).type, node.optional_input(3)
    if node.optional_input(4) is not None:
        one_per_token = mask is not None and mask.type.shape == (1, 1, 1, q.tokens)
        return PACKED if one_per_token else "other"
    return "none" if mask is None else mask_steps(mask.type, q)[0]


def mask_steps(mask: TensorType, q: TensorType) -> tuple[str, tuple[Dim, ...]]:
    """The kind of a mask and its (batch, head, query) steps; "other" is one without a kernel."""
    batch, seq = q.shape[0], q.shape[-2]
    shape = (1,) * (4 - mask.rank) + mask.shape
    mask_batch, mask_heads, queries, keys = shape
    known = mask_batch in (1, batch) and queries in (1, seq) and keys == seq
    if not known or mask.dtype is not DType.F32 or q.rank != 3:
        return "other", ()
    head_step = 0 if mask_heads == 1 else queries * keys
    batch_step = 0 if mask_batch == 1 else mask_heads * queries * keys
    kind = "key" if queries == 1 else "full"
    return kind, (batch_step, head_step, 0 if queries == 1 else keys)
