"""Builds a block-sparse encoder, compiles it, and shows result and speed beside ONNX Runtime."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bert-mini", help="a model of the zoo")
    parser.add_argument("--folder", type=Path, default=Path("out"))
    parser.add_argument("--sparsity", default="0.8")
    parser.add_argument("--block", default="4x1")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    onnx = args.folder / f"{args.model}-{args.block}.onnx"
    library = onnx.with_suffix(".so")
    pruned = ["--sparsity", args.sparsity, "--block", args.block]
    steps = [
        ["sparsec.models", "build", args.model, "-o", onnx, *pruned],
        ["sparsec", "inspect", onnx],
        ["sparsec", "compile", onnx, "-o", library],
        ["sparsec", "verify", library, "--onnx", onnx],
        ["sparsec", "bench", library, "--batch", 1, "--seq", 128, "--threads", 1, "--onnx", onnx],
    ]
    for module, *arguments in steps:
        words = [str(a) for a in arguments]
        print(f"\n$ python -m {module} {' '.join(words)}", flush=True)
        status = subprocess.run([sys.executable, "-m", module, *words]).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
