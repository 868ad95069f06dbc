"""ONNX Conv. The patch embedding of images is a product; every other convolution is an op."""

from __future__ import annotations

from typing import Any

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend.builder import Operand
from sparsec.frontend.call import Call, Converter
from sparsec.ir.dims import Dim, floordiv, product


def conv(call: Call) -> Operand:
    x, w, bias = call.input(0), call.input(1), call.optional(2)
    if call.rank() < 3 or call.rank(1) != call.rank():
        raise InvalidModel(f"x has {call.rank()} axes and w {call.rank(1)}; both need 3 or more")
    kernel = tuple(d for d in call.shape(1)[2:] if isinstance(d, int))
    if len(kernel) != call.rank() - 2:
        raise UnsupportedOp("a kernel whose size is not known is not supported")
    call.g.equal(call.shape()[1], call.shape(1)[1] * int(call.attr("group", 1)))
    attrs = _attributes(call, kernel)
    _require_room(call, attrs, kernel)
    if _is_patches(attrs, kernel):
        return _patches(call, x, w, bias, kernel)
    return call.g.add("conv", [x, w, bias], **attrs)


def _attributes(call: Call, kernel: tuple[int, ...]) -> dict[str, Any]:
    axes = len(kernel)
    strides = tuple(call.attr("strides", (1,) * axes))
    dilations = tuple(call.attr("dilations", (1,) * axes))
    pads = tuple(call.attr("pads", (0,) * (2 * axes)))
    if not len(strides) == len(dilations) == axes or len(pads) != 2 * axes:
        raise InvalidModel("strides, dilations and pads are not one per spatial axis")
    begins, ends = pads[:axes], pads[axes:]
    same = str(call.attr("auto_pad", "NOTSET"))
    if same.startswith("SAME"):
        spread = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
        sizes = zip(call.shape()[2:], spread, strides, strict=True)
        totals = [_same_padding(*one) for one in sizes]
        small, large = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        begins, ends = (small, large) if same == "SAME_UPPER" else (large, small)
    if min(*strides, *dilations) < 1 or min(*begins, *ends) < 0:
        raise InvalidModel(
            f"strides {strides}, dilations {dilations} or pads {pads} are too small"
        )
    return {
        "strides": strides,
        "dilations": dilations,
        "begins": begins,
        "ends": ends,
        "groups": int(call.attr("group", 1)),
    }


def _require_room(call: Call, attrs: dict[str, Any], kernel: tuple[int, ...]) -> None:
    """Sizes that are known are checked when types are inferred, the others in every run."""
    pads = [b + e for b, e in zip(attrs["begins"], attrs["ends"], strict=True)]
    sizes = zip(call.shape()[2:], kernel, attrs["dilations"], pads, strict=True)
    for size, k, dilation, pad in sizes:
        if not isinstance(size, int):
            missing = dilation * (k - 1) + 1 - pad - size
            reason = f"the kernel of {call.g.name!r} is larger than its padded input"
            call.g.graph.add_limit(missing, 0, reason)


def _same_padding(size: Dim, spread: int, stride: int) -> int:
    """How much padding makes ceil(size / stride) results."""
    if stride == 1:
        return spread - 1
    if not isinstance(size, int):
        raise UnsupportedOp("auto_pad with strides on a size that is not known is not supported")
    return max((-(-size // stride) - 1) * stride + spread - size, 0)


def _is_patches(attrs: dict[str, Any], kernel: tuple[int, ...]) -> bool:
    """Whether the kernel is put beside itself: no element is read twice."""
    plain = not any((*attrs["begins"], *attrs["ends"])) and set(attrs["dilations"]) == {1}
    return plain and attrs["groups"] == 1 and attrs["strides"] == kernel


def _patches(
    call: Call, x: Operand, w: Operand, bias: Operand | None, kernel: tuple[int, ...]
) -> Operand:
    """Cut into patches of `channels * kernel` numbers, a matrix product, channels in front again.

    [b, c, h * p, w * q]  ->  [b, h * w, c * p * q] @ [c * p * q, m]  ->  [b, m, h, w]
    """
    g, axes = call.g, len(kernel)
    counts: list[Dim] = [floordiv(d, k) for d, k in zip(call.shape()[2:], kernel, strict=True)]
    for axis, (count, k) in enumerate(zip(counts, kernel, strict=True), start=2):
        x = g.slice(x, axis, 0, count * k)  # what no whole patch covers is not read
    batch, channels = g.shape(x)[:2]
    rows, *depth = (d for d in g.shape(w) if isinstance(d, int))
    pairs = [d for pair in zip(counts, kernel, strict=True) for d in pair]
    apart = g.reshape(x, (batch, channels, *pairs))
    perm = (0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
    size, patches = product(depth), product(counts)
    flat = g.reshape(g.transpose(apart, perm), (batch, patches, size))
    y = g.add("matmul", [flat, g.transpose(g.reshape(w, (rows, size)), (1, 0))])
    if bias is not None:
        y = g.add("add", [y, bias])
    return g.reshape(g.transpose(y, (0, 2, 1)), (batch, rows, *counts))


CONV: dict[str, Converter] = {"Conv": conv}
