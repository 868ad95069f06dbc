"""Reorders channels where that is free, so that blocks keep more of the weight.

    rows of ffn_in        <->  columns of ffn_out
    rows of q             <->  rows of k, inside each head
    rows of v             <->  columns of o, inside each head
    the residual stream:  embeddings, norms, columns of q, k, v, ffn_in, rows of o, ffn_out, and
                          what reads the last layer; one order for the whole model

The model computes what it did before; only the stream's order can be seen, in hidden states. A
block `rows x cols` survives pruning when its sum of squares is among the largest of its linear.
Orders are found greedily, a group of channels that share blocks at a time: from the largest
channel left, always the one with the most weight in the columns that the group would keep. Then
pairs of channels change places while the kept weight grows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils import parametrize

from sparsec.errors import InvalidInput
from sparsec.models.compress.pattern import BlockPattern
from sparsec.models.compress.sites import (
    LayerParts,
    embedding_parts,
    encoder_linears,
    layer_parts,
)

# Rounds of swaps; gains are below 1e-4 of the weight after some twenty.
SWAP_ROUNDS = 50
# Gains below this share of the weight are rounding.
LEAST_GAIN = 1e-7
# Linears after the last layer, by the end of their names: those that read the residual stream,
# and those that read another linear where there is one of the first kind.
STREAM_READERS = ("pooler.dense", "pre_classifier", "classifier.dense", "qa_outputs")
LAST_LINEARS = ("classifier", "classifier.out_proj")


@dataclass(frozen=True, slots=True)
class Permuted:
    """Share of each linear's saliency in the blocks that magnitude pruning keeps, by name.

    `stream[i]` is the old place of the residual stream's channel i; None when it was left alone.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    stream: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class _View:
    """One linear as the channels to be ordered see it.

    `values [channels, blocks]`: their shares of the linear's saliency, summed over the other
    side's blocks; `size` neighbours share their blocks. All groups together keep `share`.
    """

    values: torch.Tensor
    size: int
    share: float

    def sums(self, order: torch.Tensor) -> torch.Tensor:
        """Return what each group of channels holds in each block `[groups, blocks]`."""
        return self.values[order].view(-1, self.size, self.values.shape[1]).sum(1)

    def kept(self, order: torch.Tensor) -> torch.Tensor:
        """Return 1 for blocks that survive, else 0, `[groups, blocks]`."""
        sums = self.sums(order)
        count = sums.numel() - round((1 - self.share) * sums.numel())
        best = sums.flatten().argsort(descending=True, stable=True)[:count]
        return torch.zeros(sums.numel()).index_fill_(0, best, 1.0).view(sums.shape)


@dataclass(frozen=True, slots=True)
class _Work:
    """The linears with their saliencies `[out, in]`, which are reordered along with them."""

    pattern: BlockPattern
    sparsity: float
    saliency: dict[int, torch.Tensor] = field(default_factory=dict)  # by identity of a linear

    def row_view(self, linear: nn.Linear) -> _View:
        """Output channels share blocks of `rows`."""
        return self._view(self.saliency[id(linear)], self.pattern.rows, self.pattern.cols)

    def column_view(self, linear: nn.Linear) -> _View:
        """Input channels share blocks of `cols`."""
        return self._view(self.saliency[id(linear)].T, self.pattern.cols, self.pattern.rows)

    def _view(self, values: torch.Tensor, size: int, other: int) -> _View:
        channels, across = values.shape
        sums = values.reshape(channels, across // other, other).sum(2)
        return _View(sums / sums.sum().clamp_min(1e-30), size, 1 - self.sparsity)

    def kept(self, linear: nn.Linear) -> float:
        """Return the share of a linear's saliency that pruning keeps now."""
        view = self.row_view(linear)
        order = torch.arange(len(view.values))
        return float((view.sums(order) * view.kept(order)).sum(dtype=torch.float64))

    def order_rows(self, linear: nn.Linear, order: torch.Tensor) -> None:
        """Reorder output channels."""
        _reorder(linear.weight, 0, order)
        if linear.bias is not None:
            _reorder(linear.bias, 0, order)
        if id(linear) in self.saliency:
            self.saliency[id(linear)] = self.saliency[id(linear)][order]

    def order_columns(self, linear: nn.Linear, order: torch.Tensor) -> None:
        """Reorder input channels."""
        _reorder(linear.weight, 1, order)
        if id(linear) in self.saliency:
            self.saliency[id(linear)] = self.saliency[id(linear)][:, order]


def permute(
    model: nn.Module,
    pattern: BlockPattern,
    sparsity: float,
    *,
    residual: bool,
    saliency: Mapping[str, torch.Tensor] | None = None,
) -> Permuted:
    """Reorder channels of `model` in place for pruning every linear to `sparsity` in blocks.

    With `residual` the stream is reordered too, and with it the channels of hidden states;
    pooled outputs and logits stay. `saliency` gives each encoder linear's worth of weights,
    `[out, in]`, not negative (None: their squares). Raises `InvalidInput` for blocks that do
    not divide a linear, for masks that are already there, and for parts that are not known.
    """
    linears = encoder_linears(model)
    layers = layer_parts(model)
    work = _Work(pattern, sparsity)
    for name, linear in linears.items():
        pattern.check(name, tuple(linear.weight.shape))
        if parametrize.is_parametrized(linear):
            raise InvalidInput(f"{name} has a mask already; permute channels before pruning")
        values = linear.weight.detach().square() if saliency is None else saliency[name]
        work.saliency[id(linear)] = values.float().cpu()
    for layer in layers:
        _check_layer(model, layer)
    readers = _stream_readers(model) if residual else []
    before = {name: work.kept(linear) for name, linear in linears.items()}
    with torch.no_grad():
        stream = _stream_order(work, layers) if residual else None
        if stream is not None:
            _apply_to_stream(work, model, layers, readers, stream)
        for layer in layers:
            _order_layer(work, layer)
    after = {name: work.kept(linear) for name, linear in linears.items()}
    return Permuted(before, after, None if stream is None else tuple(stream.tolist()))


def _order_layer(work: _Work, layer: LayerParts) -> None:
    inner = len(layer.ffn_in.weight)
    order = _best_order([work.row_view(layer.ffn_in), work.column_view(layer.ffn_out)], inner)
    work.order_rows(layer.ffn_in, order)
    work.order_columns(layer.ffn_out, order)

    head = len(layer.query.weight) // layer.heads
    order = _best_order([work.row_view(layer.query), work.row_view(layer.key)], head)
    work.order_rows(layer.query, order)
    work.order_rows(layer.key, order)

    views = [work.row_view(layer.value), work.column_view(layer.attention_output)]
    order = _best_order(views, head)
    work.order_rows(layer.value, order)
    work.order_columns(layer.attention_output, order)


def reorder_stream(model: nn.Module, order: Sequence[int]) -> None:
    """Bring the residual stream into an order that `permute` returned for a model like this one.

    Raises `InvalidInput` when `order` is none of the stream's channels.
    """
    layers = layer_parts(model)
    channels = len(layers[0].ffn_out.weight)
    if sorted(order) != list(range(channels)):
        raise InvalidInput(f"the order is no permutation of the stream's {channels} channels")
    work = _Work(BlockPattern(1, 1), 0.0)  # no saliency is kept in step
    with torch.no_grad():
        _apply_to_stream(work, model, layers, _stream_readers(model), torch.tensor(order))


def _stream_order(work: _Work, layers: Sequence[LayerParts]) -> torch.Tensor:
    """Return the order of the residual stream in which blocks keep most."""
    sources, uses = _stream_linears(layers)
    views = [work.row_view(s) for s in sources] + [work.column_view(u) for u in uses]
    return _best_order(views, len(sources[0].weight))


def _stream_linears(layers: Sequence[LayerParts]) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """Return the encoder linears that write to the residual stream, and those that read it."""
    writers = [linear for x in layers for linear in (x.attention_output, x.ffn_out)]
    return writers, [linear for x in layers for linear in (x.query, x.key, x.value, x.ffn_in)]


def _apply_to_stream(
    work: _Work, model: nn.Module, layers: Sequence[LayerParts], readers: list[nn.Linear],
    order: torch.Tensor,
) -> None:  # fmt: skip
    writers, uses = _stream_linears(layers)
    for linear in writers:
        work.order_rows(linear, order)
    for linear in [*uses, *readers]:
        work.order_columns(linear, order)
    norms = [norm for x in layers for norm in (x.attention_norm, x.output_norm)]
    embeddings = embedding_parts(model)
    if embeddings.projection is not None:
        work.order_rows(embeddings.projection, order)
    else:
        norms.append(embeddings.norm)
        for table in embeddings.tables:
            _reorder(table.weight, 1, order)
    for norm in norms:
        _reorder(norm.weight, 0, order)
        _reorder(norm.bias, 0, order)


def _best_order(views: list[_View], span: int) -> torch.Tensor:
    """Return an order of channels that keeps much; each stays in its span of neighbours."""
    channels = torch.arange(len(views[0].values))
    views = [view for view in views if view.size > 1]  # alone, any place is the same
    sizes = sorted({view.size for view in views}, reverse=True)
    orders = [_swapped(views, channels, span)]
    if sizes and all(a % b == 0 for a, b in pairwise([span, *sizes])):
        grown = torch.cat([_grown(views, sizes, members) for members in channels.split(span)])
        orders.append(_swapped(views, grown, span))
    return max(orders, key=lambda order: _kept(views, order))


def _kept(views: list[_View], order: torch.Tensor) -> float:
    return sum(float((view.sums(order) * view.kept(order)).sum()) for view in views)


def _grown(views: list[_View], sizes: list[int], members: torch.Tensor) -> torch.Tensor:
    """Order `members` into groups of the largest size, and each of them into smaller ones."""
    if not sizes or len(members) == 1:
        return members
    here = [
        (v.values[members], max(1, round(v.share * v.values.shape[1])))
        for v in views
        if v.size == sizes[0]
    ]
    weight = torch.stack([values.sum(1) for values, _ in here]).sum(0)
    free = torch.ones(len(members), dtype=torch.bool)
    groups = []
    for _ in range(len(members) // sizes[0]):
        chosen = [int(weight.masked_fill(~free, -1).argmax())]
        free[chosen] = False
        while len(chosen) < sizes[0]:
            gain = torch.zeros(len(members))
            for values, count in here:
                columns = values[chosen].sum(0).topk(count).indices
                gain += values[:, columns].sum(1)
            chosen.append(int(gain.masked_fill(~free, -1).argmax()))
            free[chosen[-1]] = False
        groups.append(_grown(views, sizes[1:], members[chosen]))
    return torch.cat(groups)


def _swapped(views: list[_View], order: torch.Tensor, span: int) -> torch.Tensor:
    """Swap pairs of channels of one span while what is kept grows.

    With the kept blocks held fast what is kept is linear in the channels, so that gains of
    swaps without a common channel add up; choosing the blocks anew can only add to that.
    """
    places = torch.arange(len(order))
    apart = places[:, None] // span != places // span
    order = order.clone()
    for _ in range(SWAP_ROUNDS):
        gain = torch.zeros(len(order), len(order))
        for view in views:
            group = places // view.size
            held = view.values[order] @ view.kept(order).T  # [places, groups]
            gain += held[:, group] - held[places, group][:, None]
        gain = (gain + gain.T).masked_fill_(apart, 0.0)
        best, partner = gain.max(1)
        mutual = (partner[partner] == places) & (places < partner) & (best > LEAST_GAIN)
        if not bool(mutual.any()):
            break
        first, second = places[mutual], partner[mutual]
        order[torch.cat([first, second])] = order[torch.cat([second, first])]
    return order


def _reorder(values: torch.Tensor, axis: int, order: torch.Tensor) -> None:
    values.copy_(values.index_select(axis, order.to(values.device)))


def _check_layer(model: nn.Module, layer: LayerParts) -> None:
    """Refuse weights in a layer that would have to be reordered and are not known."""
    known = {id(getattr(layer, name)) for name in LayerParts.__dataclass_fields__}
    for name, module in model.get_submodule(layer.name).named_modules():
        if id(module) not in known and next(module.parameters(recurse=False), None) is not None:
            raise InvalidInput(
                f"{layer.name}.{name} is not known; its channels cannot be permuted"
            )


def _stream_readers(model: nn.Module) -> list[nn.Linear]:
    """Return the linears that read the last layer; refuse what is not known."""
    inner = {id(linear) for linear in encoder_linears(model).values()}
    inner.add(id(embedding_parts(model).projection))
    outside = {
        f".{name}": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inner
    }
    readers = {
        n: m for n, m in outside.items() if n.endswith(tuple(f".{r}" for r in STREAM_READERS))
    }
    ends = tuple(f".{name}" for name in LAST_LINEARS)
    rest = [name for name in outside if name not in readers]
    for name in rest:
        if not name.endswith(ends):
            raise InvalidInput(
                f"{name[1:]} is not known to read the residual stream or not; "
                "permute without the residual stream"
            )
    if not readers:
        readers = {name: outside[name] for name in rest}
    return list(readers.values())
