"""ONNX ops that change or make shapes."""

from __future__ import annotations

import numpy as np

from sparsec.errors import InvalidGraph, InvalidModel, UnsupportedOp
from sparsec.frontend.builder import Operand
from sparsec.frontend.call import Call, Converter, wrap_axes, wrap_axis
from sparsec.frontend.known import Known, known_of
from sparsec.frontend.tensors import dtype_of
from sparsec.ir.dims import Dim, bounds, ceildiv, floordiv, maximum, minimum, product
from sparsec.ir.op_helpers import text
from sparsec.ir.types import DType


def known(call: Call, dims: list[Dim]) -> Operand:
    """Dims as an operand: a constant when all are numbers."""
    item = known_of(dims)
    return call.g.constant(item.numbers()) if item.is_number else item


def shape_of(call: Call) -> Operand:
    dims = list(call.shape())
    return known(call, dims[slice(call.attr("start", 0), call.attr("end", None))])


def size_of(call: Call) -> Operand:
    return call.g.reshape(known(call, [product(call.shape())]), ())


def reshape(call: Call) -> Operand:
    x = call.input(0)
    wanted = list(call.g.dims(call.input(1), "the shape of Reshape"))
    if not call.attr("allowzero", 0):
        wanted = [_copied(call, i) if d == 0 else d for i, d in enumerate(wanted)]
    if -1 in wanted:
        at = wanted.index(-1)
        rest = product(wanted[:at] + wanted[at + 1 :])
        if rest == 0:
            raise InvalidModel(f"Reshape to {text(wanted)} leaves the size of -1 open")
        wanted[at] = floordiv(x.type.elements, rest)
    return call.g.reshape(x, wanted)


def _copied(call: Call, axis: int) -> Dim:
    if axis >= call.rank():
        raise InvalidModel(f"Reshape copies axis {axis}, but the operand has {call.rank()} axes")
    return call.shape()[axis]


def flatten(call: Call) -> Operand:
    shape = call.shape()
    axis = call.attr("axis", 1)
    axis = axis if axis == len(shape) else wrap_axis(axis, len(shape))
    return call.g.reshape(call.input(0), [product(shape[:axis]), product(shape[axis:])])


def squeeze(call: Call) -> Operand:
    """Without axes, those of size 1 go; a size that is not known is taken as more than 1."""
    shape = call.shape()
    axes = call.ints("axes", 1)
    if axes is None:
        gone = {i for i, d in enumerate(shape) if d == 1}
    else:
        gone = set(wrap_axes(axes, len(shape)))
    kept = [d for i, d in enumerate(shape) if i not in gone]
    for i in gone:
        call.g.equal(shape[i], 1)
    if any(isinstance(shape[i], int) and shape[i] != 1 for i in gone):
        raise InvalidGraph(f"axes {sorted(gone)} of {text(shape)} are not all of size 1")
    return call.g.reshape(call.input(0), kept)


def unsqueeze(call: Call) -> Operand:
    axes = call.ints("axes", 1)
    if axes is None:
        raise InvalidModel("it has no axes")
    rank = call.rank() + len(axes)
    new = set(wrap_axes(axes, rank))
    rest = iter(call.shape())
    return call.g.reshape(call.input(0), [1 if i in new else next(rest) for i in range(rank)])


def transpose(call: Call) -> Operand:
    default = list(reversed(range(call.rank())))
    return call.g.transpose(call.input(0), call.attr("perm", default))


def expand(call: Call) -> Operand:
    wanted = call.g.dims(call.input(1), "the shape of Expand")
    return call.g.broadcast_to(call.input(0), call.g.joint_shape([call.shape(), wanted]))


def concat(call: Call) -> Operand:
    parts = [p for p in call.present() if p.type.shape != (0,)] or [call.input(0)]
    if len(parts) == 1:
        return parts[0]
    return call.g.add("concat", parts, axis=call.axis(rank=parts[0].type.rank))


def split(call: Call) -> list[Operand | None]:
    """Sizes are an attribute, an operand, or equal parts by the number of outputs."""
    axis = call.axis(0)
    whole = call.shape()[axis]
    sizes = _split_sizes(call, whole)
    parts: list[Operand | None] = []
    start: Dim = 0
    for size in sizes:
        parts.append(call.g.slice(call.input(0), axis, start, start + size))
        start = start + size
    if start != whole:
        raise InvalidGraph(f"parts {text(sizes)} do not make up {whole}")
    return parts


def _split_sizes(call: Call, whole: Dim) -> list[Dim]:
    if "split" in call.attrs:
        return list(call.attrs["split"])
    given = call.optional(1)
    if given is not None:
        return list(call.g.dims(given, "the sizes of Split"))
    count = call.attr("num_outputs", len(call.outputs))
    if count != len(call.outputs):
        raise InvalidModel(f"num_outputs is {count}, but it has {len(call.outputs)} outputs")
    size = ceildiv(whole, count)
    return [*[size] * (count - 1), whole - size * (count - 1)]


_MAX_FLOAT_RANGE = 2**20  # elements: it becomes a constant
_ENDLESS = 2**31 - 1  # exporters write the largest int32 or int64 for "to the end"


def slices(call: Call) -> Operand:
    """Bounds as attributes (opset 9) or operands; they are clamped to the axis here."""
    g, x = call.g, call.input(0)
    starts = g.dims(call.input(1), "the start of Slice")
    ends = g.dims(call.input(2), "the end of Slice")
    axes_operand, steps_operand = call.optional(3), call.optional(4)
    axes = range(len(starts)) if axes_operand is None else g.ints(axes_operand, "axes of Slice")
    steps = [1] * len(starts) if steps_operand is None else g.ints(steps_operand, "steps of Slice")
    wrapped = wrap_axes(axes, call.rank())
    for axis, start, end, step in zip(wrapped, starts, ends, steps, strict=True):
        size = x.type.shape[axis]
        x = g.slice(x, axis, *_clamped(start, end, step, size), step)
    return x


def _clamped(start: Dim, end: Dim, step: int, size: Dim) -> tuple[Dim, Dim]:
    if step == 0:
        raise InvalidModel("a step is 0")
    low, high = (0, size) if step > 0 else (-1, size - 1)
    return _bound(start, size, low, high), _bound(end, size, low, high)


def _bound(place: Dim, size: Dim, low: int, high: Dim) -> Dim:
    """`place`, which counts from the end when negative, clamped to low..high."""
    if isinstance(place, int) and abs(place) >= _ENDLESS:
        return high if place > 0 else low
    least, most = bounds(place)
    if most is not None and most < 0:
        place = place + size
    elif least is None or least < 0:
        raise UnsupportedOp(
            f"a bound of Slice is {place}, which may be negative or not; fix the sizes in it when "
            "compiling, with --shape NAME=1x128"
        )
    return minimum(maximum(place, low), high)


def constant_of_shape(call: Call) -> Operand:
    shape = call.g.dims(call.input(0), "the shape of ConstantOfShape")
    value = np.asarray(call.attr("value", np.zeros(1, np.float32))).reshape(())
    return call.g.broadcast_to(call.g.constant(value), shape)


def arange(call: Call) -> Operand:
    start, limit, delta = (call.input(i) for i in range(3))
    dtype = start.type.dtype
    if dtype.is_float:
        return _float_range(call)
    (first,) = call.g.dims(start, "the start of Range")
    (last,) = call.g.dims(limit, "the limit of Range")
    (step,) = call.g.ints(delta, "the step of Range")
    if step == 0:
        raise InvalidModel("the step of Range is 0")
    span = last - first if step > 0 else first - last
    length = maximum(ceildiv(span, abs(step)), 0)
    return call.g.add("iota", [], start=first, step=step, length=length, dtype=dtype)


def _float_range(call: Call) -> Operand:
    data = [x.data for x in call.present()]
    if any(d is None for d in data):
        raise UnsupportedOp("Range of floats that are not constant is not supported")
    start, limit, step = (float(np.asarray(d).item()) for d in data)
    if step == 0 or not abs((limit - start) / step) < _MAX_FLOAT_RANGE:
        raise InvalidModel(f"Range from {start} to {limit} by {step} is not a small vector")
    return call.g.constant(np.arange(start, limit, step).astype(call.dtype().numpy))


def tile(call: Call) -> Operand:
    """Each axis becomes [1, size], is broadcast to [repeats, size] and flattened again."""
    repeats = call.g.dims(call.input(1), "the repeats of Tile")
    x, shape = call.input(0), call.shape()
    if len(repeats) != len(shape):
        raise InvalidModel(f"{len(repeats)} repeats for {len(shape)} axes")
    if all(r == 1 for r in repeats):
        return x
    pairs: list[Dim] = [d for size in shape for d in (1, size)]
    wide: list[Dim] = [d for pair in zip(repeats, shape, strict=True) for d in pair]
    spread = call.g.broadcast_to(call.g.reshape(x, pairs), tuple(wide))
    return call.g.reshape(spread, [r * d for r, d in zip(repeats, shape, strict=True)])


def pad(call: Call) -> Operand:
    mode = call.attr("mode", "constant")
    if mode != "constant":
        raise UnsupportedOp(f"Pad with mode {mode!r} is not supported, only 'constant'")
    pads = call.g.dims(call.input(1), "the pads of Pad")
    axes_operand = call.optional(3)
    axes = range(call.rank()) if axes_operand is None else call.g.ints(axes_operand, "axes of Pad")
    wrapped = wrap_axes(axes, call.rank())
    if len(pads) != 2 * len(wrapped):
        raise InvalidModel(f"{len(pads)} pads for {len(wrapped)} axes")
    before: list[Dim] = [0] * call.rank()
    after: list[Dim] = [0] * call.rank()
    for i, axis in enumerate(wrapped):
        before[axis], after[axis] = pads[i], pads[i + len(wrapped)]
    value = _pad_value(call)
    attrs = {"pads_before": tuple(before), "pads_after": tuple(after), "value": value}
    return call.g.add("pad", [call.input(0)], **attrs)


def _pad_value(call: Call) -> float:
    operand = call.optional(2)
    if operand is None:
        return 0.0
    data = operand.data
    if isinstance(operand, Known) or data is None:
        raise UnsupportedOp("Pad with a value that is not constant is not supported")
    return float(np.asarray(data).reshape(()))


def eye_like(call: Call) -> Operand:
    rows, cols = call.shape()
    to = call.attr("dtype", None)
    dtype = call.dtype() if to is None else dtype_of(to, "EyeLike")
    iotas = [
        call.g.add("iota", [], start=start, step=1, length=length, dtype=DType.I64)
        for start, length in ((call.attr("k", 0), rows), (0, cols))
    ]
    equal = call.g.add("equal", [call.g.reshape(iotas[0], [rows, 1]), iotas[1]])
    return call.g.cast(equal, dtype)


SHAPE: dict[str, Converter] = {
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Expand": expand,
    "EyeLike": eye_like,
    "Flatten": flatten,
    "Pad": pad,
    "Range": arange,
    "Reshape": reshape,
    "Shape": shape_of,
    "Size": size_of,
    "Slice": slices,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
