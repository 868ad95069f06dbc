"""The peers that make use of zeros in the weights, DeepSparse and ITREX: files and settings.

Each gets the networks of the table pruned in the blocks that it is made for, with the same share
of zeros. Both have ended and need a Python of their own (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_files import Side, progress, samples
from peer_forms import itrex_spelling, matmul_integer
from remote import Remote, Worker, WorkerFailed

from sparsec.errors import InvalidInput
from sparsec.models.build import build_file
from sparsec.models.registry import ModelSpec
from sparsec.models.weights import Pruning
from sparsec.tools.peer_models import quantize_static

OPSET = 14  # of the exporters of their day
COMPILE_SECONDS = 3600.0  # ITREX takes minutes for a large model


@dataclass(frozen=True, slots=True)
class SparseEngine:
    """How to make the files of an engine, and in which settings it is measured.

    `make(spec, path, pruning, worker)` writes `path`; it raises WorkerFailed.
    """

    title: str
    distribution: str  # what pip calls it
    blocks: tuple[tuple[int, int], ...]  # output x input, that it has a fast path for
    least_zeros: int  # per cent, for that path
    copies: int  # loaded beside each other; the fastest counts
    suffix: str
    make: Callable[[ModelSpec, Path, Pruning | None, Worker], None]

    def prunings(self, levels: Iterable[int]) -> list[Pruning | None]:
        """Of the files for these per cent of zeros: dense, which serves all, and those pruned."""
        fit = [level for level in levels if level >= self.least_zeros]
        return [None, *(Pruning(level / 100, *block) for level in fit for block in self.blocks)]


def sparse_peers(
    spec: ModelSpec, options: argparse.Namespace, names: Iterable[str], levels: Iterable[int]
) -> list[Side]:
    """The settings of the named engines for dense weights and for these per cent of zeros.

    A file that can not be made is left out, and the reason is printed.
    """
    sides = []
    for name in names:
        engine = SPARSE_ENGINES[name]
        worker = Worker(getattr(options, f"{name}_python"), f"{name}_worker.py")
        for pruning in engine.prunings(levels):
            zeros = round(pruning.sparsity * 100) if pruning else 0
            variant = f"{pruning}_{zeros}" if pruning else "dense"
            path = options.folder / spec.name / f"peer_{name}_{variant}{engine.suffix}"
            try:
                if not path.exists():
                    progress.print(f"{spec.name} for {engine.title}: {variant}")
                    engine.make(spec, path, pruning, worker)
            except WorkerFailed as error:
                what = f"{spec.name}: {engine.title}, {variant}, is left out: {error}"
                progress.print(what, markup=False)
                continue
            for copy in range(1, engine.copies + 1):
                setting = variant if engine.copies == 1 else f"{variant} graph {copy}"
                group = f"{engine.title} int8"
                sides.append(Side(group, setting, path, sparsity=zeros, worker=worker))
    return sides


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


def _make_deepsparse(spec: ModelSpec, path: Path, pruning: Pruning | None, worker: Worker) -> None:
    """QDQ and then over the integers; outputs of products stay fp32, which is faster."""
    del worker
    partial = path.with_name(f"making_{path.name}")
    _write_quantized(spec, partial, pruning)
    _change(partial, matmul_integer)
    partial.rename(path)


def _make_itrex(spec: ModelSpec, path: Path, pruning: Pruning | None, worker: Worker) -> None:
    """A folder with its compiled form, sparse where the weights are.

    It crashes where a Gemm (pooler) is quantised, and in its sparse mode where the outputs of
    products are not.
    """
    partial = path.with_name(f"making_{path.name}.onnx")
    _write_quantized(spec, partial, pruning, itrex_spelling, products=("MatMul",), outputs=True)
    arguments = {"path": str(partial), "output": str(path), "sparse": pruning is not None}
    with closing(Remote(worker)) as remote:
        remote.ask("compile", wait_seconds=COMPILE_SECONDS, **arguments)
    partial.unlink()


def _write_quantized(
    spec: ModelSpec,
    path: Path,
    pruning: Pruning | None,
    respell: Callable[[onnx.ModelProto], None] | None = None,
    **options: Any,
) -> None:
    """The QDQ file of the network, attention too; `respell` changes the fp32 form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    build_file(spec, path, pruning=pruning, opset=OPSET)
    if respell is not None:
        _change(path, respell)
    tokens = dict(np.load(samples(spec, path)))
    quantize_static(path, path, tokens, attention=True, **options)


def _change(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


# By the name that --peers takes. DeepSparse has a path for each of its blocks and no threshold.
# ITREX is bimodal: for a while, or in one graph and not in the next, it takes twice its time.
SPARSE_ENGINES = {
    "deepsparse": SparseEngine(
        title="DeepSparse",
        distribution="deepsparse",
        blocks=((4, 1), (1, 4)),
        least_zeros=1,
        copies=1,
        suffix=".onnx",
        make=_make_deepsparse,
    ),
    "itrex": SparseEngine(
        title="ITREX",
        distribution="intel-extension-for-transformers",
        blocks=((4, 1),),
        least_zeros=70,
        copies=3,
        suffix="",
        make=_make_itrex,
    ),
}
