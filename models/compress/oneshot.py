"""Prunes a whole encoder in one shot, from calibration text without labels.

Layers go in order, and in a layer q, k, v, then the attention's output, then the FFN's two
linears. Each is pruned and refitted (`obs.py`) on the inputs that it gets in the model pruned so
far, towards what it should give in the dense one: later linears make up for the errors of earlier
ones. The two linears that are added to the residual stream make up for the stream's error too:
their target is the dense model's sum less the pruned model's stream. Inputs and targets are
centred, and where there is a bias it takes the means.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from sparsec.errors import InvalidInput
from sparsec.models.compress.obs import (
    Problem,
    block_grid,
    keep_best,
    obs_scores,
    refit,
)
from sparsec.models.compress.pattern import BlockPattern
from sparsec.models.compress.sites import LayerParts, encoder_linears, layer_parts, model_inputs

Batch = Mapping[str, torch.Tensor]

# Linears of a layer that have one input, in the order in which they are computed, and the linear
# whose input is the residual stream that their output is added to.
GROUPS: tuple[tuple[tuple[str, ...], str | None], ...] = (
    (("query", "key", "value"), None),
    (("attention_output",), "query"),
    (("ffn_in",), None),
    (("ffn_out",), "ffn_in"),
)
# The norm whose input is a linear's output plus the residual stream.
SUMS = {"attention_output": "attention_norm", "ffn_out": "output_norm"}
# Tokens whose products are summed in float32 before they go into a float64 sum.
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class PrunedSite:
    """What happened to one linear; `error` is in units of its centred targets' squares."""

    name: str
    sparsity: float
    error: float


@dataclass(frozen=True, slots=True)
class _Plan:
    """What `prune_one_shot` was asked for."""

    names: Mapping[int, str]  # by the identity of a linear
    pattern: BlockPattern
    sparsity: Mapping[str, float]
    kept: Mapping[str, torch.Tensor]
    progress: Callable[[PrunedSite], None]


def prune_one_shot(
    model: nn.Module,
    batches: Iterable[Batch],
    pattern: BlockPattern,
    sparsity: float | Mapping[str, float],
    *,
    reference: nn.Module | None = None,
    kept: Mapping[str, torch.Tensor] | None = None,
    progress: Callable[[PrunedSite], None] = lambda site: None,
) -> dict[str, torch.Tensor]:
    """Prune the encoder linears of `model` in place; return the blocks that each keeps, by name.

    `batches` are calibration texts: `input_ids` and `attention_mask`, int64 `[rows, seq]`, and
    what else the model takes; real tokens count, and some ten for each input channel should be
    there. `sparsity` is the share of empty blocks, of all linears or of each one named (the
    others stay as they are). `reference` gives the targets (None: `model` as it comes in).
    `kept`, bool `[out / rows, in / cols]` by name, are masks to start from: no other block
    comes back. Raises `InvalidInput` for blocks that do not divide a linear, an unknown name, a
    sparsity below that of `kept`, or no text.
    """
    linears = encoder_linears(model)
    shares = dict(sparsity) if isinstance(sparsity, Mapping) else dict.fromkeys(linears, sparsity)
    _check(linears, pattern, shares)
    names = {id(linear): name for name, linear in linears.items()}
    plan = _Plan(names, pattern, shares, kept or {}, progress)
    teacher = copy.deepcopy(model) if reference is None else reference
    masks: dict[str, torch.Tensor] = {}
    with torch.no_grad(), _quiet(model), _quiet(teacher):
        texts = tuple(batches)
        calls, targets = _first_layer(model, texts), _first_layer(teacher, texts)
        for parts, wanted in zip(layer_parts(model), layer_parts(teacher), strict=True):
            dense, targets = _targets(teacher.get_submodule(wanted.name), wanted, targets)
            layer = model.get_submodule(parts.name)
            for fields, stream in GROUPS:
                masks |= _prune_group(plan, layer, parts, calls, dense, fields, stream)
            calls = calls.after(layer)
    return {name: masks[name] for name in linears if name in masks}


class _Stop(Exception):
    """Ends a forward pass as soon as all that is wanted of it was seen."""


@dataclass(frozen=True, slots=True)
class _Calls:
    """How a layer is called on each batch.

    `real` bool `[rows, seq]` marks tokens that are no padding, `hidden [rows, seq, channels]` is
    the first argument, `others` the rest of them, the same for every layer.
    """

    real: tuple[torch.Tensor, ...]
    hidden: tuple[torch.Tensor, ...]
    others: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

    def run(self, layer: nn.Module) -> Iterator[torch.Tensor | None]:
        """Yield the layer's output for each batch, None where it was stopped."""
        for hidden, (args, kwargs) in zip(self.hidden, self.others, strict=True):
            try:
                result = layer(hidden, *args, **kwargs)
            except _Stop:
                yield None
            else:
                yield result[0] if isinstance(result, tuple) else result

    def after(self, layer: nn.Module) -> _Calls:
        """Return the calls of the next layer."""
        return _Calls(self.real, tuple(self.run(layer)), self.others)

    def tokens(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Join `[rows, seq, channels]` of all batches to `[tokens, channels]` of float32."""
        return torch.cat([v[real].float() for v, real in zip(values, self.real, strict=True)])


def _first_layer(model: nn.Module, texts: tuple[Batch, ...]) -> _Calls:
    """Return how `model` calls its first layer on the texts."""
    layer = model.get_submodule(layer_parts(model)[0].name)
    device = next(model.parameters()).device
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Stop

    if not texts:
        raise InvalidInput("one-shot pruning: no calibration text came; give some thousand tokens")
    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for text in texts:
            with suppress(_Stop):
                model(
                    **{key: value.to(device) for key, value in model_inputs(model, text).items()}
                )
    finally:
        hook.remove()
    real = tuple(text["attention_mask"].to(device).bool() for text in texts)
    return _Calls(real, tuple(a[0] for a, _ in seen), tuple((a[1:], k) for a, k in seen))


def _targets(
    layer: nn.Module, parts: LayerParts, calls: _Calls
) -> tuple[dict[str, torch.Tensor], _Calls]:
    """Return what the linears of a dense layer give, `[tokens, out]`, and the next calls.

    For a linear that is added to the residual stream it is the sum.
    """
    with ExitStack() as stack:
        seen = {}
        for fields, stream in GROUPS:
            for field in fields:
                site = getattr(parts, field if stream is None else SUMS[field])
                seen[field] = stack.enter_context(_recorded(site, output=stream is None))
        following = calls.after(layer)
    return {field: calls.tokens(values) for field, values in seen.items()}, following


def _prune_group(
    plan: _Plan,
    layer: nn.Module,
    parts: LayerParts,
    calls: _Calls,
    dense: Mapping[str, torch.Tensor],
    fields: tuple[str, ...],
    stream: str | None,
) -> dict[str, torch.Tensor]:
    """Prune linears of one input; return the blocks that they keep, by name."""
    with ExitStack() as stack:
        streams = stack.enter_context(_recorded(getattr(parts, stream or fields[0])))
        inputs = stack.enter_context(_recorded(getattr(parts, fields[0]), stop=True))
        list(calls.run(layer))
    x = calls.tokens(inputs)
    masks = {}
    for field in fields:
        linear = getattr(parts, field)
        name = plan.names[id(linear)]
        if name in plan.sparsity:
            target = dense[field] if stream is None else dense[field] - calls.tokens(streams)
            masks[name] = _prune_linear(plan, name, linear, x, target)
    return masks


def _prune_linear(
    plan: _Plan, name: str, linear: nn.Linear, x: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Prune and refit one linear on inputs `[tokens, in]` and targets `[tokens, out]`."""
    centred = linear.bias is not None
    x_mean = x.double().mean(0) * centred
    t_mean = target.double().mean(0) * centred
    x, target = x - x_mean.float(), target - t_mean.float()
    hessian, cross = _products(x, x), _products(target, x)
    problem = Problem.of(linear.weight, hessian, cross)
    scores = obs_scores(problem, plan.pattern.rows, plan.pattern.cols, kept=plan.kept.get(name))
    kept = keep_best(scores, plan.sparsity[name])
    weight = refit(problem, kept)
    _set_weight(linear, weight)
    if centred:
        linear.bias.copy_(t_mean - weight @ x_mean)
    energy = float(target.square().sum(dtype=torch.float64))
    rest = energy + float(((weight @ hessian - 2 * cross) * weight).sum())
    plan.progress(PrunedSite(name, 1 - float(kept.double().mean()), rest / max(energy, 1e-30)))
    return kept


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `sum over tokens a b^T`, float64, of `[tokens, .]` in float32."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for i in range(0, len(a), TOKENS_AT_ONCE):
        total += a[i : i + TOKENS_AT_ONCE].T @ b[i : i + TOKENS_AT_ONCE]
    return total


def _set_weight(linear: nn.Linear, weight: torch.Tensor) -> None:
    if parametrize.is_parametrized(linear, "weight"):
        linear.parametrizations.weight.original.copy_(weight)
    else:
        linear.weight.copy_(weight)


def _check(
    linears: Mapping[str, nn.Linear], pattern: BlockPattern, sparsity: Mapping[str, float]
) -> None:
    for name, share in sparsity.items():
        if name not in linears:
            raise InvalidInput(
                f"{name} is no linear of the encoder; they are {', '.join(linears)}"
            )
        if not 0.0 <= share < 1.0:
            raise InvalidInput(f"{name}: sparsity {share:g} is not from 0 to below 1")
        try:
            block_grid(linears[name].weight.shape, pattern.rows, pattern.cols)
        except InvalidInput as error:
            raise InvalidInput(f"{name}: {error}") from None


@contextmanager
def _recorded(
    site: nn.Module, *, output: bool = False, stop: bool = False
) -> Iterator[list[torch.Tensor]]:
    """Collect a module's first input, or its output, of every call; `stop` ends the pass."""
    seen: list[torch.Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        if stop:
            raise _Stop

    def behind(_: nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> None:
        seen.append(result)

    hook = site.register_forward_hook(behind) if output else site.register_forward_pre_hook(before)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Switch dropout and bfloat16 off for a while."""
    training = model.training
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        model.train(training)
