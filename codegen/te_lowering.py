"""Lowers a tensor expression (TE) to a PrimFunc with the plain C signature of `program.Kernel`.

    te.compute((rows, cols), lambda i, j: x[i, j] / total[i])
    ->  int32_t name(x, y, sizes..., begin, end) { for i in [begin, end): total; for j: y = ... }

Stages before the last never reach memory: a stage that reduces becomes an accumulator inside the
loops of the last stage, every other one is inlined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import ir, s_tir, te, tirx
from tvm.s_tir import transform as s_transform
from tvm.tirx.buffer import is_buffer_var

from sparsec.codegen import tir

STATUS_OUT_OF_RANGE = 1  # SPARSEC status: an index operand points outside its axis


@dataclass(frozen=True, slots=True)
class IndexCheck:
    """Input `operand`, one axis of `count` elements, must lie in `[-bound, bound)`.

    `bounds` are applied in turn: element `i` belongs to `bounds[i % len(bounds)]`.
    """

    operand: int
    count: Any
    bounds: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Definition:
    """What an op computes, as TE, and which of its loops may be cut into work items.

    `order` permutes the loops over the output; the first `item_loops` of them are fused into the
    item loop, none for a single item. `accumulate_at` counts the loops that enclose the reducing
    stages before the last. No loop is fused when there is such a stage.
    """

    inputs: tuple[Any, ...]
    output: Any
    item_loops: int = 1
    order: tuple[int, ...] = ()
    accumulate_at: int = 0
    checks: tuple[IndexCheck, ...] = ()


def te_function(name: str, definition: Definition, sizes: Sequence[Any]) -> Any:
    """The PrimFunc that computes `definition`; `sizes` are the int64 variables of its shapes."""
    arguments = [*definition.inputs, definition.output, *sizes]
    schedule = s_tir.Schedule(te.create_prim_func(arguments))
    _schedule_loops(schedule, definition)
    function = _lower_blocks(schedule.mod)["main"]
    return _plain_signature(name, function, definition)


def _schedule_loops(schedule: Any, definition: Definition) -> None:
    last = schedule.get_sblock(definition.output.op.name)
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    stages = [b for b in blocks if schedule.get(b).name_hint != schedule.get(last).name_hint]
    loops = schedule.get_loops(last)
    if definition.order:
        schedule.reorder(*(loops[i] for i in definition.order))
        loops = schedule.get_loops(last)
    if definition.item_loops > 1:
        schedule.fuse(*loops[: definition.item_loops])
    reducing = [stage for stage in stages if _reduces(schedule, stage)]
    for stage in stages:
        if stage not in reducing:
            schedule.compute_inline(stage)
    for stage in reversed(reducing):
        _accumulate(schedule, stage, last, definition.accumulate_at)


def _accumulate(schedule: Any, stage: Any, last: Any, depth: int) -> None:
    if depth:
        schedule.compute_at(stage, schedule.get_loops(last)[depth - 1])
    own = schedule.get_loops(stage)[depth:]
    if own:
        schedule.decompose_reduction(stage, own[0])


def _reduces(schedule: Any, block: Any) -> bool:
    return any(v.iter_type == tirx.IterVar.CommReduce for v in schedule.get(block).iter_vars)


def _lower_blocks(module: Any) -> Any:
    passes = [
        s_transform.CanonicalizeLoop(),
        s_transform.LowerInitBlock(),
        s_transform.PlanAndUpdateBufferAllocationLocation(),
        s_transform.ConvertBlocksToOpaque(),
        s_transform.CompactBufferAllocation(),
        s_transform.LowerMatchBuffer(),
        s_transform.StmtSimplify(),
        s_transform.LowerOpaqueBlock(),
    ]
    return tvm.transform.Sequential(passes)(module)


def _plain_signature(name: str, function: Any, definition: Definition) -> Any:
    """Buffers become pointers, the item loop runs over `[begin, end)`, the result is a status."""
    params: list[Any] = []
    buffers: list[Any] = []
    for param in function.params:
        if is_buffer_var(param):
            pointer = tirx.Var(f"{param.name}_data", ir.PointerType(param.ty.dtype, "global"))
            buffers.append(tirx.DeclBuffer(param, data=pointer))
            params.append(pointer)
        else:
            params.append(param)
    begin, end = tirx.Var("begin", "int64"), tirx.Var("end", "int64")
    checks = [_check(c, function.params[c.operand]) for c in definition.checks]
    main = _item_range(function.body, begin, end, definition.item_loops)
    body = tirx.SeqStmt([*buffers, *checks, main, tir.leave(0)])
    for key, value in (("device_type", 1), ("device_id", 0)):
        body = tirx.AttrStmt(ir.StringImm("default"), key, tirx.const(value, "int32"), body)
    result = tirx.PrimFunc([*params, begin, end], body, ret_type=ir.PrimType("int32"))
    return result.with_attrs(
        {"global_symbol": name, "calling_conv": 1, "tirx.noalias": True, "s_tir": True}
    )


def _item_range(body: Any, begin: Any, end: Any, item_loops: int) -> Any:
    """`body` with its outermost loop cut to the items, or run when there is its only item."""
    if item_loops == 0:
        return tirx.IfThenElse(begin < end, body, None)
    assert isinstance(body, tirx.For), body
    return tirx.For(body.loop_var, begin, end - begin, body.kind, body.body)


def _check(check: IndexCheck, indices: Any) -> Any:
    """A loop over all indices that leaves with an error; every range of items runs it."""
    row = tirx.Var("row", "int64")
    period = len(check.bounds)
    wrong: Any = tirx.const(False, "bool")
    for column, bound in enumerate(check.bounds):
        index = indices[row * period + column].astype("int64")
        wrong = tirx.any(wrong, index < -bound, index >= bound)
    return tirx.For(
        row,
        tirx.const(0, "int64"),
        tirx.floordiv(check.count, tirx.const(period, "int64")),
        tirx.ForKind.SERIAL,
        tirx.IfThenElse(wrong, tir.leave(STATUS_OUT_OF_RANGE), None),
    )
