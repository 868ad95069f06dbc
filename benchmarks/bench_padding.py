"""Sentences of STS-B with and without their padding computed: throughput and equal embeddings.

    python benchmarks/bench_padding.py --stsb dev.csv [--stsb-train train.csv] [--onnx minilm.onnx]

Batches of 32 sentences in the order of the file, padded to the longest of each, and to fixed
lengths, as servers with fixed shapes do. Both libraries run every batch in turns; the figure is
the sum of the best times of each batch. Exit status 0 when embeddings are equal, else 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import (
    BATCH,
    CALIBRATION_SENTENCES,
    OUTPUT,
    Model,
    export,
    model_folder,
    read_pairs,
    tokenized_batches,
)

import sparsec
from sparsec.options import Calibration

TURNS = 3
LARGEST_DIFFERENCE = 1e-5  # of hidden states of order 1, fp32; int8 must agree to the last bit


def main() -> int:
    """Compile, run and print; return the exit status."""
    options = parse_arguments()
    weights = options.model or model_folder()
    left, right, _ = read_pairs(options.stsb)
    every = list(tokenized_batches(weights, left + right))[:: options.every]
    kinds: dict[str, dict[str, Any]] = {"fp32": {}}
    ok = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx = options.onnx or export(weights, folder / "minilm.onnx")
        if options.stsb_train:
            text = folder / "calibration.txt"
            sentences, _, _ = read_pairs(options.stsb_train)
            text.write_text("\n".join(sentences[:CALIBRATION_SENTENCES]), encoding="utf-8")
            calibration = Calibration(text=text, tokenizer=weights / "tokenizer.json")
            kinds["int8"] = {"precision": "int8", "calibration": calibration}
        for kind, arguments in kinds.items():
            models = []
            for keep in (False, True):
                library = folder / f"{kind}-{keep}.so"
                sparsec.compile_model(onnx, library, keep_padding=keep, **arguments)
                models.append(sparsec.load(library, threads=options.threads))
            for length in (0, *options.lengths):
                batches = [padded(feed, length) for feed in every]
                ok &= compare(kind, models[0], models[1], batches, length)
    return 0 if ok else 1


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="STS-B with and without padding computed")
    add = parser.add_argument
    add("--stsb", type=Path, required=True, metavar="FILE", help="dev.csv of STS-B, no header")
    add("--stsb-train", type=Path, metavar="FILE", help="train.csv of STS-B: int8 too")
    add("--onnx", type=Path, metavar="FILE", help="the exported model; default: export it now")
    add("--model", type=Path, metavar="DIR", help="weights and tokenizer; default: the package's")
    add("--threads", type=int, default=1)
    add("--every", type=int, default=1, metavar="N", help="take every Nth batch only")
    add("--lengths", type=int, nargs="*", default=[64], help="fixed lengths to pad to as well")
    return parser.parse_args()


def padded(feed: dict[str, Any], length: int) -> dict[str, Any]:
    """Pad rows to at least `length` tokens."""
    more = max(length - feed["input_ids"].shape[1], 0)
    return {name: np.pad(array, ((0, 0), (0, more))) for name, array in feed.items()}


def compare(kind: str, packed: Model, kept: Model, batches: list[Any], length: int) -> bool:
    """Print one line; return whether hidden states at real tokens are equal and 0 at padding."""
    seconds, worst, clean = np.zeros(2), 0.0, True
    for feed in batches:
        real = feed["attention_mask"] == 1
        ours, theirs = packed(feed)[OUTPUT].copy(), kept(feed)[OUTPUT]
        worst = float(np.maximum(worst, np.abs(ours[real] - theirs[real]).max()))  # NaN stays
        clean &= not ours[~real].any()
        times = [[timed(model, feed) for model in (packed, kept)] for _ in range(TURNS)]
        seconds += np.min(times, axis=0)
    count = BATCH * len(batches)
    share = sum(f["attention_mask"].sum() for f in batches) / sum(
        f["attention_mask"].size for f in batches
    )
    equal = worst <= (LARGEST_DIFFERENCE if kind == "fp32" else 0) and clean
    print(
        f"{kind}, padded to {length or 'the longest'}: {share:.0%} of the tokens are real; "
        f"{count / seconds[1]:.0f} -> {count / seconds[0]:.0f} sentences/s "
        f"({seconds[1] / seconds[0]:.2f}x; tokens alone {1 / share:.2f}x); "
        f"largest difference {worst:.1e} {'ok' if equal else 'FAILED'}",
        flush=True,
    )
    return equal


def timed(model: Model, feed: dict[str, Any]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    model(feed)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
