"""Quantisation-aware training: rounds in torch what the compiled int8 model rounds.

    weight of an encoder linear     s8, a learned scale per row, after its mask: zeros stay zeros
    what the linears read           u8, a learned scale and zero point per tensor
    queries, keys, values           u8 around 128, a learned scale each
    probabilities of attention      255 steps of the largest of each query
    large embedding tables          s8, a scale per row

Sums, the residual stream, layer norm, GELU, small tables, pooler and heads stay fp32, as in
`sparsec compile --precision int8`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from sparsec.errors import InvalidInput
from sparsec.models.compress.plain import make_plain
from sparsec.models.compress.rounding import (
    ROUNDING,
    AttentionRounding,
    Rounding,
    RowRounding,
    WeightRounding,
    rounded_attention,
)
from sparsec.models.compress.sites import (
    embedding_parts,
    encoder_linears,
    layer_parts,
    model_inputs,
)
from sparsec.ranges import Observation, choose_range

ATTENTION = "sparsec_int8"
ATTENTION_INPUT = "input_rounding"  # of the module that holds q, k and v
TABLE_BYTES = 4 << 20  # of fp32: the compiler leaves smaller tables in fp32


def prepare(
    model: nn.Module, *, attention: bool = True, table_bytes: int = TABLE_BYTES
) -> list[nn.Parameter]:
    """Attach fake quantisation to an encoder; returns the parameters of its scales.

    Embedding tables of `table_bytes` of fp32 or more are rounded too.
    They are logarithms of scales and shares of a range: one learning rate (1e-3 or less) serves
    all, weight decay must be 0. Activations are NaN until `calibrate` or `load_state_dict`.
    Raises InvalidInput for an unknown encoder, or one that is prepared already.
    """
    if _roundings(model):
        raise InvalidInput("this model is prepared for quantisation already")
    linears = quantised_linears(model)
    names = {linear: name for name, linear in linears.items()}
    for layer in layer_parts(model):
        reader = model.get_submodule(names[layer.query].rpartition(".")[0])
        _round_input(reader, ATTENTION_INPUT)
        if attention:
            reader.add_module(ROUNDING, AttentionRounding())
    readers = {id(m) for p in layer_parts(model) for m in (p.query, p.key, p.value)}
    for linear in linears.values():
        if id(linear) not in readers:
            _round_input(linear, ROUNDING)
        rounding = WeightRounding(linear.out_features)
        parametrize.register_parametrization(linear, "weight", rounding)
    for table in embedding_parts(model).tables:
        if table.weight.nbytes >= table_bytes:
            rows = RowRounding()
            table.add_module(ROUNDING, rows)
            table.register_forward_hook(rows.round_result)
    device = next(iter(linears.values())).bias.device
    for module in _roundings(model):
        module.to(device)
    if attention:
        AttentionInterface.register(ATTENTION, rounded_attention)
        AttentionMaskInterface.register(ATTENTION, eager_mask)
        model.float_attention = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)
    return scale_parameters(model)


def quantised_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears that are computed in int8, by name: the encoder's, and its projection."""
    projection = embedding_parts(model).projection
    found = {n: m for n, m in model.named_modules() if m is projection and m is not None}
    return {**found, **encoder_linears(model)}


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the learned scales and zero points of a prepared model, in model order."""
    return [p for module in _roundings(model) for p in module.parameters(recurse=False)]


def calibrate(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, method: str = "mse"
) -> None:
    """Set the scales: weights by least squared error, activations by what `batches` make them.

    `method` is one of `sparsec.ranges.METHODS`. Padding tokens do not count. Raises InvalidInput
    without a batch, and for values that are not finite.
    """
    for linear in quantised_linears(model).values():
        _fit_weight(linear)
    observed = {
        module: _Observer() for module in _roundings(model) if isinstance(module, Rounding)
    }
    training = model.training
    model.eval()
    try:
        with enabled(model, False), torch.no_grad():
            for module, observer in observed.items():
                module.observer = observer
            for batch in batches:
                _observe(model, batch, observed.values())
    finally:
        model.train(training)
        for module in observed:
            module.observer = None
    for module, observer in observed.items():
        module.set_range(*choose_range(observer.seen, method))


@contextlib.contextmanager
def enabled(model: nn.Module, value: bool) -> Iterator[None]:
    """Switch all fake quantisation of a model on or off for the length of a `with`."""
    before = [(module, module.active) for module in _roundings(model)]
    for module, _ in before:
        module.active = value
    try:
        yield
    finally:
        for module, active in before:
            module.active = active


def bake(model: nn.Module) -> None:
    """Leave plain fp32 weights, masked but not rounded; removes all that `prepare` attached."""
    with enabled(model, False):
        for linear in quantised_linears(model).values():
            make_plain(linear)
    for module in list(model.modules()):
        for name in (ROUNDING, ATTENTION_INPUT):
            rounding = module._modules.get(name)
            if isinstance(rounding, Rounding | AttentionRounding | RowRounding):
                del module._modules[name]
                remove_hook(module, rounding)
    if hasattr(model, "float_attention"):
        model.set_attn_implementation(model.float_attention)
        del model.float_attention


class _Observer:
    """A histogram of the real tokens of what one rounding reads."""

    def __init__(self) -> None:
        self.seen = Observation()
        self.real: Any = None  # bool [batch, seq]

    def __call__(self, x: Tensor) -> None:
        kept = x[self.real].float().cpu().numpy()
        if not np.isfinite(kept).all():
            raise InvalidInput("the calibration data make an activation infinite or NaN")
        self.seen = self.seen.including(kept)


def _observe(
    model: nn.Module, batch: Mapping[str, Tensor], observers: Iterable[_Observer]
) -> None:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in model_inputs(model, batch).items()}
    for observer in observers:
        observer.real = inputs["attention_mask"] != 0
    model(**inputs)


def _fit_weight(linear: nn.Linear) -> None:
    *before, rounding = linear.parametrizations.weight
    weight = linear.parametrizations.weight.original
    with torch.no_grad():
        for parametrization in before:
            weight = parametrization(weight)
    rounding.fit(weight)


def _roundings(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Rounding | WeightRounding | RowRounding)]


def _round_input(module: nn.Module, name: str) -> None:
    rounding = Rounding()
    module.add_module(name, rounding)
    module.register_forward_pre_hook(rounding.round_first, with_kwargs=True)


def remove_hook(module: nn.Module, rounding: nn.Module) -> None:
    """Undo the registration of a method of `rounding` as a hook of `module`."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__self__", None) is rounding:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
