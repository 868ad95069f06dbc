"""The files that bench_models.py measures: our libraries, and those of the peers.

All are kept in one folder. A library is made again when the sources of sparsec have changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from remote import Worker
from rich.console import Console

import sparsec
from sparsec.models.build import build_file
from sparsec.models.registry import ModelSpec
from sparsec.models.weights import Pruning
from sparsec.options import Calibration
from sparsec.tools.peer_models import quantize_dynamic, quantize_static
from sparsec.tools.peers import openvino_has_bf16
from sparsec.tools.verify import verify

Arrays = dict[str, np.ndarray[Any, Any]]
SAMPLES = (16, 64)  # of random tokens, for the ranges of activations: ours and the peers'
progress = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Side:
    """One engine with one file: `group` is its column in the table.

    A dense file counts for all rows of the table, a pruned one for those with as many zeros.
    """

    group: str
    setting: str
    path: Path
    precision: str | None = None  # of OpenVINO's layers that are not quantised
    sparsity: int = 0  # per cent of zeros in the file
    worker: Worker | None = None  # of an engine that needs a Python of its own


@dataclass(frozen=True, slots=True)
class Library:
    """One of our libraries, and how near its answers are to the fp32 file's."""

    block: str
    sparsity: int
    path: Path
    accuracy: dict[str, float]


def build(spec: ModelSpec, options: argparse.Namespace, pruning: Pruning | None) -> Library:
    """Compile a model, unless the folder has it. Only the dense ONNX file is kept."""
    sparsity = round(pruning.sparsity * 100) if pruning else 0
    variant = f"{pruning}_{sparsity}" if pruning else "dense"
    onnx_path = options.folder / spec.name / f"{variant}.onnx"
    library = onnx_path.with_name(f"{variant}_{options.precision}_{options.target}.so")
    about, digest = library.with_suffix(".json"), source_digest()
    known = json.loads(about.read_text()) if about.exists() and library.exists() else {}
    if known.get("sources") != digest:
        onnx_path.parent.mkdir(parents=True, exist_ok=True)
        if not onnx_path.exists():
            progress.print(f"{spec.name} {variant}: building")
            build_file(spec, onnx_path, pruning=pruning)
        progress.print(f"{spec.name} {variant}: compiling")
        data = samples(spec, onnx_path)
        sparsec.compile_model(
            onnx_path,
            library,
            target=options.target,
            precision=options.precision,
            calibration=Calibration(data=data) if options.precision == "int8" else None,
        )
        known = {"sources": digest, "accuracy": accuracy(library, onnx_path)}
        about.write_text(json.dumps(known))
        if pruning is not None:
            onnx_path.unlink()  # of bert-large 1.3 GB for each pruning
    return Library(str(pruning or "dense"), sparsity, library, known["accuracy"])


def source_digest() -> str:
    """Of all files that a library is made from."""
    folders = [Path(folder) for folder in sparsec.__path__]
    for package in ("passes", "codegen", "runtime"):
        spec = importlib.util.find_spec(f"sparsec.{package}")
        folders += [Path(f) for f in (spec.submodule_search_locations or [])] if spec else []
    digest = hashlib.blake2b(digest_size=8)
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".py", ".c", ".h"}:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def samples(spec: ModelSpec, beside: Path) -> Path:
    """An npz of random tokens: good for measuring speed and nothing else."""
    path = beside.with_name("samples.npz")
    tokens = np.random.default_rng(7).integers(0, spec.vocab, SAMPLES)
    arrays = {"input_ids": tokens, "attention_mask": np.ones(SAMPLES, np.int64)}
    if spec.has_token_types:
        arrays["token_type_ids"] = np.zeros(SAMPLES, np.int64)
    np.savez(path, allow_pickle=False, **arrays)
    return path


def accuracy(library: Path, onnx_path: Path) -> dict[str, float]:
    """Worst figures against the fp32 file over all outputs, on inputs with padding."""
    found = verify(
        library,
        onnx_path,
        shapes=[(1, 32), (2, 33)],
        threads=1,
        tolerance=0.0,
        seed=0,
        progress=lambda stage: None,
    )["outputs"].values()
    return {
        "max_abs_error": max(float(figures["max_abs_error"]) for figures in found),
        "cosine": min(float(figures["cosine"]) for figures in found),
    }


def peers(spec: ModelSpec, options: argparse.Namespace, installed: list[str]) -> list[Side]:
    """All settings of the installed peers, with their files made."""
    folder = options.folder / spec.name
    dense = folder / "dense.onnx"
    sides = []
    if not dense.exists():
        build_file(spec, dense)
    if "onnxruntime" in installed:
        sides.append(Side("ORT fp32", "fp32", dense))
    if "openvino" in installed:
        sides.append(Side("OV fp32", "fp32", dense, "f32"))
    if options.precision == "fp32":
        return sides
    if "openvino" in installed and openvino_has_bf16():
        sides.append(Side("OV bf16", "bf16", dense, "bf16"))
    if options.precision == "bf16":
        return sides
    for setting, make in int8_files(dense, samples(spec, dense)).items():
        path = folder / f"peer_{setting.replace(' ', '_')}.onnx"
        if not path.exists():
            progress.print(f"{spec.name} for the peers: {setting}")
            make(path)
        if "onnxruntime" in installed:
            sides.append(Side("ORT int8", setting, path))
        if "openvino" in installed and setting != "dynamic":
            sides.append(Side("OV int8", setting, path))
    return sides


def int8_files(dense: Path, calibration: Path) -> dict[str, Callable[[Path], None]]:
    """Makers of the int8 files by setting."""
    tokens: Arrays = dict(np.load(calibration))
    return {
        "static linear": lambda path: quantize_static(dense, path, tokens, attention=False),
        "static all": lambda path: quantize_static(dense, path, tokens, attention=True),
        "dynamic": lambda path: quantize_dynamic(dense, path),
    }
