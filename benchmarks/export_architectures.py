"""Writes small random models of many architectures, as people's exporters write them.

    python benchmarks/export_architectures.py FOLDER [--only gpt2,vit] [--exporters dynamo,optimum]

Needs torch and transformers, and optimum-onnx for its exporter; sparsec itself is not needed, so
any environment with those packages serves. Each file is FOLDER/ARCHITECTURE-TASK-EXPORTER.onnx.
Then: python benchmarks/architectures.py FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXPORTERS = ("torchscript11", "torchscript", "dynamo", "optimum")
OPSETS = {"torchscript11": 11, "torchscript": 17}  # 11: without sdpa, which needs 14
SEED = 0
BASE = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SPECIAL = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
TASKS = {  # optimum's names; the class of transformers that does each
    "feature-extraction": "Model",
    "fill-mask": "ForMaskedLM",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "text-generation": "LMHeadModel",
    "image-classification": "ForImageClassification",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """`prefix` of its classes in transformers, options of its configuration, and its tasks."""

    prefix: str
    options: dict[str, Any]
    tasks: tuple[str, ...] = ("feature-extraction",)
    types: bool = False  # reads token_type_ids
    cache: bool = False  # also gives the keys and values of all layers
    images: bool = False
    base: dict[str, Any] = field(default_factory=lambda: dict(BASE))


ROBERTA = {"max_position_embeddings": 130, "type_vocab_size": 1, "pad_token_id": 1}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 32,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "max_relative_positions": -1,
    "position_biased_input": False,
    "type_vocab_size": 0,
}
MODERN = {"num_hidden_layers": 4, "max_position_embeddings": 256, "local_attention": 16, **SPECIAL}
VIT = {"image_size": 32, "patch_size": 8, "num_channels": 3, "num_labels": 5}
GPT2 = {"vocab_size": 200, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
ARCHITECTURES = {
    "bert": Architecture("Bert", {}, ("feature-extraction", "fill-mask"), types=True),
    "distilbert": Architecture(
        "DistilBert",
        {"vocab_size": 200, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
        base={},
    ),
    "roberta": Architecture(
        "Roberta", ROBERTA, ("feature-extraction", "fill-mask", "text-classification")
    ),
    "xlm-roberta": Architecture(
        "XLMRoberta", ROBERTA, ("feature-extraction", "token-classification")
    ),
    "electra": Architecture(
        "Electra",
        {"embedding_size": 32},
        ("feature-extraction", "text-classification"),
        types=True,
    ),
    "albert": Architecture(
        "Albert", {"embedding_size": 32}, ("feature-extraction", "fill-mask"), types=True
    ),
    "mpnet": Architecture("MPNet", {}, ("feature-extraction", "fill-mask")),
    "deberta-v2": Architecture(
        "DebertaV2", DEBERTA, ("feature-extraction", "text-classification")
    ),
    "modernbert": Architecture("ModernBert", MODERN, ("feature-extraction", "fill-mask")),
    "vit": Architecture("ViT", VIT, ("feature-extraction", "image-classification"), images=True),
    "gpt2": Architecture("GPT2", GPT2, ("feature-extraction", "text-generation"), base={}),
    "gpt2-cache": Architecture("GPT2", GPT2, ("text-generation",), cache=True, base={}),
    "t5": Architecture(
        "T5",
        {"vocab_size": 200, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2},
        base={"num_heads": 4},
    ),
    "mobilebert": Architecture(
        "MobileBert",
        {"embedding_size": 32, "intra_bottleneck_size": 32, "intermediate_size": 64},
        types=True,
    ),
}


def build(name: str, task: str, attention: str) -> Any:
    """The torch model: random, with biases and norms that are not trivial."""
    import torch
    import transformers

    architecture = ARCHITECTURES[name]
    torch.manual_seed(SEED)
    config_class = getattr(transformers, f"{architecture.prefix}Config")
    config = config_class(**{**architecture.base, **architecture.options})
    config._attn_implementation = attention
    if hasattr(config, "use_cache"):
        config.use_cache = architecture.cache
    class_name = f"{architecture.prefix}{TASKS[task]}"
    class_name = {"T5Model": "T5EncoderModel"}.get(class_name, class_name)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def export_torch(name: str, task: str, exporter: str, path: Path) -> None:
    """Through torch.onnx.export, with dynamic batch and sequence."""
    import torch

    architecture = ARCHITECTURES[name]
    attention = "eager" if exporter == "torchscript11" or name in _EAGER_ONLY else "sdpa"
    wrapped = _wrapper(build(name, task, attention), architecture)
    names, arguments = _arguments(architecture)
    with torch.no_grad():
        count = len(wrapped(*arguments))
    outputs = [f"out{i}" for i in range(count)]
    dims = {0: "batch"} if architecture.images else {0: "batch", 1: "seq"}
    if exporter == "dynamo":
        limit = torch.export.Dim("batch"), torch.export.Dim("seq", max=128)
        dynamic = tuple({axis: limit[axis] for axis in dims} for _ in names)
        how: dict[str, Any] = {
            "dynamo": True,
            "dynamic_shapes": (dynamic,),
            "external_data": False,
            "verbose": False,
        }
    else:
        axes = dict.fromkeys(names, dims)
        how = {"dynamo": False, "opset_version": OPSETS[exporter], "dynamic_axes": axes}
    torch.onnx.export(wrapped, arguments, path, input_names=names, output_names=outputs, **how)


_EAGER_ONLY = ("deberta-v2", "mpnet", "t5", "mobilebert")


def _arguments(architecture: Architecture) -> tuple[list[str], tuple[Any, ...]]:
    import torch

    if architecture.images:
        return ["pixel_values"], (torch.randn(2, 3, 32, 32),)
    ids = torch.randint(3, 200, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    names, arguments = ["input_ids", "attention_mask"], [ids, mask]
    if architecture.types:
        names.append("token_type_ids")
        arguments.append(torch.zeros_like(ids))
    return names, tuple(arguments)


def _wrapper(model: Any, architecture: Architecture) -> Any:
    """A module that takes the inputs in order and returns a flat tuple of tensors."""
    import torch

    names, _ = _arguments(architecture)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *arguments: Any) -> tuple[Any, ...]:
            result = self.model(**dict(zip(names, arguments, strict=True)))
            flat: list[Any] = []
            for key, item in result.items():
                if key == "past_key_values":
                    flat += [x for layer in item.layers for x in (layer.keys, layer.values)]
                elif item is not None:
                    flat.append(item)
            return tuple(flat)

    return Wrapped().eval()


def export_optimum(name: str, task: str, path: Path) -> None:
    """Through optimum's exporter, which chooses attention, names and opset by itself."""
    from optimum.exporters.onnx import onnx_export_from_model

    architecture = ARCHITECTURES[name]
    if architecture.cache:
        task = f"{task}-with-past"  # keys and values are inputs as well as outputs
    with tempfile.TemporaryDirectory() as folder:
        model = build(name, task.removesuffix("-with-past"), _optimum_attention(name))
        onnx_export_from_model(model, Path(folder), task=task, do_validation=False)
        found = sorted(Path(folder).glob("*.onnx"))
        path.write_bytes(found[0].read_bytes())


def _optimum_attention(name: str) -> str:
    return "eager" if name in (*_EAGER_ONLY, "electra") else "sdpa"


def jobs(only: list[str], exporters: list[str]) -> Iterator[tuple[str, str, str]]:
    for name, exporter in itertools.product(only, exporters):
        for task in ARCHITECTURES[name].tasks:
            yield name, task, exporter


def main() -> int:
    parser = argparse.ArgumentParser(description="Write small models of many architectures.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(ARCHITECTURES))
    parser.add_argument("--exporters", default=",".join(EXPORTERS[:3]))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, task, exporter in jobs(options.only.split(","), options.exporters.split(",")):
        path = options.folder / f"{name}-{task}-{exporter}.onnx"
        noise = io.StringIO()
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(noise):
                warnings.simplefilter("ignore")
                if exporter == "optimum":
                    export_optimum(name, task, path)
                else:
                    export_torch(name, task, exporter, path)
            print(f"{path.name}: {path.stat().st_size >> 10} KiB", flush=True)
        except Exception as error:  # an exporter that can not is a fact to report, not to stop at
            failed += 1
            first = str(error).strip().split("\n")[0][:160]
            print(f"{path.name}: {type(error).__name__}: {first}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
