"""Compiles a block-sparse int8 model and shows result and speed beside ONNX Runtime's.

    python examples/demo.py [SENTENCE ...]       the trained SST-2 model of this repository
    python examples/demo.py --model bert-mini    a model of the zoo, its weights random

The trained model says of each sentence whether it is positive. A model of random weights says
nothing, but that the arithmetic is right and how fast it is. Speed is measured in turns with
ONNX Runtime, with every form of the model that it can run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from onnx import load

import sparsec
from sparsec.models.stored import stored_names, unpack
from sparsec.tools.peer_models import (
    quantize_dynamic,
    quantize_static,
    with_fp32_tables,
    without_roundings,
)
from sparsec.tools.peers import onnxruntime_runner

SAMPLES = 16  # of 64 random tokens, for ONNX Runtime's static quantisation
VOCABULARY = 30522
KINDS = ("static", "dynamic")
SEQUENCES = (32, 128)  # tokens of the speed comparison
RUNS = 60  # of each sentence; the first half warms the engine up
LABELS = ("negative", "positive")
SENTENCES = (
    "A warm, funny film that earns every one of its tears.",
    "The plot makes no sense, and neither does the acting.",
    "Not the masterpiece it wants to be, but hard to dislike.",
    "I have rarely been so bored by so many explosions.",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE")
    parser.add_argument("--model", default="sst2", help="sst2, or a model of the zoo")
    parser.add_argument("--folder", type=Path, default=Path("out"))
    parser.add_argument("--sparsity", default="0.8", help="of a model of the zoo")
    parser.add_argument("--block", default="4x1", help="of a model of the zoo")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    if args.model in stored_names():
        return trained(args.model, args.folder, args.sentences or SENTENCES)
    return random(args)


def trained(name: str, folder: Path, sentences: tuple[str, ...] | list[str]) -> int:
    """Compile a stored model and run it on sentences."""
    stored = unpack(name, folder / name)
    library = stored.onnx.with_suffix(".so")
    for module, *arguments in (
        ["sparsec", "inspect", stored.onnx],
        ["sparsec", "compile", stored.onnx, "-o", library],
    ):
        status = run(module, arguments)
        if status:
            return status
    fp32, int8 = (stored.onnx.with_name(f"{name}-{kind}.onnx") for kind in ("fp32", "int8"))
    without_roundings(stored.onnx, fp32)
    with_fp32_tables(stored.onnx, int8)
    classify(library, int8, stored.tokenizer, sentences)
    forms = {"fp32": fp32, "int8, as trained": int8, **quantized_forms(fp32)}
    return compare(library, forms)


def classify(
    library: Path, onnx: Path, tokenizer: Path, sentences: tuple[str, ...] | list[str]
) -> None:
    """Print label, score and time of each sentence, and the same on ONNX Runtime."""
    from tokenizers import Tokenizer

    read = Tokenizer.from_file(str(tokenizer))
    read.no_padding()  # to a fixed length: ONNX Runtime would compute it
    encode = read.encode
    peer_name, peer = onnxruntime_runner(onnx, 1)
    with sparsec.load(library, threads=1) as model:
        engines = {"sparsec": model, peer_name: peer}
        print(f"\n{'sentence':58} " + " ".join(f"{name:>26}" for name in engines))
        for sentence in sentences:
            row = encode(sentence)
            fields = {
                "input_ids": row.ids,
                "attention_mask": row.attention_mask,
                "token_type_ids": row.type_ids,
            }
            feed = {p.name: np.array([fields[p.name]], p.dtype) for p in model.inputs}
            answers = [answer(engine, feed) for engine in engines.values()]
            shown = sentence if len(sentence) <= 57 else sentence[:54] + "..."
            print(f"{shown:58} " + " ".join(f"{text:>26}" for text in answers))


def answer(engine: Any, feed: dict[str, Any]) -> str:
    """Label, its probability and the median milliseconds of a warm engine."""
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        logits = engine(feed)["logits"][0].astype(np.float64)
        seconds.append(time.perf_counter() - began)
    ms = 1000 * median(seconds[RUNS // 2 :])
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    return f"{LABELS[int(shares.argmax())]} {shares.max():.3f} {ms:7.2f} ms"


def random(args: argparse.Namespace) -> int:
    """Build, compile and check a model of the zoo."""
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
    return compare(int8, {"fp32": onnx, **quantized_forms(onnx)})


def run(module: str, arguments: list[object]) -> int:
    """Show a command and run it."""
    words = [str(a) for a in arguments]
    print(f"\n$ python -m {module} {' '.join(words)}", flush=True)
    return subprocess.run([sys.executable, "-m", module, *words]).returncode


def compare(library: Path, forms: dict[str, Path]) -> int:
    """The int8 library against each form of the model that ONNX Runtime can run."""
    for seq in SEQUENCES:
        print(f"\nin turns with ONNX Runtime, batch 1, {seq} tokens, one thread:", flush=True)
        ratios = {}
        for name, path in forms.items():
            words = ["bench", library, "--onnx", path, "--seq", seq, "--seconds", 2, "--json"]
            command = [sys.executable, "-m", "sparsec", *(str(w) for w in words)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return done.returncode
            ours, theirs = json.loads(done.stdout)["engines"].values()
            ratios[name] = theirs["median_ms"] / ours["median_ms"]
            print(
                f"  {name:17} {theirs['median_ms']:8.3f} ms, sparsec int8 "
                f"{ours['median_ms']:8.3f} ms: {ratios[name]:.2f}x",
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
