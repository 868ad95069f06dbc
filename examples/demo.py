"""Builds a block-sparse encoder, compiles it in fp32 and int8, and shows result and speed.

The fp32 library is checked against ONNX Runtime. The int8 one is timed in turn with ONNX Runtime's
best: the model as it is, and quantised by ONNX Runtime's own tool. Weights and calibration are
random here: they show speed, and that the arithmetic is right, but no task.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from onnx import load

from sparsec.tools.peer_models import quantize_dynamic, quantize_static

SAMPLES = 16  # of 64 random tokens, for ONNX Runtime's static quantisation
VOCABULARY = 30522
KINDS = ("static", "dynamic")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bert-mini", help="a model of the zoo")
    parser.add_argument("--folder", type=Path, default=Path("out"))
    parser.add_argument("--sparsity", default="0.8")
    parser.add_argument("--block", default="4x1")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    onnx = args.folder / f"{args.model}-{args.block}.onnx"
    fp32, int8 = onnx.with_suffix(".so"), onnx.with_name(f"{onnx.stem}-int8.so")
    pruned = ["--sparsity", args.sparsity, "--block", args.block]
    to_int8 = ["--precision", "int8", "--calibration", "random"]
    steps = [
        ["sparsec.models", "build", args.model, "-o", onnx, *pruned],
        ["sparsec", "inspect", onnx],
        ["sparsec", "compile", onnx, "-o", fp32],
        ["sparsec", "verify", fp32, "--onnx", onnx],
        ["sparsec", "compile", onnx, "-o", int8, *to_int8],
        ["sparsec", "profile", int8],
    ]
    for module, *arguments in steps:
        status = run(module, arguments)
        if status:
            return status
    return compare(int8, onnx)


def run(module: str, arguments: list[object]) -> int:
    """Show a command and run it."""
    words = [str(a) for a in arguments]
    print(f"\n$ python -m {module} {' '.join(words)}", flush=True)
    return subprocess.run([sys.executable, "-m", module, *words]).returncode


def compare(library: Path, onnx: Path) -> int:
    """The int8 library against each form of the model that ONNX Runtime can run."""
    print("\nONNX Runtime's forms of the same model, batch 1, 128 tokens, one thread:", flush=True)
    forms = {"fp32": onnx, **quantized_forms(onnx)}
    ratios = {}
    for name, path in forms.items():
        words = ["bench", library, "--onnx", path, "--seconds", 3, "--json"]
        command = [sys.executable, "-m", "sparsec", *(str(w) for w in words)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        ours, theirs = json.loads(done.stdout)["engines"].values()
        ratios[name] = theirs["median_ms"] / ours["median_ms"]
        print(
            f"  {name:15} {theirs['median_ms']:8.3f} ms, sparsec int8 {ours['median_ms']:8.3f} ms:"
            f" {ratios[name]:.2f}x",
            flush=True,
        )
    best = min(ratios, key=lambda name: ratios[name])
    print(f"{ratios[best]:.2f}x the speed of ONNX Runtime's best ({best})")
    return 0


def quantized_forms(onnx: Path) -> dict[str, Path]:
    """What ONNX Runtime's quantiser makes of the model."""
    rng = np.random.default_rng(0)
    shape = (SAMPLES, 64)
    samples = {
        "input_ids": rng.integers(0, VOCABULARY, shape),
        "attention_mask": np.ones(shape, np.int64),
    }
    names = {i.name for i in load(onnx, load_external_data=False).graph.input}
    if "token_type_ids" in names:
        samples["token_type_ids"] = np.zeros(shape, np.int64)
    forms = {f"int8 {kind}": onnx.with_name(f"{onnx.stem}-{kind}.onnx") for kind in KINDS}
    quantize_static(onnx, forms["int8 static"], samples, attention=False)
    quantize_dynamic(onnx, forms["int8 dynamic"])
    return forms


if __name__ == "__main__":
    sys.exit(main())
