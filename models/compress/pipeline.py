"""From a dense model and a task to a block-sparse, quantised ONNX file, stage by stage.

teacher -> permute -> prune -> tune -> quantise -> export. Every stage leaves what it made in the
output folder; a run that was killed goes on from there.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from sparsec.errors import InvalidInput
from sparsec.files import replacing
from sparsec.models.compress import export_qdq, mixing, prune, quantise
from sparsec.models.compress.data import Batch, Encoded, batches, load_tokenizer
from sparsec.models.compress.folders import load_model, save_model
from sparsec.models.compress.oneshot import prune_one_shot
from sparsec.models.compress.pattern import BlockPattern, parse_pattern, sparsity_of
from sparsec.models.compress.permute import permute, reorder_stream
from sparsec.models.compress.plain import bake
from sparsec.models.compress.recipe import Distillation, Recipe
from sparsec.models.compress.runlog import RunLog
from sparsec.models.compress.sites import (
    embedding_parts,
    encoder_linears,
    position_room,
    vocabulary,
)
from sparsec.models.compress.tasks import TASKS, Task, find_task
from sparsec.models.compress.train import (
    Device,
    Source,
    Stage,
    Tightening,
    Trainer,
    evaluate_model,
)
from sparsec.models.export import check_folder, export_file

Tell = Callable[[str, int, int], None]

SPARSITIES = "sparsities.json"  # of each linear, where they are not the recipe's one
STREAM = "stream.json"  # in `sparse`: the order of the residual stream's channels
A_BLOCK = 1e-3  # of sparsity: less than this is due to whole blocks
CALIBRATION_TOKENS = 16384  # for OBS and the first ranges of quantisation
OBS_STEPS = 6  # moments at which OBS prunes further
OTHER_STEPS = 60  # moments for the criteria that cost nothing
LABELS_ONLY = Distillation(labels=1.0, logits=0.0, hidden=0.0)


@dataclass(frozen=True, slots=True)
class Compressed:
    """What a run made. `dev` has metrics by stage, `layers` the sparsity of each linear;
    `positions` is the longest sequence that the model can take, None where nothing says so."""

    onnx: Path
    teacher: Path
    sparse: Path
    dev: dict[str, dict[str, float]]
    layers: dict[str, float]
    positions: int | None


def compress(
    recipe: Recipe,
    *,
    targets: Mapping[str, float] | None = None,
    tell: Tell = lambda text, step, steps: None,
) -> Compressed:
    """Run every stage that is not done yet.

    `targets` gives linears by name their own sparsity instead of `recipe.sparsity` for all.
    Raises InvalidInput for whatever is wrong with the recipe, its folders and its files.
    """
    run = _Run(recipe, targets, tell)
    run.check()
    teacher = run.teacher()
    dev = {"teacher": run.evaluate(teacher)}
    student = run.student(teacher)
    masks = run.pruned(student, teacher, dev)
    layers = {name: sparsity_of([mask.kept]) for name, mask in masks.items()}
    sparse = run.saved(student)
    onnx = run.exported(student, teacher, dev)
    return Compressed(onnx, run.teacher_folder, sparse, dev, layers, position_room(student))


@dataclass
class _Run:
    recipe: Recipe
    targets: Mapping[str, float] | None
    tell: Tell
    stream: list[int] | None = None  # old places of the residual stream's channels
    config: Any = None  # of the dense model

    @property
    def output(self) -> Path:
        return self.recipe.output

    @property
    def teacher_folder(self) -> Path:
        return self.recipe.teacher or self.output / "teacher"

    @cached_property
    def task(self) -> Task:
        return find_task(self.recipe.task)

    @cached_property
    def device(self) -> Device:
        name = self.recipe.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            raise InvalidInput("--device cuda: torch sees no CUDA device here; take cpu")
        bf16 = name == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return Device(name, bf16)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.recipe.model)

    @cached_property
    def train_data(self) -> Encoded | None:
        if self.recipe.train is None:
            return None
        return self.task.read(self.recipe.train, self.tokenizer, self.recipe.max_length)

    @cached_property
    def dev_data(self) -> Encoded:
        return self.task.read(self.recipe.dev, self.tokenizer, self.recipe.max_length)

    @cached_property
    def texts(self) -> list[Encoded]:
        read = TASKS["text"].read
        return [read(path, self.tokenizer, self.recipe.max_length) for path in self.recipe.text]

    @cached_property
    def log(self) -> RunLog:
        return RunLog(self.output / "log.jsonl")

    @cached_property
    def pattern(self) -> Any:
        return parse_pattern(self.recipe.block)

    def check(self) -> None:
        """Read all input before anything is trained; make the folder and keep the recipe."""
        torch.set_num_threads(self.recipe.threads or len(os.sched_getaffinity(0)))
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._check_pattern()
        _ = self.device, self.train_data, self.texts
        if not self.dev_data.targets:
            raise InvalidInput(f"{self.recipe.dev}: has nothing to score by; {self.task.name} "
                               "wants sentence pairs in a .csv file")  # fmt: skip
        for folder in filter(None, (self.recipe.teacher, self.recipe.start)):
            check_folder(folder)
        model, _missing = load_model(self.recipe.model, self.task, self.recipe.seed)
        for name, linear in encoder_linears(model).items():
            self.pattern.check(name, tuple(linear.weight.shape))
        self._check_tables(model, self.recipe.model)
        self._check_lessons()
        self.config = model.config
        self.output.mkdir(parents=True, exist_ok=True)
        with replacing(self.output / "recipe.json") as part:
            part.write_text(self.recipe.to_json(), encoding="utf-8")
        if self.targets is not None:
            text = json.dumps(dict(self.targets), indent=1)
            with replacing(self.output / SPARSITIES) as part:
                part.write_text(text + "\n", encoding="utf-8")

    def _check_pattern(self) -> None:
        """That what prunes can make the pattern, and that something prunes."""
        recipe, pattern = self.recipe, self.pattern
        if recipe.epochs.prune == 0 and not recipe.one_shot and recipe.start is None:
            raise InvalidInput(
                "--epochs prune=0: nothing would be pruned; leave it out, or give --one-shot or "
                "--start with a pruned model"
            )
        if isinstance(pattern, BlockPattern):
            return
        if recipe.criterion == "obs" or recipe.budget == "global" or recipe.one_shot:
            raise InvalidInput(
                f"--block {pattern}: N:M goes with --criterion magnitude, movement or snip, "
                "--budget layer, and without --one-shot"
            )
        if recipe.sparsity > pattern.most:
            raise InvalidInput(
                f"--sparsity {recipe.sparsity}: --block {pattern} has no more than "
                f"{pattern.most:g}; give that"
            )

    def _check_tables(self, model: Any, folder: Path) -> None:
        """That there is a row for every token and every position of the data."""
        room, words = position_room(model), vocabulary(model)
        every = (*filter(None, (self.train_data, self.dev_data)), *self.texts)
        longest = max(int(data.lengths.max(initial=0)) for data in every)
        if room is not None and longest > room:
            raise InvalidInput(
                f"--max-length {self.recipe.max_length}: there are rows of {longest} tokens, "
                f"{folder} can take {room}"
            )
        most = max(int(data.ids.max(initial=0)) for data in every)
        if most >= words:
            raise InvalidInput(
                f"{folder}: knows {words} tokens, and the tokenizer in {self.recipe.model} gives "
                f"the id {most}; both have to have the same vocabulary"
            )

    def _check_lessons(self) -> None:
        """That each source has something to be learned from."""
        weights = self.recipe.distillation_for(self.task.head)
        if weights.needs_teacher or self.recipe.one_shot:
            return
        silent = [s.name for s in self._sources(texts=True) if not s.labelled]
        if weights.labels == 0 or silent:
            what = f"{silent[0]}, which has no labels" if silent else "anything"
            raise InvalidInput(f"--distillation: nothing is learned from {what}; give a weight")

    def evaluate(self, model: Any) -> dict[str, float]:
        return evaluate_model(model, self.task, self.dev_data, self.device)

    def teacher(self) -> Any:
        """Load or tune the model that the student learns from."""
        ready = self.teacher_folder
        if self.recipe.teacher is not None or ready.is_dir():
            model, missing = load_model(ready, self.task, self.recipe.seed)
            if missing and self.task.head != "none":
                raise InvalidInput(
                    f"{ready}: has no weights for {', '.join(missing[:4])}; give a model that is "
                    f"tuned for {self.task.name}"
                )
            self._check_tables(model, ready)
            return model.to(self.device.name).eval()
        model, missing = load_model(self.recipe.model, self.task, self.recipe.seed)
        model = model.to(self.device.name)
        learns = (
            self.recipe.epochs.teacher > 0 and self.train_data is not None and self.task.has_labels
        )
        if missing and self.task.head != "none" and not learns:
            raise InvalidInput(
                f"{self.recipe.model}: has no weights for {', '.join(missing[:4])} and nothing "
                "to learn them from; give --train and epochs of the teacher, or a tuned --teacher"
            )
        if learns:
            stage = self._stage("teacher", self.recipe.rates.teacher, self.recipe.epochs.teacher)
            stage = replace(stage, weights=LABELS_ONLY, sources=stage.sources[:1])
            self._train(stage, model, None)
        save_model(model, self.recipe.model, ready)
        return model.eval()

    def student(self, teacher: Any) -> Any:
        """Return what is pruned: a copy of the teacher, or the pruned model to start from."""
        self._order_channels(teacher)
        if self.recipe.start is not None:
            student, _missing = load_model(self.recipe.start, self.task, self.recipe.seed)
        elif self._same_size(teacher):
            student = copy.deepcopy(teacher)
        else:
            student, _missing = load_model(self.recipe.model, self.task, self.recipe.seed)
        self._check_widths(student, teacher)
        student = student.to(self.device.name)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # the teacher has none either, and says the same each time
        for table in embedding_parts(student).tables:
            table.weight.requires_grad_(False)
        return student

    def _check_widths(self, student: Any, teacher: Any) -> None:
        ours, theirs = (model.config.hidden_size for model in (student, teacher))
        wanted = self.recipe.distillation_for(self.task.head)
        if ours != theirs and (wanted.hidden > 0 or wanted.embedding > 0):
            raise InvalidInput(
                f"the teacher has {theirs} hidden channels, the student {ours}: hidden states can "
                "not be compared; give --distillation hidden=0,embedding=0,relations=1"
            )

    def _order_channels(self, teacher: Any) -> None:
        """Bring the teacher's channels into an order in which blocks keep more of the weight.

        The student starts as its copy, so that their hidden states stay comparable. The residual
        stream is left alone where its order is to be seen in the model's output. A student that
        was pruned in another run keeps its order, and the teacher takes it.
        """
        recipe, start = self.recipe, self.recipe.start
        if start is not None:
            if (start / STREAM).is_file():
                self.stream = json.loads((start / STREAM).read_text(encoding="utf-8"))
                reorder_stream(teacher, self.stream)
            return
        if recipe.permute and isinstance(self.pattern, BlockPattern) and self._same_size(teacher):
            done = permute(
                teacher, self.pattern, recipe.sparsity, residual=self.task.head != "none"
            )
            self.stream = list(done.stream) if done.stream else None

    def _same_size(self, teacher: Any) -> bool:
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
        return all(
            getattr(self.config, n, None) == getattr(teacher.config, n, None) for n in names
        )

    def pruned(
        self, student: Any, teacher: Any, dev: dict[str, dict[str, float]]
    ) -> dict[str, prune.BlockMask]:
        """Prune and tune `student`; its masks keep the pattern from then on."""
        recipe, linears = self.recipe, encoder_linears(student)
        start = prune.found_masks(linears, self.pattern) if recipe.start else None
        masks = prune.attach(linears, self.pattern, start)
        goals = dict.fromkeys(linears, recipe.sparsity) | dict(self.targets or {})
        if recipe.one_shot:
            self._one_shot(student, masks, goals, teacher)
            dev["one-shot"] = self.evaluate(student)
            return masks
        stage = self._stage("prune", recipe.rates.prune, recipe.epochs.prune)
        tightening = self._tightening(student, masks, goals)
        dev["prune"] = self._train(replace(stage, tightening=tightening), student, teacher)
        if recipe.epochs.tune > 0:
            stage = self._stage("tune", recipe.rates.tune, recipe.epochs.tune)
            dev["tune"] = self._train(stage, student, teacher)
        return masks

    def exported(self, student: Any, teacher: Any, dev: dict[str, dict[str, float]]) -> Path:
        """Quantise with learned scales, and write model.onnx."""
        recipe, path = self.recipe, self.output / "model.onnx"
        if not recipe.quantise:
            export_file(self.output / "sparse", path, head=self.task.head)
            return path
        scales = quantise.prepare(student)
        quantise.calibrate(student, self._calibration)
        if recipe.epochs.quantise > 0 and not recipe.one_shot:
            stage = self._stage("quantise", recipe.rates.quantise, recipe.epochs.quantise)
            dev["quantise"] = self._train(stage, student, teacher, scales)
        else:
            dev["quantise"] = self.evaluate(student)
        export_qdq.export(student.cpu().eval(), path, self.task.head)
        return path

    def saved(self, student: Any) -> Path:
        """Write the sparse fp32 model as a Hugging Face folder."""
        plain, folder = copy.deepcopy(student), self.output / "sparse"
        bake(encoder_linears(plain).values())
        more = {} if self.stream is None else {STREAM: json.dumps(self.stream)}
        save_model(plain, self.recipe.model, folder, more)
        return folder

    def _train(
        self, stage: Stage, student: Any, teacher: Any | None, scales: Any = ()
    ) -> dict[str, float]:
        return Trainer(
            stage, student, teacher, self.task, self.dev_data, self.output / "stages" / stage.name,
            self.log, self.device, scales, self.tell,
        ).run()  # fmt: skip

    def _stage(self, name: str, rate: float, epochs: float) -> Stage:
        weights = self.recipe.distillation_for(self.task.head)
        return Stage(
            name, self._sources(texts=name == "prune"), epochs, rate, weights,
            self.recipe.tokens_per_batch, self.recipe.seed,
        )  # fmt: skip

    def _sources(self, *, texts: bool) -> list[Source]:
        """Return the task's own examples, and with `texts` plain text beside them."""
        recipe, seed, train = self.recipe, self.recipe.seed, self.train_data
        found = []
        if train is not None:
            found.append(Source("train", lambda epoch: train, self.task.has_labels))
        if train is not None and recipe.joined and self.task.head == "classify":
            join = lru_cache(1)(lambda epoch: mixing.joined(train, seed, epoch))
            found.append(Source("joined", join, False))
        for path, text in zip(recipe.text, self.texts, strict=True) if texts else ():
            share = lru_cache(1)(_share(text, recipe.text_share, seed))
            found.append(Source(path.name, share, False))
        return found

    @cached_property
    def _calibration(self) -> list[Batch]:
        """Some batches of all sources, the same for a seed, on the device."""
        found: list[Batch] = []
        sources = self._sources(texts=True)
        for source in sources:
            encoded = source.at(0)
            per_batch = max(self.recipe.tokens_per_batch // encoded.rows_per_example, 1)
            room = CALIBRATION_TOKENS // len(sources)
            for indices in batches(encoded.lengths, per_batch, self.recipe.seed, 0):
                batch = encoded.batch(indices)
                room -= int(batch["attention_mask"].sum())
                found.append(self.device.put(batch))
                if room <= 0:
                    break
        return found

    def _tightening(
        self, student: Any, masks: dict[str, prune.BlockMask], goals: dict[str, float]
    ) -> Tightening | None:
        """Return how the pattern gets sparser; None where it starts at its goal."""
        linears = encoder_linears(student)
        pruner = prune.Pruner(self.recipe.criterion, self.recipe.budget, goals)
        began = {name: sparsity_of([mask.kept]) for name, mask in masks.items()}
        if all(goals[name] - sparsity < A_BLOCK for name, sparsity in began.items()):
            return None
        if self.recipe.criterion != "obs":
            return Tightening(
                lambda progress: pruner.update(linears, masks, began, progress),
                OTHER_STEPS, self.recipe.prune_until,
                lambda: pruner.start(masks), lambda: pruner.stop(masks),
            )  # fmt: skip

        def to(progress: float) -> float:
            now = pruner.goals(began, progress)
            self._one_shot(student, masks, now, None)
            return sparsity_of(mask.kept for mask in masks.values())

        return Tightening(to, OBS_STEPS, self.recipe.prune_until)

    def _one_shot(
        self, student: Any, masks: dict[str, prune.BlockMask], goals: dict[str, float],
        reference: Any | None,
    ) -> None:  # fmt: skip
        """Prune to `goals` with OBS, the weights that stay refitted; masks only lose cells."""
        kept = {name: mask.kept for name, mask in masks.items()}
        found = prune_one_shot(
            student, self._calibration, self.pattern, goals, reference=reference, kept=kept
        )
        for name, mask in masks.items():
            mask.kept.copy_(found[name])


def _share(text: Encoded, share: float, seed: int) -> Callable[[int], Encoded]:
    return lambda epoch: mixing.some(text, share, seed, epoch)
