"""All that one run of `sparsec compress` is asked for, checked; the only home of its defaults."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsec.errors import InvalidInput
from sparsec.models.registry import Head

CRITERIA = ("obs", "magnitude", "movement", "snip")
BUDGETS = ("layer", "global")
DEVICES = ("auto", "cpu", "cuda")
MOST = 2**31 - 1  # of any whole number


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates of the stages."""

    teacher: float = 1e-4
    prune: float = 2e-4
    tune: float = 2e-4
    quantise: float = 3e-5


@dataclass(frozen=True, slots=True)
class Epochs:
    """Passes over the stage's data; 0 leaves a stage out."""

    teacher: float = 2.0
    prune: float = 2.0
    tune: float = 2.0
    quantise: float = 1.0


@dataclass(frozen=True, slots=True)
class Distillation:
    """How much each loss counts in all stages but the teacher's; one of weight 0 is not computed.

    `temperature` softens the logits.
    """

    labels: float = 0.0
    logits: float = 0.0
    hidden: float = 1.0
    relations: float = 0.0
    embedding: float = 0.0
    similarity: float = 0.0
    temperature: float = 2.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss looks at a teacher."""
        return any((self.logits, self.hidden, self.relations, self.embedding, self.similarity))


DISTILLATION: dict[Head, Distillation] = {
    "none": Distillation(hidden=0.1, embedding=1.0, similarity=1.0),
    "classify": Distillation(labels=0.5, logits=1.0),
    "qa": Distillation(labels=0.5, logits=1.0),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One run: which model, task, data and pattern, and how long each stage takes.

    `block` is output x input channels, such as "16x1", or N:M; `sparsity` the share of cells that
    become zero, over the encoder's linear weights.
    """

    model: Path  # Hugging Face folder: config.json, safetensors, tokenizer.json
    task: str
    train: Path | None  # None: one_shot on `text`
    dev: Path
    output: Path
    block: str = "16x1"
    sparsity: float = 0.8
    text: tuple[Path, ...] = ()  # plain text to distil on, beside the task's own
    teacher: Path | None = None  # a tuned model to learn from, instead of tuning `model`
    start: Path | None = None  # a pruned folder to go on from: its zeros stay
    criterion: Literal["obs", "magnitude", "movement", "snip"] = "obs"
    budget: Literal["layer", "global"] = "layer"
    latency_ms: float | None = None  # of int8 on one core: layers get what sparsity that takes
    latency_tokens: int = 128  # batch x seq of the run that is meant
    permute: bool = True
    one_shot: bool = False
    quantise: bool = True
    epochs: Epochs = field(default_factory=Epochs)
    rates: Rates = field(default_factory=Rates)
    distillation: Distillation | None = None  # None: DISTILLATION of the task's head
    max_length: int = 128  # tokens of a row
    tokens_per_batch: int = 1536
    text_share: float = 1.0  # of the text that an epoch sees
    joined: bool = True  # also distil on phrases of `train` joined to sentence length
    prune_until: float = 0.5  # share of the prune stage in which the pattern changes
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0  # 0: all cores

    def __post_init__(self) -> None:
        for name, allowed in (
            ("criterion", CRITERIA), ("budget", BUDGETS), ("device", DEVICES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise InvalidInput(
                    f"{name} {getattr(self, name)!r}: wanted one of {', '.join(allowed)}"
                )
        if not 0.0 < self.sparsity < 1.0:
            raise InvalidInput(
                f"--sparsity {self.sparsity}: wanted a share between 0 and 1, such as 0.8"
            )
        for values in (self.epochs, self.rates, self.distillation or Distillation()):
            for name, value in asdict(values).items():
                if not 0.0 <= value < float("inf"):
                    raise InvalidInput(f"{name} {value}: wanted 0 or more")
        if self.distillation is not None and self.distillation.temperature == 0.0:
            raise InvalidInput("temperature 0: wanted more than 0")
        if not 0.0 < self.prune_until <= 1.0:
            raise InvalidInput(
                f"prune_until {self.prune_until}: wanted a share above 0, at most 1"
            )
        if not 0.0 < self.text_share <= 1.0:
            raise InvalidInput(f"text_share {self.text_share}: wanted a share above 0, at most 1")
        for name, least in (
            ("max_length", 8), ("tokens_per_batch", 8), ("seed", 0), ("threads", 0),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= MOST:
                raise InvalidInput(
                    f"{name} {getattr(self, name)}: wanted at least {least}, at most {MOST}"
                )
        if self.train is None and not (self.one_shot and self.text):
            raise InvalidInput("--train FILE is missing; only --one-shot with --text needs none")
        self._check_latency()

    def _check_latency(self) -> None:
        if self.latency_ms is None:
            return
        if not 0.0 < self.latency_ms < float("inf") or self.latency_tokens < 1:
            raise InvalidInput(
                f"--latency-ms {self.latency_ms} --latency-tokens {self.latency_tokens}: wanted "
                "more than 0"
            )
        if ":" in self.block or self.budget != "layer":
            raise InvalidInput(
                "--latency-ms gives every layer its own sparsity: it goes with blocks, such as "
                "16x1, and --budget layer"
            )

    def distillation_for(self, head: Head) -> Distillation:
        """Return the weights of the losses for a model with this head."""
        return self.distillation or DISTILLATION[head]

    def to_json(self) -> str:
        """Return the recipe as the text of recipe.json."""
        return json.dumps(asdict(self), indent=1, default=str) + "\n"

    def differences(self, text: str) -> list[str]:
        """Return the fields in which the recipe.json `text` differs, but where it was written."""
        try:
            there: dict[str, Any] = json.loads(text)
        except ValueError:
            return ["everything: recipe.json is not readable"]
        here = json.loads(self.to_json())
        harmless = {"output", "threads"}
        return [k for k in here if k not in harmless and here[k] != there.get(k)]
