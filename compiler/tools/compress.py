"""`sparsec compress`: trains, compiles what came of it, and measures the compiled library.

The training is sparsec.models.compress, which needs the extra `compress`; it is imported inside
functions, and by no other module outside `models`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sparsec import __version__
from sparsec.driver import compile_model
from sparsec.errors import InvalidInput, MissingPackage
from sparsec.files import replacing
from sparsec.options import Calibration, CompileOptions
from sparsec.runtime import Model, load
from sparsec.target import Target
from sparsec.tools.advise import AdviseOptions, advise
from sparsec.tools.bench import bench
from sparsec.tools.compress_plot import plot_run
from sparsec.tools.compress_progress import Tell
from sparsec.tools.console import console

if TYPE_CHECKING:
    from sparsec.models.compress.data import Encoded
    from sparsec.models.compress.pipeline import Compressed
    from sparsec.models.compress.recipe import Recipe
    from sparsec.models.compress.tasks import Task

SCHEMA = 1  # of result.json; fields may be added to it, none is taken away or changed
LENGTHS = (32, 128)  # tokens of the one sequence whose latency is measured
BENCH_SECONDS = 2.0
ADVISED = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)  # shares that a latency is met with
EQUAL = 5e-3  # sparsities that differ by less are told in one line
GROUPS = ("epochs", "rates", "distillation")  # fields of a recipe that are records themselves

LIBRARY, RECIPE, RESULT, LOG, PLOT = (
    "model.so", "recipe.json", "result.json", "log.jsonl", "log.png",
)  # fmt: skip
WRITTEN = (LIBRARY, RECIPE, RESULT, LOG, "model.onnx", "teacher", "sparse", "stages")

# How the figures of one run are called, in the order of the table: keys of `dev`.
ROWS = {
    "teacher": "dense teacher, fp32 (torch)",
    "one-shot": "sparse, fp32 (torch)",
    "prune": "sparse, fp32 (torch)",
    "tune": "sparse, fp32 (torch)",
    "quantise": "sparse, int8 (simulated in torch)",
    "library": "sparse, model.so",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run made and measured; `dev` has the metrics by stage, "library" the compiled ones.

    `latency` has a summary of ms (sparsec.tools.turns) per number of tokens, `layers` the share
    of zero blocks of each linear.
    """

    library: Path
    dev: Mapping[str, Mapping[str, float]]
    latency: Mapping[int, Mapping[str, float]]
    layers: Mapping[str, float]
    notes: tuple[str, ...]


def make_recipe(given: Mapping[str, Any]) -> Recipe:
    """A recipe with its own defaults for all that is not given; paths become absolute.

    `given` is by field. Of `epochs`, `rates` and `distillation` it has texts such as
    "prune=2,tune=1", for the entries that differ from the defaults. Raises InvalidInput.
    """
    _pipeline()
    from sparsec.models.compress import recipe
    from sparsec.models.compress.tasks import find_task

    defaults = {
        "epochs": recipe.Epochs(),
        "rates": recipe.Rates(),
        "distillation": recipe.DISTILLATION[find_task(given["task"]).head],
    }
    groups = {
        name: _changed(name, defaults[name], given[name]) for name in GROUPS if name in given
    }
    values = {name: _absolute(value) for name, value in given.items()} | groups
    return recipe.Recipe(**{"train": None, **values})


def _absolute(value: Any) -> Any:
    """So that a run can go on from another folder."""
    if isinstance(value, Path):
        return value.resolve()
    return tuple(map(_absolute, value)) if isinstance(value, tuple) else value


def _changed(option: str, record: Any, text: str) -> Any:
    """The record with the entries of a text such as "a=1,b=0.5"."""
    known = [entry.name for entry in fields(record)]
    found = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            name = ""
        if name not in known:
            raise InvalidInput(
                f"--{option} {text!r}: wanted NAME=NUMBER,... with names of {', '.join(known)}"
            )
    return replace(record, **found)


def _pipeline() -> Any:
    """The module that trains. Raises MissingPackage when the extra is not installed."""
    try:
        from sparsec.models.compress import pipeline
    except ModuleNotFoundError as error:
        raise MissingPackage(error.name, "compress") from None
    return pipeline


def compress(recipe: Recipe, *, resume: bool, tell: Tell) -> Outcome:
    """Run the recipe, compile its ONNX file and measure the library on dev.

    Everything is written to `recipe.output`. With `resume` a run that was stopped goes on, and
    one that was finished is measured again. Raises CompilerError for what is wrong with the
    recipe or its files.
    """
    pipeline = _pipeline()
    from sparsec.models.compress.data import load_tokenizer
    from sparsec.models.compress.tasks import find_task
    from sparsec.tuning.rates_file import cache_folder

    check_output(recipe, resume)
    made: Compressed = pipeline.compress(recipe, targets=latency_targets(recipe, tell), tell=tell)
    library = recipe.output / LIBRARY
    compiled = compile_model(
        made.onnx, library, rates=cache_folder(),
        progress=lambda stage: tell(f"compile: {stage}", 0, 0),
    )  # fmt: skip
    task = find_task(recipe.task)
    encoded = task.read(recipe.dev, load_tokenizer(recipe.model), recipe.max_length)
    tell("evaluate model.so on dev", 0, 0)
    dev = {**made.dev, "library": evaluate_library(library, task, encoded, recipe.threads)}
    latency = _latencies(library, made.positions, tell)
    notes = plot_run(recipe.output / LOG, recipe.output / PLOT)
    notes += tuple(compiled.report["warnings"])
    outcome = Outcome(library, dev, latency, made.layers, notes)
    _write_result(recipe, made, outcome)
    return outcome


def latency_targets(recipe: Recipe, tell: Tell) -> dict[str, float] | None:
    """The sparsity of each linear that the recipe's latency needs; None when it has none.

    A run that goes on keeps those it began with, whatever the cost model says by now. Raises
    InvalidInput when no sparsity of ADVISED is enough.
    """
    from sparsec.models.compress.budget import sparsities_for
    from sparsec.models.compress.folders import load_model
    from sparsec.models.compress.pattern import BlockPattern, parse_pattern
    from sparsec.models.compress.pipeline import SPARSITIES
    from sparsec.models.compress.sites import encoder_linears
    from sparsec.models.compress.tasks import find_task

    if recipe.latency_ms is None:
        return None
    begun = recipe.output / SPARSITIES
    if begun.is_file():
        found: dict[str, float] = json.loads(begun.read_text(encoding="utf-8"))
        return found
    tell("advise: what each layer takes", 0, 0)
    pattern = parse_pattern(recipe.block)
    assert isinstance(pattern, BlockPattern), pattern
    model, _ = load_model(recipe.model, find_task(recipe.task), recipe.seed)
    linears = encoder_linears(model)
    for name, linear in linears.items():
        pattern.check(name, tuple(linear.weight.shape))
    advice = _advice(recipe, (pattern.rows, pattern.cols))
    return sparsities_for(advice, linears, pattern, recipe.latency_ms)


def _advice(recipe: Recipe, block: tuple[int, int]) -> dict[str, Any]:
    """What docs/advise.md describes, for int8 on this machine. A head costs next to nothing."""
    from sparsec.models.export import export_file
    from sparsec.tuning.rates_file import cache_folder

    options = CompileOptions(
        target=Target.host(), precision="int8", calibration=Calibration(random=True),
        rates=cache_folder(),
    )  # fmt: skip
    wanted = AdviseOptions(recipe.latency_tokens, 1, (block,), ADVISED, recipe.latency_ms)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder, "dense.onnx")
        export_file(recipe.model, dense)
        return advise(dense, options, wanted)


def check_output(recipe: Recipe, resume: bool) -> None:
    """Refuse, before anything is computed, a folder that can not or should not be written."""
    folder = recipe.output
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"{folder}: is a file; wanted a folder for what is written")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InvalidInput(f"{folder}: no permission to write in {existing}")
    if (folder / RECIPE).is_file():
        _check_recipe(recipe, folder, resume)
        return
    found = sorted(name for name in WRITTEN if (folder / name).exists())
    if found:
        raise InvalidInput(
            f"{folder}: has {', '.join(found)}, and no {RECIPE} that says of what run; choose "
            "another folder"
        )


def _check_recipe(recipe: Recipe, folder: Path, resume: bool) -> None:
    if not any((folder / name).exists() for name in WRITTEN if name != RECIPE):
        return  # it was refused before it made anything
    differences = recipe.differences((folder / RECIPE).read_text(encoding="utf-8"))
    if differences:
        raise InvalidInput(
            f"{folder}: holds a run with another recipe (different: {', '.join(differences)}); "
            "choose another folder, or give what its recipe.json says"
        )
    if not resume:
        raise InvalidInput(
            f"{folder}: holds this run already; add --resume to go on with it, or choose another "
            "folder"
        )


def evaluate_library(
    library: Path, task: Task, encoded: Encoded, threads: int = 0
) -> dict[str, float]:
    """The task's metrics of a compiled model; `threads` 0 is all cores.

    It is given those of input_ids, attention_mask and token_type_ids that it has. Raises
    InvalidInput when it has others, or not the outputs that the task scores.
    """
    from sparsec.models.compress.tasks import evaluate

    with load(library, threads=threads) as model:
        missing = sorted(set(task.outputs) - {port.name for port in model.outputs})
        if missing:
            raise InvalidInput(
                f"{library}: has no output {missing[0]}, which the task {task.name} needs"
            )
        return evaluate(lambda arrays: model(_inputs(library, model, arrays)), task, encoded)


def _inputs(library: Path, model: Model, arrays: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted({port.name for port in model.inputs} - arrays.keys())
    if unknown:
        raise InvalidInput(f"{library}: has the input {unknown[0]}, which no tokenizer gives")
    return {port.name: arrays[port.name].astype(port.dtype) for port in model.inputs}


def _latencies(library: Path, positions: int | None, tell: Tell) -> dict[int, dict[str, float]]:
    """A summary in ms for one sequence of each length that the model can take, on one core."""
    return {
        seq: bench(
            library, batch=1, seq=seq, threads=1, onnx=None, against=None, seconds=BENCH_SECONDS,
            pin=True, progress=lambda text: tell(text, 0, 0),
        )["engines"]["sparsec"]
        for seq in LENGTHS
        if positions is None or seq <= positions
    }  # fmt: skip


def _write_result(recipe: Recipe, made: Compressed, outcome: Outcome) -> None:
    result = {
        "schema": SCHEMA,
        "sparsec": __version__,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": json.loads(recipe.to_json()),
        "dev": outcome.dev,
        "latency_ms": outcome.latency,
        "layers": outcome.layers,
        "onnx": made.onnx.name,
        "library": outcome.library.name,
        "library_bytes": outcome.library.stat().st_size,
    }
    with replacing(recipe.output / RESULT) as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def print_outcome(recipe: Recipe, outcome: Outcome) -> None:
    """A table of accuracy and latency, what sparsity was reached, and where it is."""
    metrics = list(outcome.dev["library"])
    table = Table(title=f"{recipe.task}, {recipe.dev.name}")
    for column in ("model", *metrics, *(f"1x{seq}, ms" for seq in outcome.latency)):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row, (name, figures) in _rows(outcome).items():
        times = [f"{f['median_ms']:.2f}" for f in outcome.latency.values()]
        table.add_row(name, *(f"{figures[m]:.4f}" for m in metrics),
                      *(times if row == "library" else [""] * len(times)))  # fmt: skip
    console().print(table)
    _print_layers(recipe, outcome.layers)
    size = outcome.library.stat().st_size
    print(f"{outcome.library}: {size / 1e6:.1f} MB; latency on one core; all figures: {RESULT}")
    for note in outcome.notes:
        print(f"note: {note}")


def _rows(outcome: Outcome) -> dict[str, tuple[str, Mapping[str, float]]]:
    """Stage, name and figures of each line: of stages with the same name the last."""
    last = {name: stage for stage, name in ROWS.items() if stage in outcome.dev}
    return {stage: (name, outcome.dev[stage]) for name, stage in last.items()}


def _print_layers(recipe: Recipe, layers: Mapping[str, float]) -> None:
    """The share of zero blocks: a line where all layers have the same, else a table."""
    what = f"zero blocks of {recipe.block}"
    if max(layers.values()) - min(layers.values()) < EQUAL:
        print(f"{what}: {max(layers.values()):.3f} of each of {len(layers)} linears")
        return
    table = Table(title=what)
    table.add_column("linear")
    table.add_column("share", justify="right")
    for name, sparsity in layers.items():
        table.add_row(name, f"{sparsity:.3f}")
    console().print(table)
