"""The peers that make use of zeros in the weights, DeepSparse and ITREX: files and settings.

Each gets the networks of the table pruned in the blocks that it is made for, with the same share
of zeros. Both have ended and need a Python of their own (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from bench_files import Arrays, Side, progress, samples
from peer_forms import itrex_spelling, matmul_integer
from remote import Remote, Worker, WorkerFailed

from sparsec.errors import InvalidInput
from sparsec.models.build import build_file
from sparsec.models.registry import ModelSpec
from sparsec.models.weights import Pruning
from sparsec.tools.peer_models import quantize_static
from sparsec.tools.peers import onnxruntime_runner

OPSET = 14  # of the exporters of their day
# Of the check of the answers: samples x tokens. All samples but the first are padded.
CHECKED = (2, 32)
LEAST_COSINE = 0.98  # int8 has 0.99 and more; a mask or a layer that is lost shows
COMPILE_SECONDS = 3600.0  # ITREX takes minutes for a large model


Change = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True, slots=True)
class SparseEngine:
    """How to make the files of an engine, and in which settings it is measured."""

    title: str
    distribution: str  # what pip calls it
    blocks: tuple[tuple[int, int], ...]  # output x input, that it makes use of
    least_zeros: int  # per cent, for that path
    copies: int  # loaded beside each other; the fastest counts
    suffix: str  # of its files
    respell: Change | None  # what it needs of the fp32 model
    quantizing: dict[str, Any]  # and of quantize_static
    # (QDQ file, file to write, whether it is pruned, worker); raises WorkerFailed.
    convert: Callable[[Path, Path, bool, Worker], None]

    def prunings(self, levels: Iterable[int]) -> list[Pruning | None]:
        """Of the files for these per cent of zeros: dense, which serves all, and those pruned."""
        fit = [level for level in levels if level >= self.least_zeros]
        return [None, *(Pruning(level / 100, *block) for level in fit for block in self.blocks)]


@dataclass(frozen=True, slots=True)
class SparseFile:
    """What an engine runs: `variant` is dense, or the block and the per cent of zeros."""

    variant: str
    path: Path
    zeros: int
    worker: Worker


def sparse_peers(
    spec: ModelSpec, options: argparse.Namespace, names: Iterable[str], levels: Iterable[int]
) -> list[Side]:
    """The settings of the named engines for dense weights and for these per cent of zeros."""
    sides = []
    for name in names:
        engine = SPARSE_ENGINES[name]
        for file in sparse_files(spec, options, name, levels):
            for copy in range(1, engine.copies + 1):
                setting = file.variant if engine.copies == 1 else f"{file.variant} graph {copy}"
                about = {"sparsity": file.zeros, "worker": file.worker}
                sides.append(Side(f"{engine.title} int8", setting, file.path, **about))
    return sides


def sparse_files(
    spec: ModelSpec, options: argparse.Namespace, name: str, levels: Iterable[int]
) -> Iterator[SparseFile]:
    """The files of an engine for dense weights and for these per cent of zeros.

    One that can not be made is left out, and the reason is printed.
    """
    engine = SPARSE_ENGINES[name]
    worker = Worker(getattr(options, f"{name}_python"), f"{name}_worker.py")
    for pruning in engine.prunings(levels):
        zeros = round(pruning.sparsity * 100) if pruning else 0
        variant = f"{pruning}_{zeros}" if pruning else "dense"
        path = options.folder / spec.name / f"peer_{name}_{variant}{engine.suffix}"
        try:
            if not path.exists():
                progress.print(f"{spec.name} for {engine.title}: {variant}")
                _make(engine, spec, path, pruning, worker)
        except WorkerFailed as error:
            what = f"{spec.name}: {engine.title}, {variant}, is left out: {error}"
            progress.print(what, markup=False)
            continue
        yield SparseFile(variant, path, zeros, worker)


def add_python_options(parser: argparse.ArgumentParser) -> None:
    """An option for the Python of each engine."""
    for name, engine in SPARSE_ENGINES.items():
        what = f"a Python with {engine.title}"
        parser.add_argument(f"--{name}-python", type=Path, metavar="FILE", help=what)


def installed_version(name: str, options: argparse.Namespace) -> str | None:
    """Version of the engine; None, which is said, when no Python is given. Raises InvalidInput."""
    python = getattr(options, f"{name}_python")
    if python is not None:
        return version(name, python)
    how = f"--{name}-python FILE, a Python set up as docs/benchmarks.md says"
    what = f"{SPARSE_ENGINES[name].title}, which makes use of zeros, is left out"
    progress.print(f"{what}; to measure it: {how}")
    return None


def version(name: str, python: Path) -> str:
    """Version of the engine that the interpreter has; raises InvalidInput."""
    distribution = SPARSE_ENGINES[name].distribution
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InvalidInput(f"--{name}-python {python}: it does not run: {error}") from None
    if done.returncode:
        raise InvalidInput(
            f"--{name}-python {python}: it has no {distribution}; docs/benchmarks.md says how to "
            "set it up"
        )
    return done.stdout.strip()


def _make(
    engine: SparseEngine, spec: ModelSpec, path: Path, pruning: Pruning | None, worker: Worker
) -> None:
    """Write the file of the network that the engine runs, if its answers are right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = dict(np.load(samples(spec, path)))
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        quantized, made = Path(folder, "quantized.onnx"), Path(folder, path.name)
        build_file(spec, quantized, pruning=pruning, opset=OPSET)
        if engine.respell is not None:
            _change(quantized, quantized, engine.respell)
        quantize_static(quantized, quantized, tokens, attention=True, **engine.quantizing)
        engine.convert(quantized, made, pruning is not None, worker)
        arrays = {name: array[: CHECKED[0], : CHECKED[1]] for name, array in tokens.items()}
        arrays["attention_mask"][1:, CHECKED[1] // 2 :] = 0
        check_answers(quantized, made, arrays, worker)
        made.rename(path)


def check_answers(quantized: Path, made: Path, arrays: Arrays, worker: Worker) -> None:
    """Compare with ONNX Runtime and the QDQ file; raises WorkerFailed."""
    wanted = onnxruntime_runner(quantized, 1)[1](arrays)
    with TemporaryDirectory() as folder, closing(Remote(worker)) as remote:
        inputs, outputs = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        np.savez(inputs, allow_pickle=False, **arrays)
        remote.ask("load", path=str(made), inputs=str(inputs), threads=1, clock="wall")
        remote.ask("answer", path=str(outputs))
        found = dict(np.load(outputs))
    both = wanted.keys() & found.keys()
    if not both:
        raise WorkerFailed(f"its outputs are {', '.join(found)}, not {', '.join(wanted)}")
    for name in both:
        a, b = (np.asarray(side[name], np.float64).ravel() for side in (wanted, found))
        cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
        if not cosine >= LEAST_COSINE:
            raise WorkerFailed(f"its {name} is wrong: cosine {cosine:.3f} to that of ONNX Runtime")


def _to_deepsparse(quantized: Path, made: Path, pruned: bool, worker: Worker) -> None:
    _change(quantized, made, matmul_integer)


def _to_itrex(quantized: Path, made: Path, pruned: bool, worker: Worker) -> None:
    arguments = {"path": str(quantized), "output": str(made), "sparse": pruned}
    with closing(Remote(worker)) as remote:
        remote.ask("compile", wait_seconds=COMPILE_SECONDS, **arguments)


def _change(path: Path, output: Path, change: Change) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, output)


# By the name that --peers takes.
SPARSE_ENGINES = {
    "deepsparse": SparseEngine(
        title="DeepSparse",
        distribution="deepsparse",
        blocks=((1, 1), (4, 1), (1, 4)),
        least_zeros=1,
        copies=1,
        suffix=".onnx",
        respell=None,
        quantizing={},  # faster than with the outputs of products rounded
        convert=_to_deepsparse,
    ),
    # It is bimodal: for a while, or in one graph and not in the next, it takes twice its time.
    # It crashes on quantised Gemms, and in its sparse mode on products of fp32 outputs.
    "itrex": SparseEngine(
        title="ITREX",
        distribution="intel-extension-for-transformers",
        blocks=((4, 1),),
        least_zeros=70,
        copies=3,
        suffix="",
        respell=itrex_spelling,
        quantizing={"products": ("MatMul",), "outputs": True},
        convert=_to_itrex,
    ),
}
