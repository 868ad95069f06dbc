"""One stage of training: the loop, its checkpoints, and going on after a kill.

What a step computes depends on the seed, the step and the state before it alone: batches are a
function of (seed, epoch), and a checkpoint holds weights, optimiser and random state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsec.errors import CompilerError
from sparsec.models.compress import checkpoint
from sparsec.models.compress.data import Batch, Encoded, batches
from sparsec.models.compress.distil import Observed, losses, total
from sparsec.models.compress.prune import masked_sparsity
from sparsec.models.compress.recipe import Distillation
from sparsec.models.compress.runlog import RunLog
from sparsec.models.compress.tasks import Task, evaluate

Tensor = Any

LOG_EVERY = 20  # steps
GRADIENT_NORM = 1.0  # gradients are scaled down to it


@dataclass(frozen=True, slots=True)
class Device:
    """Where and how to compute: products in bf16 (autocast) when `bf16`, sums in fp32."""

    name: str
    bf16: bool

    def autocast(self) -> Any:
        """Return the context in which forward passes run."""
        return torch.autocast(self.name, torch.bfloat16, enabled=self.bf16)

    def put(self, batch: Batch) -> Batch:
        """Move a batch to the device."""
        return {name: tensor.to(self.name) for name, tensor in batch.items()}


@dataclass(frozen=True, slots=True)
class Source:
    """Examples to train on: `at(epoch)` gives those of an epoch."""

    name: str
    at: Callable[[int], Encoded]
    labelled: bool


@dataclass(frozen=True, slots=True)
class Tightening:
    """When the pattern gets sparser: `to(progress)` at `times` moments of the first `until`.

    `to` returns the sparsity that it reached; `stop` locks the pattern.
    """

    to: Callable[[float], float]
    times: int
    until: float
    start: Callable[[], None] = lambda: None
    stop: Callable[[], None] = lambda: None

    def progress(self, step: int, steps: int) -> float | None:
        """Return how far the schedule is when this step is one of its moments, else None."""
        window = self.window(steps)
        if step >= window:
            return None
        now, before = (-(-done * self.times // window) for done in (step + 1, step))
        return now / self.times if now != before else None

    def window(self, steps: int) -> int:
        """Return the step from which on the pattern is locked."""
        return max(round(self.until * steps), 1)


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage trains, on what, for how long."""

    name: str
    sources: Sequence[Source]
    epochs: float  # of all sources together
    learning_rate: float
    weights: Distillation
    tokens_per_batch: int  # padded tokens
    seed: int
    warmup: float = 0.06  # share of the steps in which the rate rises from 0; then it falls to 0
    weight_decay: float = 0.01
    scale_rate: float = 10.0  # learning rate of quantisation scales, relative
    evaluations: int = 4  # on dev, evenly spread, the last one at the end
    tightening: Tightening | None = None


@dataclass
class Trainer:
    """Runs a stage on `student`; its parameters that require gradients are trained."""

    stage: Stage
    student: Any
    teacher: Any | None
    task: Task
    dev: Encoded
    folder: Path
    log: RunLog
    device: Device
    scales: Sequence[Any] = ()  # parameters of quantisation
    tell: Callable[[str, int, int], None] = lambda text, step, steps: None
    checkpoint_seconds: float = 120.0
    _sparsity: float = field(default=0.0, init=False)

    def run(self) -> dict[str, float]:
        """Train to the end, from the last checkpoint if there is one; returns dev metrics.

        The student has its best weights then (by dev, of those with the final pattern).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._final.exists():
            state = checkpoint.load(self._final, self.device.name)
            self.student.load_state_dict(state["model"])
            return dict(state["dev"])
        dev = self._train(self._resume())
        checkpoint.save(self._final, {"model": self.student.state_dict(), "dev": dev})
        for leftover in (self._part, self._best):
            leftover.unlink(missing_ok=True)
        return dev

    @property
    def _part(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def _best(self) -> Path:
        return self.folder / "best.pt"

    @property
    def _final(self) -> Path:
        return self.folder / "final.pt"

    @cached_property
    def _plan(self) -> list[tuple[int, int, list[int]]]:
        """Every step's epoch, source and examples, in order."""
        plan: list[tuple[int, int, list[int]]] = []
        whole = int(np.ceil(self.stage.epochs))
        for epoch in range(whole):
            steps = self._epoch(epoch)
            share = min(self.stage.epochs - epoch, 1.0)
            plan += steps[: max(round(share * len(steps)), 1)]
        return plan

    def _epoch(self, epoch: int) -> list[tuple[int, int, list[int]]]:
        steps = []
        for number, source in enumerate(self.stage.sources):
            encoded = source.at(epoch)
            seed = self.stage.seed + 1000 * number
            for indices in batches(encoded.lengths, self._tokens(encoded), seed=seed, epoch=epoch):
                steps.append((epoch, number, indices))
        order = np.random.default_rng([self.stage.seed, epoch]).permutation(len(steps))
        return [steps[i] for i in order]

    def _tokens(self, encoded: Encoded) -> int:
        return max(self.stage.tokens_per_batch // encoded.rows_per_example, 1)

    @cached_property
    def _optimizer(self) -> Any:
        scales = {id(p) for p in self.scales}
        trained = [p for p in self.student.parameters() if p.requires_grad]
        weights = [p for p in trained if p.ndim > 1 and id(p) not in scales]
        others = [p for p in trained if p.ndim <= 1 and id(p) not in scales]
        groups = [
            {"params": weights, "weight_decay": self.stage.weight_decay, "relative": 1.0},
            {"params": others, "weight_decay": 0.0, "relative": 1.0},
            {"params": list(self.scales), "weight_decay": 0.0, "relative": self.stage.scale_rate},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, fused=True)

    def _rate(self, step: int) -> float:
        steps = len(self._plan)
        rising = max(round(self.stage.warmup * steps), 1)
        share = (step + 1) / rising if step < rising else (steps - step) / max(steps - rising, 1)
        return self.stage.learning_rate * share

    def _resume(self) -> int:
        """Load the checkpoint; returns the step to go on from."""
        torch.manual_seed(self.stage.seed)
        if not self._part.exists():
            self._sparsity = masked_sparsity(self.student)
            self.log.rewind(self.stage.name, -1)
            return 0
        state = checkpoint.load(self._part, self.device.name)
        self.student.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        if self.device.name == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"].cpu())
        self._sparsity = float(state["sparsity"])
        self.log.rewind(self.stage.name, int(state["step"]) - 1)
        return int(state["step"])

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "model": self.student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "sparsity": self._sparsity,
        }
        if self.device.name == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state()
        checkpoint.save(self._part, state)

    def _train(self, start: int) -> dict[str, float]:
        steps, tightening = len(self._plan), self.stage.tightening
        moments = self._evaluation_steps(steps)
        if tightening is not None and start < tightening.window(steps):
            tightening.start()
        saved = began = time.monotonic()
        for step in range(start, steps):
            self._tighten(step, steps)
            parts = self._step(step)
            evaluated = step + 1 in moments
            if step % LOG_EVERY == 0 or evaluated or step + 1 == steps:
                numbers = self._numbers(step, parts)
                self._report(step, numbers, time.monotonic() - began, evaluated)
            if time.monotonic() - saved > self.checkpoint_seconds:
                self._numbers(step, parts)  # so that no checkpoint holds what is no number
                self._save(step + 1)
                saved = time.monotonic()
        if self._best.exists():
            self.student.load_state_dict(checkpoint.load(self._best, self.device.name)["model"])
        if tightening is not None:
            tightening.stop()
        return self.evaluate()

    def _tighten(self, step: int, steps: int) -> None:
        tightening = self.stage.tightening
        if tightening is None:
            return
        progress = tightening.progress(step, steps)
        if progress is not None:
            self._sparsity = tightening.to(progress)
        elif step == tightening.window(steps):
            tightening.stop()

    def _evaluation_steps(self, steps: int) -> set[int]:
        times = self.stage.evaluations
        return {round(steps * (i + 1) / times) for i in range(times)}

    def _step(self, step: int) -> dict[str, Tensor]:
        """Take one step; returns the losses and the gradient's norm, not waiting for a GPU."""
        epoch, number, indices = self._plan[step]
        source = self.stage.sources[number]
        batch = self.device.put(source.at(epoch).batch(indices))
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(step) * group["relative"]
        parts = self._losses(batch, source.labelled)
        loss = total(parts, self.stage.weights)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), GRADIENT_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "norm": norm, **{k: v.detach() for k, v in parts.items()}}

    def _numbers(self, step: int, parts: dict[str, Tensor]) -> dict[str, float]:
        """Return the losses; CompilerError for a step since the last call that went wrong.

        What is no number stays in the weights, so no step needs to be looked at by itself.
        """
        found = {name: part.item() for name, part in parts.items()}
        if not math.isfinite(found.pop("norm")):
            raise CompilerError(
                f"{self.stage.name}: the loss is no number at step {step}; "
                "try a lower learning rate"
            )
        return found

    def _losses(self, batch: Batch, labelled: bool) -> dict[str, Tensor]:
        weights = self.stage.weights
        self.student.train()
        with self.device.autocast():
            seen = self._observed(batch, weights)
            parts = {}
            if weights.needs_teacher:
                with torch.no_grad():
                    wanted = self._observed_teacher(batch, weights)
                parts = losses(seen, wanted, batch["attention_mask"], weights)
            if labelled and weights.labels > 0:
                hard = self.task.loss(seen.outputs, batch)
                if hard is not None:
                    parts["labels"] = hard
        return parts

    @cached_property
    def _observed(self) -> Observed:
        return Observed(self.student)

    @cached_property
    def _observed_teacher(self) -> Observed:
        assert self.teacher is not None, self.stage
        return Observed(self.teacher.eval())

    def _report(self, step: int, parts: dict[str, float], seconds: float, evaluated: bool) -> None:
        line: dict[str, Any] = {
            "stage": self.stage.name,
            "step": step,
            "steps": len(self._plan),
            "loss": parts.pop("loss"),
            "losses": parts,
            "sparsity": round(self._sparsity, 4),
            "lr": self._rate(step),
            "seconds": round(seconds, 2),
        }
        if evaluated:
            line["dev"] = dev = self.evaluate()
            self._keep_best(step, dev[self.task.metric])
        self.log.append(line)
        shown = f"{self.stage.name}: loss {line['loss']:.4f}, sparsity {line['sparsity']:.2f}"
        if evaluated:
            shown += f", dev {self.task.metric} {dev[self.task.metric]:.4f}"
        self.tell(shown, step + 1, len(self._plan))

    def _keep_best(self, step: int, value: float) -> None:
        """Store the weights if they are the best so far of those that have the final pattern."""
        if not self._is_final(step):
            return
        lines = self.log.lines()
        earlier = [
            line["dev"][self.task.metric]
            for line in lines
            if line["stage"] == self.stage.name and "dev" in line and self._is_final(line["step"])
        ]
        if all(value > other for other in earlier):
            checkpoint.save(self._best, {"model": self.student.state_dict()})

    def _is_final(self, step: int) -> bool:
        tightening = self.stage.tightening
        steps = len(self._plan)
        return tightening is None or step >= min(tightening.window(steps), steps - 1)

    def evaluate(self) -> dict[str, float]:
        """Return the task's metrics of the student on dev, computed in fp32."""
        return evaluate_model(self.student, self.task, self.dev, self.device)


def evaluate_model(model: Any, task: Task, encoded: Encoded, device: Device) -> dict[str, float]:
    """Return the metrics of `model` on the examples of `encoded`, computed in fp32."""
    observed, nothing = Observed(model), Distillation()

    def run(arrays: dict[str, Any]) -> dict[str, Any]:
        batch = device.put({name: torch.from_numpy(array) for name, array in arrays.items()})
        outputs = observed(batch, nothing).outputs
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    was_training = model.training
    model.eval()
    with torch.no_grad():
        metrics = evaluate(run, task, encoded)
    model.train(was_training)
    return metrics
