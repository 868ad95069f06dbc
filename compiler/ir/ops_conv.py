"""Convolution: any number of spatial axes, strides, dilations, groups and zero padding."""

from __future__ import annotations

import numpy as np

from sparsec.errors import InvalidGraph
from sparsec.ir.dims import Dim, floordiv
from sparsec.ir.op_helpers import (
    Env,
    array,
    is_positive,
    operand,
    optional,
    optional_array,
    require_equal,
    require_float,
    same_dtype,
)
from sparsec.ir.op_spec import Array, Arrays, Attrs, OpSpec, Types
from sparsec.ir.types import TensorType


def conv_size(size: Dim, kernel: int, stride: int, dilation: int, pads: tuple[int, int]) -> Dim:
    """The length of a result's axis: how often the kernel, spread by `dilation`, fits."""
    return floordiv(size + (sum(pads) - dilation * (kernel - 1) - 1), stride) + 1


def _infer_conv(types: Types, attrs: Attrs) -> list[TensorType]:
    x, w, bias = operand(types, 0), operand(types, 1), optional(types, 2)
    require_float(x)
    dtype = same_dtype([t for t in (x, w, bias) if t is not None])
    groups, axes = attrs["groups"], x.rank - 2
    if axes < 1 or w.rank != x.rank:
        raise InvalidGraph(f"needs x [batch, channels, ...] and w of its rank, got {x} and {w}")
    if not all(isinstance(d, int) for d in w.shape):
        raise InvalidGraph(f"the kernel {w} has a size that is not known")
    rows, channels, *kernel = (d for d in w.shape if isinstance(d, int))
    require_equal("channels of x and w", x.shape[1], channels * groups)
    if rows % groups or (bias is not None and bias.shape != (rows,)):
        raise InvalidGraph(f"{groups} groups or bias {bias} do not fit the kernel {w}")
    if not all(len(attrs[n]) == axes for n in ("strides", "dilations", "begins", "ends")):
        raise InvalidGraph(f"strides, dilations and pads are not one per spatial axis of {x}")
    pads = zip(attrs["begins"], attrs["ends"], strict=True)
    sizes = zip(x.shape[2:], kernel, attrs["strides"], attrs["dilations"], pads, strict=True)
    shape = tuple(conv_size(*one) for one in sizes)
    if not all(is_positive(d) or not isinstance(d, int) for d in shape):
        raise InvalidGraph(f"the kernel {w} is larger than the padded {x}")
    return [TensorType(dtype, (x.shape[0], rows, *shape))]


def _evaluate_conv(arrays: Arrays, attrs: Attrs, env: Env) -> list[Array]:
    x, w, bias = array(arrays, 0), array(arrays, 1), optional_array(arrays, 2)
    groups, axes = attrs["groups"], x.ndim - 2
    pads = [(0, 0), (0, 0), *zip(attrs["begins"], attrs["ends"], strict=True)]
    wide = np.float32 if x.dtype == np.float16 else x.dtype
    padded = np.pad(x, pads).astype(wide)
    spread = [d * (k - 1) + 1 for d, k in zip(attrs["dilations"], w.shape[2:], strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, spread, tuple(range(2, x.ndim)))
    places = tuple(slice(None, None, s) for s in attrs["strides"])
    inside = tuple(slice(None, None, d) for d in attrs["dilations"])
    windows = windows[(slice(None), slice(None), *places, *inside)]
    parts = []
    for group in range(groups):
        rows = w[group * len(w) // groups : (group + 1) * len(w) // groups].astype(wide)
        taken = windows[:, group * w.shape[1] : (group + 1) * w.shape[1]]
        over = [1, *range(2 + axes, 2 + 2 * axes)]
        parts.append(np.tensordot(taken, rows, (over, [1, *range(2, 2 + axes)])))
    y = np.moveaxis(np.concatenate(parts, -1), -1, 1)
    if bias is not None:
        y = y + bias.astype(wide).reshape(-1, *[1] * axes)
    return [np.ascontiguousarray(y.astype(x.dtype))]


_ATTRS = ("strides", "dilations", "begins", "ends", "groups")
CONV_OPS = {"conv": OpSpec("conv", _infer_conv, _evaluate_conv, _ATTRS)}
