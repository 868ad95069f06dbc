"""What kernels of `linear_int8` read beside x and the weight, and which epilogue takes it.

An epilogue is chosen by the numbers of a layer: the step of its result, the largest that there can
be, the pieces that its activation has between the steps.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from sparsec.codegen.isa import pieces
from sparsec.codegen.isa.coarse import COARSE, MAX_ERROR
from sparsec.codegen.isa.int8 import Int8Isa
from sparsec.codegen.isa.polynomials import ACTIVATIONS
from sparsec.codegen.kernels.base import Binder, same_memory
from sparsec.codegen.kernels.int8_epilogue import SCALED, ActivationForm, Epilogue
from sparsec.codegen.kernels.int8_pack import pack_rows
from sparsec.codegen.program import Arg, BufferRef
from sparsec.ir.graph import Node
from sparsec.ir.op_spec import Array
from sparsec.ir.ops_int8 import Rows, rows_of
from sparsec.ir.types import DType

U8_MAX = 255
STEPS_OF_COARSE = 64  # a coarse activation is off by less than this part of a step of the result


def epilogues(isa: Int8Isa) -> list[Epilogue]:
    """All that `epilogue_of` gives."""
    found = [
        Epilogue(a, residual, by_token=by_token)
        for a, residual, by_token in product(ACTIVATIONS, (False, True), (False, True))
    ]
    found += [replace(e, in_place=True) for e in found if e.has_residual]
    ends = ((False, False), (False, True), (True, False))
    for activation, (residual, bounded) in product(ACTIVATIONS, ends):
        may_be: dict[ActivationForm, bool] = {
            "exact": True,
            "coarse": activation in COARSE,
            "pieces": not residual and pieces.may_take_pieces(activation, isa.lanes),
            "steps": not residual and activation == "none",
        }
        found += [Epilogue(activation, residual, True, f, bounded) for f in may_be if may_be[f]]
    return found


def plain_epilogue(node: Node) -> Epilogue:
    """Without its form and bound, which numbers and the instruction set decide."""
    residual, by_token = (node.optional_input(i) is not None for i in (4, 5))
    to_u8 = node.output.type.dtype is DType.U8
    activation = str(node.attrs["activation"])
    return Epilogue(activation, residual, to_u8, by_token=by_token and not to_u8)


def epilogue_of(node: Node, isa: Int8Isa, binder: Binder) -> Epilogue:
    """With the cheapest form that the layer's numbers allow on this instruction set."""
    plain = plain_epilogue(node)
    if not plain.to_u8:
        return replace(plain, in_place=_is_in_place(node, binder))
    activation, residual = plain.activation, plain.has_residual
    scale, units = node.attrs["out_scale"], 1
    form: ActivationForm = "exact"
    fits = not residual and pieces.may_take_pieces(activation, isa.lanes)
    table = _pieces(node) if fits else None
    if table is not None:
        form, units = "pieces", pieces.units_per_step(table)
    elif activation in COARSE and scale >= STEPS_OF_COARSE * MAX_ERROR:
        form = "coarse"
    elif _row_scales(node).out_scale != scale:
        form = "steps"
    bounded = not residual and _largest(node) / scale * units < 2**30
    return replace(plain, form=form, is_bounded=bounded)


def _is_in_place(node: Node, binder: Binder) -> bool:
    residual = node.optional_input(4)
    return residual is not None and same_memory(binder.ref(residual), binder.ref(node.output))


def _largest(node: Node) -> float:
    """A bound of the result before the residual: no activation exceeds max(1, |x|)."""
    weight, scale, bias = node.input(1).data, node.input(2).data, node.optional_input(3)
    assert weight is not None, node
    assert scale is not None, node
    rows = U8_MAX * np.abs(weight.astype(np.int32)).sum(axis=1) * scale * node.attrs["x_scale"]
    if bias is not None and bias.data is not None:
        rows = rows + np.abs(bias.data)
    return max(1.0, float(rows.max(initial=0)))


def _row_scales(node: Node) -> Rows:
    """The multiplier and the bias of each row, and the scale that the result is stored with."""
    scale, bias = node.input(2).data, node.optional_input(3)
    assert scale is not None, node
    is_plain = all(node.optional_input(i) is None for i in (4, 5))
    return rows_of(node.attrs, scale, None if bias is None else bias.data, is_plain)


def operands(node: Node, epilogue: Epilogue, binder: Binder) -> list[BufferRef]:
    """What the epilogue reads of tokens and of its activation, and the result."""
    residual = None if epilogue.in_place else node.optional_input(4)
    read = (node.optional_input(5), residual)
    table = _pieces(node) if epilogue.form == "pieces" else None
    return [
        *(binder.ref(v) for v in read if v is not None),
        *([] if table is None else [binder.weight(f"{node.name}.pieces", table)]),
        binder.ref(node.output),
    ]


def _pieces(node: Node) -> Array | None:
    return pieces.piece_table(str(node.attrs["activation"]), node.attrs["out_scale"])


def numbers(node: Node, epilogue: Epilogue) -> list[Arg]:
    """Of the result's scale and zero point, what the epilogue reads."""
    if not epilogue.to_u8:
        return []
    inverse = float(np.float32(1) / np.float32(node.attrs["out_scale"]))
    return [*([] if epilogue.form in SCALED else [inverse]), int(node.attrs["out_zero_point"])]


def row_values(node: Node, rows: int, epilogue: Epilogue, binder: Binder) -> list[BufferRef]:
    """What there is one of per row, up to whole blocks: offset, multiplier and bias.

    The zero point of x is in the offset: sum (x - zero) w = sum x w - zero sum w.
    """
    weight, per_row = node.input(1).data, _row_scales(node)
    assert weight is not None, node
    sums = weight.astype(np.int32).sum(axis=1, dtype=np.int32)
    factor, of = np.float32(1), ""
    if epilogue.form == "pieces":
        table = _pieces(node)
        assert table is not None, node
        factor, of = pieces.units(table, node.attrs["out_scale"]), ".units"
    values = {
        "offset": (-int(node.attrs["x_zero_point"]) * sums).astype(np.int32),
        f"multiplier{of}": per_row.multiplier * factor,
        f"bias{of}": per_row.bias * factor,
    }
    return [binder.weight(f"{node.name}.{n}", pack_rows(v, rows)) for n, v in values.items()]
