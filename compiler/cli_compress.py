"""The command `compress`: from a dense model and a task to a sparse int8 library."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sparsec.errors import InvalidInput

# Options that are fields of a recipe (sparsec.models.compress.recipe, the home of defaults).
FIELDS = (
    "model", "task", "train", "dev", "output", "block", "sparsity", "text", "teacher", "start",
    "criterion", "budget", "latency_ms", "latency_tokens", "permute", "one_shot", "quantise",
    "epochs", "rates", "distillation", "max_length", "tokens_per_batch", "text_share", "joined",
    "prune_until", "seed", "device", "threads",
)  # fmt: skip


def add_commands(commands: Any) -> None:
    p = commands.add_parser(
        "compress", help="prune, distil and quantise a Hugging Face model for a task"
    )
    p.add_argument("model", type=Path, metavar="MODEL_DIR", help="the dense model")
    p.add_argument("--task", required=True, help="sst2, stsb, embed or squad")
    p.add_argument("--train", type=Path, metavar="FILE", help="examples to learn from")
    p.add_argument("--dev", type=Path, required=True, metavar="FILE", help="to select and measure")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="OUT_DIR")
    p.add_argument("--resume", action="store_true", help="go on with the run in OUT_DIR")
    _add_pattern(p)
    _add_training(p)
    p.add_argument("-q", "--quiet", action="store_true")
    p.set_defaults(command=_compress)


def _compress(args: argparse.Namespace) -> int:
    from sparsec.tools.compress import compress, make_recipe, print_outcome
    from sparsec.tools.compress_progress import training_progress

    if args.latency_ms is not None and args.sparsity is not None:
        raise InvalidInput("--latency-ms finds the sparsity of each layer: leave out --sparsity")
    given = {name: getattr(args, name) for name in FIELDS}
    given["text"] = tuple(given["text"])
    recipe = make_recipe({name: value for name, value in given.items() if value is not None})
    try:
        with training_progress(args.quiet) as tell:
            outcome = compress(recipe, resume=args.resume, tell=tell)
    except KeyboardInterrupt:
        print(
            f"sparsec: interrupted; the same command with --resume goes on from the last "
            f"checkpoint in {args.output}",
            file=sys.stderr,
        )
        return 130
    if not args.quiet:
        print_outcome(recipe, outcome)
    return 0


def _add_pattern(p: Any) -> None:
    p.add_argument("--block", metavar="RxC|N:M", help="output x input channels, such as 16x1")
    p.add_argument("--sparsity", type=float, metavar="S", help="share of zero blocks, like 0.8")
    p.add_argument("--latency-ms", type=float, metavar="L",
                   help="instead of --sparsity: each layer gets what that needs")  # fmt: skip
    p.add_argument("--latency-tokens", type=int, metavar="N", help="batch x seq of that run")
    p.add_argument("--criterion", help="obs, magnitude, movement or snip: what goes first")
    p.add_argument("--budget", help="layer: S in every layer; global: S of all layers together")
    p.add_argument("--no-permute", dest="permute", action="store_false", default=None,
                   help="leave the order of channels as it is")  # fmt: skip
    p.add_argument("--one-shot", action="store_true", default=None,
                   help="prune once and train nothing")  # fmt: skip
    p.add_argument("--no-quantise", dest="quantise", action="store_false", default=None,
                   help="stop at the sparse fp32 model")  # fmt: skip


def _add_training(p: Any) -> None:
    p.add_argument("--text", type=Path, action="append", default=[], metavar="FILE",
                   help="plain text to distil on, beside --train; may be given again")  # fmt: skip
    p.add_argument("--teacher", type=Path, metavar="DIR", help="a tuned model to learn from")
    p.add_argument("--start", type=Path, metavar="DIR", help="a pruned model: its zeros stay")
    names = "of the stages teacher, prune, tune, quantise; as prune=2,tune=1"
    p.add_argument("--epochs", metavar="NAME=N,...", help=f"passes over the data {names}")
    p.add_argument("--rates", metavar="NAME=R,...", help=f"learning rates {names}")
    p.add_argument("--distillation", metavar="NAME=W,...",
                   help="weights of the losses labels, logits, hidden, relations, embedding, "
                   "similarity; temperature")  # fmt: skip
    p.add_argument("--max-length", type=int, metavar="N", help="tokens of a row at most")
    p.add_argument("--tokens-per-batch", type=int, metavar="N")
    p.add_argument("--text-share", type=float, metavar="S", help="of --text in an epoch")
    p.add_argument("--no-joined", dest="joined", action="store_false", default=None,
                   help="do not distil on joined phrases too")  # fmt: skip
    p.add_argument("--prune-until", type=float, metavar="S",
                   help="share of the prune stage after which the pattern is locked")  # fmt: skip
    p.add_argument("--seed", type=int)
    p.add_argument("--device", help="auto, cpu or cuda")
    p.add_argument("--threads", type=int, help="0: all cores")
