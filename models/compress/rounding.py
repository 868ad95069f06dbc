"""Fake quantisation with learned scales: QuantizeLinear, then DequantizeLinear, in fp32.

    y = (clamp(round(x / scale) + zero_point, lowest, highest) - zero_point) * scale

Rounding is half to even. Gradients are those of LSQ (Esser et al., "Learned Step Size
Quantization", arXiv 1902.08153, section 2.1): rounding passes them on, clamping stops them, and
the scale gets g * (round(x / scale) - x / scale) of each value inside the range and g times the
level of the end of each outside. What is learned is the logarithm of a scale, so that one
learning rate serves scales of any size (Jain et al., "Trained Quantization Thresholds", arXiv
1903.08066, section 3), and the zero point as a share of the 255 steps, rounded whenever it is
used: values outside the range alone move it. LSQ's factor 1 / sqrt(values * levels), which
balances scales and weights in plain gradient descent, is left out: Adam's steps do not depend on
it, but its epsilon would swallow gradients so small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

ROUNDING = "rounding"  # the submodule that rounds what its owner reads or gives
WEIGHT_LEVELS = 127  # of each sign: -128 is not used
LEVELS = 255  # steps of u8
CENTRE = 128  # the zero point of attention's operands
PIECE = 1 << 16  # values that are rounded at once: their temporaries stay in a core's cache
SMALLEST = 1e-30  # a range below this is all zero: its scale would underflow
# Of a row's largest weight that becomes 127 steps; the first best one wins.
_FRACTIONS = tuple(1.0 - i / 80 for i in range(41))


class Round(torch.autograd.Function):  # type: ignore[misc]
    """`apply(x, log_scale, zero_share)` -> fp32 of the shape of x, which is fp32.

    u8 with one scale where `zero_share` is a tensor; -127..127 with a scale per row of a matrix
    where it is None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, zero_share: Tensor | None) -> Tensor:
        scale = log_scale.exp()
        ctx.save_for_backward(x, scale, zero_share)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        zero_point = None if zero_share is None else _zero_point(zero_share)
        for part, step, level in zip(_pieces(x), _scales(scale, x), _pieces(result), strict=True):
            torch.div(part, step, out=level).round_()
            if zero_point is None:
                level.clamp_(-WEIGHT_LEVELS, WEIGHT_LEVELS)
            else:
                level.add_(zero_point).clamp_(0, LEVELS).sub_(zero_point)
            level.mul_(step)
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_share = ctx.saved_tensors
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        pieces = zip(_pieces(x), _scales(scale, x), _pieces(g), _pieces(result), strict=True)
        if zero_share is None:
            totals = [_weight_gradient(*piece) for piece in pieces]
            return result, torch.cat(totals) * scale, None
        zero_point = _zero_point(zero_share)
        totals = [_value_gradient(*piece, zero_point) for piece in pieces]
        for_scale, for_zero = torch.stack(totals).sum(0) * scale
        return result, for_scale, for_zero * LEVELS


def _weight_gradient(x: Tensor, scale: Tensor, g: Tensor, result: Tensor) -> Tensor:
    """Write the gradient of rows of a weight; returns that of their scales, `[rows, 1]`."""
    steps = x / scale
    level = steps.round()
    _where_inside(g, level, -WEIGHT_LEVELS, WEIGHT_LEVELS, result)
    level.clamp_(-WEIGHT_LEVELS, WEIGHT_LEVELS).mul_(g)
    return level.sub_(steps.mul_(result)).sum(-1, keepdim=True)


def _value_gradient(
    x: Tensor, scale: Tensor, g: Tensor, result: Tensor, zero_point: Tensor
) -> Tensor:
    """Write the gradient of values; returns those of scale and zero point, `[2]`."""
    steps = x / scale
    level = steps.round().add_(zero_point)
    _where_inside(g, level, 0, LEVELS, result)
    level.clamp_(0, LEVELS).sub_(zero_point)
    for_scale = _dot(g, level) - _dot(result, steps)
    return torch.stack([for_scale, result.sum() - g.sum()])


def _where_inside(g: Tensor, level: Tensor, lowest: int, highest: int, result: Tensor) -> None:
    """Write g where a level is inside, else 0: torch's own for strictly between two bounds."""
    torch.ops.aten.hardtanh_backward.grad_input(
        g, level, lowest - 0.5, highest + 0.5, grad_input=result
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _rows(x: Tensor) -> int:
    """How many rows are computed at once: on a CPU as many as its cache holds."""
    on_cpu = x.device.type == "cpu"
    return max(1, int(PIECE // x.shape[-1] if on_cpu else x.numel()))


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = x.reshape(-1, x.shape[-1]).split(_rows(x))
    return pieces


def _scales(scale: Tensor, x: Tensor) -> Iterable[Tensor]:
    """The scale of each piece: one for all, or those of its rows."""
    return itertools.repeat(scale, len(_pieces(x))) if scale.dim() == 0 else scale.split(_rows(x))


class RoundProbabilities(torch.autograd.Function):  # type: ignore[misc]
    """`apply(scores)` -> softmax over the last axis as the int8 attention kernel stores it.

    exp(score - largest) in whole steps of 1/255, divided by their sum; gradients as of a softmax.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        steps = (scores - scores.amax(-1, keepdim=True)).exp_().mul_(LEVELS).round_()
        shares = steps.div_(steps.sum(-1, keepdim=True))
        ctx.save_for_backward(shares)
        return shares

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (shares,) = ctx.saved_tensors
        weighted = g * shares
        return weighted.sub_(shares * weighted.sum(-1, keepdim=True))


class Rounding(nn.Module):  # type: ignore[misc]
    """Rounds an activation to u8 with one scale; NaN until `set_range` or a loaded state.

    `symmetric` fixes the zero point at 128, as attention wants its operands.
    """

    def __init__(self, *, symmetric: bool = False) -> None:
        super().__init__()
        self.active = True
        self.observer: Any = None  # told what comes, which is not rounded then
        self.symmetric = symmetric
        self.log_scale = nn.Parameter(torch.tensor(math.nan))
        share = torch.tensor(CENTRE / LEVELS)
        if symmetric:
            self.register_buffer("zero_share", share)
        else:
            self.zero_share = nn.Parameter(share)

    @property
    def scale(self) -> float:
        """The step, as `forward` uses it."""
        return float(self.log_scale.detach().cpu().exp())

    @property
    def zero_point(self) -> int:
        """The number that stands for zero, as `forward` uses it."""
        return int(_zero_point(self.zero_share.detach().cpu()))

    def set_range(self, low: float, high: float) -> None:
        """Store `low..high`, widened to hold 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        span = 2 * max(-low, high) if self.symmetric else high - low
        levels = 2 * WEIGHT_LEVELS if self.symmetric else LEVELS
        scale = 1.0 if span < SMALLEST else span / levels
        with torch.no_grad():
            self.log_scale.fill_(math.log(scale))
            if not self.symmetric:
                self.zero_share.fill_(round(-low / scale) / LEVELS)

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(x)
            return x
        if not self.active:
            return x
        if torch.onnx.is_in_onnx_export():
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, LEVELS)
        return Round.apply(x.float(), self.log_scale, self.zero_share)

    def round_first(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Round a module's first argument; a forward pre-hook with keywords."""
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self(kwargs["hidden_states"])}


class WeightRounding(nn.Module):  # type: ignore[misc]
    """A parametrization that rounds `weight[rows, columns]` to s8 with a scale per row."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.active = True
        self.log_scale = nn.Parameter(torch.zeros(rows, 1))

    @property
    def scale(self) -> Tensor:
        """fp32 `[rows]` on the CPU, as `forward` uses it."""
        return self.log_scale.detach().cpu().exp().reshape(-1)

    def fit(self, weight: Tensor) -> None:
        """Take the scales of least squared error; 1 for a row of zeros."""
        weight = weight.detach().float()
        most = weight.abs().amax(1, keepdim=True)
        full = torch.where(most < SMALLEST, torch.ones_like(most), most / WEIGHT_LEVELS)
        best, least = full, torch.full_like(full, math.inf)
        for fraction in _FRACTIONS:
            scale = full * fraction
            stored = (weight / scale).round_().clamp_(-WEIGHT_LEVELS, WEIGHT_LEVELS).mul_(scale)
            error = stored.sub_(weight).square_().sum(1, keepdim=True)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        with torch.no_grad():
            self.log_scale.copy_(best.log())

    def forward(self, weight: Tensor) -> Tensor:
        if not self.active:
            return weight
        return Round.apply(weight.float(), self.log_scale, None)


class RowRounding(nn.Module):  # type: ignore[misc]
    """Rounds the rows that a table gives as the compiler stores the table: s8, a scale per row."""

    def __init__(self) -> None:
        super().__init__()
        self.active = True

    def round_result(self, module: nn.Module, args: Any, rows: Tensor) -> Tensor:
        """Round what a look-up gives, `[..., channels]`; a forward hook."""
        if not self.active:
            return rows
        levels, scale = rounded_rows(rows.detach())
        return rows + (levels * scale - rows).detach()


def rounded_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 `[..., channels]` -> whole steps in fp32, and the fp32 scale of each row `[..., 1]`."""
    most = rows.abs().amax(-1, keepdim=True)
    scale = torch.where(most < SMALLEST, torch.ones_like(most), most / WEIGHT_LEVELS)
    return (rows.double() / scale).round().float(), scale


class AttentionRounding(nn.Module):  # type: ignore[misc]
    """What the int8 attention kernel rounds: queries, keys, values and probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.probabilities = True
        self.query = Rounding(symmetric=True)
        self.key = Rounding(symmetric=True)
        self.value = Rounding(symmetric=True)

    @property
    def operands(self) -> tuple[Rounding, Rounding, Rounding]:
        return self.query, self.key, self.value

    def softmax(self, scores: Tensor) -> Tensor:
        """fp32 probabilities, rounded unless rounding is off; ONNX files get a plain softmax."""
        plain = self.query.observer is not None or not (self.query.active and self.probabilities)
        if plain or torch.onnx.is_in_onnx_export():
            return _plain_softmax(scores)
        return RoundProbabilities.apply(scores.float())


def rounded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention as transformers wants it of an implementation, through `module.rounding`.

    q, k and v are `[batch, heads, seq, head_size]`, the mask is added to the scores; returns
    `[batch, seq, heads, head_size]` and the probabilities `[batch, heads, seq, seq]`.
    """
    rounding = getattr(module, ROUNDING, None)
    if rounding is not None:  # a teacher may share the configuration that names this function
        query, key, value = (
            round_operand(x.transpose(1, 2)).transpose(1, 2)  # as it lies in memory
            for round_operand, x in zip(rounding.operands, (query, key, value), strict=True)
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    softmax = _plain_softmax if rounding is None else rounding.softmax
    probabilities = softmax(scores)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    context = torch.matmul(probabilities, value)
    return context.transpose(1, 2).contiguous(), probabilities


def _plain_softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores.float(), dim=-1)


def _zero_point(zero_share: Tensor) -> Tensor:
    return (zero_share * LEVELS).round().clamp(0, LEVELS)
