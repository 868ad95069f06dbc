"""What a student learns from its teacher: logits, hidden states, attention relations, embeddings
and how similar those of different rows are.

Every loss is a mean over real tokens (or rows) and has no unit, so that one set of weights serves
models of any width and depth.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from sparsec.models.compress.recipe import Distillation
from sparsec.models.compress.sites import LayerParts, layer_parts, model_inputs

Tensor = Any

# Cosines that differ by it cost 1: as a rule, half of the spread that those of a batch have.
SIMILARITY_UNIT = 0.1


@dataclass(frozen=True, slots=True)
class Seen:
    """One forward pass: outputs by name, hidden states, and q, k, v of the last layer.

    Hidden states are [rows, seq, channels], the embeddings' first; q, k, v [rows, seq, channels].
    """

    outputs: Mapping[str, Tensor]
    hidden: tuple[Tensor, ...]
    relations: tuple[Tensor, ...]
    heads: int


class Observed:
    """A model together with what is needed to see inside it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._last: LayerParts = layer_parts(model)[-1]

    def __call__(self, batch: Mapping[str, Tensor], weights: Distillation) -> Seen:
        """Run the model on the inputs in `batch`."""
        feed = model_inputs(self.model, batch)
        with self._relations(weights.relations > 0) as kept:
            result = self.model(**feed, output_hidden_states=True)
        outputs = {k: v for k, v in result.items() if isinstance(v, torch.Tensor)}
        hidden = tuple(result.hidden_states)
        outputs.setdefault("last_hidden_state", hidden[-1])
        return Seen(outputs, hidden, tuple(kept), self._last.heads)

    @contextlib.contextmanager
    def _relations(self, wanted: bool) -> Iterator[list[Tensor]]:
        kept: list[Tensor] = []
        parts = (self._last.query, self._last.key, self._last.value) if wanted else ()
        handles = [p.register_forward_hook(lambda _m, _i, out: kept.append(out)) for p in parts]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()


def losses(student: Seen, teacher: Seen, mask: Tensor, weights: Distillation) -> dict[str, Tensor]:
    """Return the parts that look at the teacher, unweighted; `mask` is [rows, seq] of 0 and 1."""
    parts: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: _outputs_loss(student, teacher, mask, weights.temperature),
        "hidden": lambda: hidden_loss(student.hidden, teacher.hidden, mask),
        "relations": lambda: relation_loss(student, teacher, mask),
        "embedding": lambda: embedding_loss(student.hidden[-1], teacher.hidden[-1], mask),
        "similarity": lambda: similarity_loss(student.hidden[-1], teacher.hidden[-1], mask),
    }
    return {name: part() for name, part in parts.items() if getattr(weights, name) > 0}


def total(parts: Mapping[str, Tensor], weights: Distillation) -> Tensor:
    """Return the weighted sum of the parts."""
    return sum(getattr(weights, name) * part for name, part in parts.items())


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened classes x T^2 (Hinton et al., arXiv 1503.02531)."""
    return temperature**2 * functional.kl_div(
        functional.log_softmax(student.float() / temperature, dim=-1),
        functional.log_softmax(teacher.float() / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def _outputs_loss(student: Seen, teacher: Seen, mask: Tensor, temperature: float) -> Tensor:
    """The logits of a classifier, or both of a span finder, whose classes are the tokens."""
    names = [name for name in teacher.outputs if name.endswith("logits")]
    terms = []
    for name in names:
        ours, theirs = student.outputs[name], teacher.outputs[name]
        if ours.shape == mask.shape:  # [rows, seq]: padding is no class
            lowest = -1e4
            ours, theirs = (x.float().masked_fill(mask == 0, lowest) for x in (ours, theirs))
        terms.append(logits_loss(ours, theirs, temperature))
    return sum(terms) / len(terms) if terms else mask.new_zeros((), dtype=torch.float32)


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Squared error of the layers' outputs, relative to the teacher's variance; mean over layers.

    Layer i of n looks at the teacher's layer i * m / n, so a teacher may be m / n times as deep.
    """
    depth, deeper = len(student) - 1, len(teacher) - 1
    real = mask.flatten().nonzero().flatten()  # once: a GPU waits for the number of them
    terms = []
    for i in range(1, depth + 1):
        ours = student[i].flatten(0, 1)[real].float()
        theirs = teacher[round(i * deeper / depth)].flatten(0, 1)[real].float()
        spread = theirs.var(dim=0, unbiased=False).mean().clamp_min(1e-6)
        terms.append(((ours - theirs) ** 2).mean() / spread)
    return sum(terms) / depth


def relation_loss(student: Seen, teacher: Seen, mask: Tensor) -> Tensor:
    """Divergence of q-q, k-k and v-v relations in the last layer (MiniLMv2, arXiv 2012.15828).

    Both sides are cut into the same number of heads: the teacher's, or as many as divide the
    student's width too.
    """
    terms = [
        _relation_divergence(ours, theirs, mask, math.gcd(teacher.heads, ours.shape[-1]))
        for ours, theirs in zip(student.relations, teacher.relations, strict=True)
    ]
    return sum(terms) / len(terms)


def _relation_divergence(ours: Tensor, theirs: Tensor, mask: Tensor, heads: int) -> Tensor:
    hidden_keys = (mask == 0)[:, None, None, :]
    logs = []
    for x in (ours, theirs):
        rows, seq, channels = x.shape
        split = x.float().reshape(rows, seq, heads, channels // heads).transpose(1, 2)
        scores = split @ split.transpose(2, 3) / (channels // heads) ** 0.5
        logs.append(functional.log_softmax(scores.masked_fill(hidden_keys, -1e4), dim=-1))
    divergence = functional.kl_div(logs[0], logs[1], reduction="none", log_target=True).sum(-1)
    real = mask[:, None, :].float().expand_as(divergence)
    return (divergence * real).sum() / real.sum()


def embedding_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """1 - cosine of the mean-pooled last hidden states, mean over rows."""
    ours, theirs = mean_pooled(student, mask), mean_pooled(teacher, mask)
    return (1.0 - functional.cosine_similarity(ours, theirs, dim=-1)).mean()


def similarity_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared error of the cosines between the rows' mean-pooled last hidden states.

    Mean over pairs of rows, in units of SIMILARITY_UNIT; 0 for a single row. What embeddings are
    used for, and more pairs than rows (after Tung and Mori, arXiv 1907.09682). Student and
    teacher may differ in width.
    """
    ours, theirs = (_cosines(mean_pooled(hidden, mask)) for hidden in (student, teacher))
    pairs = max(len(mask) * (len(mask) - 1), 1)  # both orders; a row is as its teacher to itself
    return ((ours - theirs) / SIMILARITY_UNIT).square().sum() / pairs


def _cosines(embeddings: Tensor) -> Tensor:
    """Return the cosine of every pair of rows: [rows, channels] -> [rows, rows]."""
    unit = functional.normalize(embeddings, dim=-1)
    with torch.autocast(unit.device.type, enabled=False):  # bf16 has 8 bits, for 0.99 too
        return unit @ unit.T


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over real tokens: [rows, seq, channels] -> [rows, channels]."""
    weights = mask[..., None].float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)
