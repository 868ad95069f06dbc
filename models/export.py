"""Exports a Hugging Face model folder to ONNX through torch, and checks the result against torch.

torch and transformers come with the extra `compress` and are imported inside functions only.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from sparsec.errors import CompilerError, InvalidInput
from sparsec.models.evaluate import Evaluator, evaluator
from sparsec.models.files import write_model
from sparsec.models.registry import Head, output_names

Array = NDArray[Any]
Exporter = Literal["torchscript", "dynamo"]

# First, last and usual opset that each writes.
EXPORTERS: dict[Exporter, tuple[int, int, int]] = {
    "torchscript": (11, 20, 17),
    "dynamo": (18, 25, 18),
}
CHECKED_SHAPES = ((1, 1), (1, 7), (3, 33), (2, 128))  # batch, seq
# Both sides sum in fp32 in their own order: some 1e-6 on activations of size 1 to 10.
LARGEST_DIFFERENCE = 1e-3

AUTO_CLASSES: dict[Head, str] = {
    "none": "AutoModel",
    "classify": "AutoModelForSequenceClassification",
    "qa": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The files written, and each output's largest absolute difference to torch."""

    files: list[Path]
    differences: dict[str, float]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A torch module that takes `inputs` in order and returns `outputs` in order."""

    module: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    vocab: int
    positions: int


def export_file(
    folder: Path,
    path: Path,
    *,
    head: Head = "none",
    opset: int | None = None,
    exporter: Exporter = "torchscript",
    on_step: Callable[[str], None] = lambda step: None,
) -> ExportResult:
    """Export the model in `folder` to `path`, unless ONNX and torch disagree about its outputs."""
    first, last, usual = EXPORTERS[exporter]
    opset = usual if opset is None else opset
    if not first <= opset <= last:
        raise InvalidInput(f"the {exporter} exporter writes opset {first} to {last}, not {opset}")
    check_folder(folder)
    on_step("loading torch and the model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: what they fear is checked below
        loaded = _load(folder, head)
        on_step("exporting")
        model = trace_model(loaded, opset, exporter)
    on_step("comparing with torch")
    differences = _differences(loaded, model)
    for name, difference in differences.items():
        if not difference <= LARGEST_DIFFERENCE:  # NaN fails too
            raise CompilerError(
                f"{folder}: the exported {name} differs from torch's by {difference:.2e} "
                f"(allowed {LARGEST_DIFFERENCE:.0e}); nothing was written, try another exporter"
            )
    on_step("writing")
    return ExportResult(write_model(model, path), differences)


def check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: is not a folder")
    if not (folder / "config.json").is_file():
        raise InvalidInput(f"{folder}: holds no config.json; wanted a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise InvalidInput(f"{folder}: holds no weights (*.safetensors)")


def load_pretrained(folder: Path, head: Head, **options: Any) -> tuple[Any, list[str]]:
    """Return the fp32 torch model in `folder` and the names of weights that the folder lacks.

    `options` go to transformers. Attention is spelled out: exporters know its operators, and a
    training step on a CPU takes a third of the time that it does with torch's fused attention.
    Raises InvalidInput for a folder that holds no such model, or weights of other shapes.
    """
    check_folder(folder)
    auto = getattr(_import_transformers(), AUTO_CLASSES[head])
    try:
        model, info = auto.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            dtype="float32",
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
            **options,
        )
    except Exception as error:  # transformers and safetensors raise many kinds for a bad folder
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise InvalidInput(f"{folder}: cannot be loaded by transformers: {first_line}") from error
    for name, there, wanted in sorted(info["mismatched_keys"]):
        raise InvalidInput(f"{folder}: {name} is {list(there)}, wanted {list(wanted)}")
    return model, sorted(str(key) for key in info["missing_keys"])


def _load(folder: Path, head: Head) -> Loaded:
    model, missing = load_pretrained(folder, head)
    without_pooler = bool(missing) and all("pooler." in key for key in missing)
    if missing and not (head == "none" and without_pooler):
        raise InvalidInput(
            f"{folder}: has no weights for {', '.join(missing[:4])}"
            f"{' ...' if len(missing) > 4 else ''}; choose another --head than {head!r}"
        )
    return wrap_model(model.eval(), head, with_pooler=not without_pooler)


def _import_transformers() -> Any:
    try:
        import torch  # noqa: F401  (transformers imports without it and fails later)
        import transformers
    except ImportError as error:
        raise InvalidInput(
            f"export needs torch and transformers ({error}): pip install 'sparsec[compress]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def wrap_model(model: Any, head: Head, *, with_pooler: bool) -> Loaded:
    """Give the model a plain signature: tensors in, tuple of tensors out."""
    import torch

    config = model.config
    inputs = ["input_ids", "attention_mask"]
    accepted = inspect.signature(model.forward).parameters
    if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1:
        inputs.append("token_type_ids")
    with_pooler = with_pooler and getattr(model, "pooler", None) is not None
    outputs = output_names(head, with_pooler=with_pooler)

    class Plain(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> tuple[Any, ...]:
            result = self.model(**dict(zip(inputs, tensors, strict=True)))
            return tuple(result[name] for name in outputs)

    # RoBERTa counts positions from the padding id on.
    offset = 2 if "roberta" in config.model_type else 0
    positions = config.max_position_embeddings - offset
    return Loaded(Plain().eval(), tuple(inputs), outputs, config.vocab_size, positions)


def trace_model(loaded: Loaded, opset: int, exporter: Exporter) -> onnx.ModelProto:
    """Return the ONNX model that torch's exporter makes of it, batch and seq free."""
    import torch

    feed = _example(loaded, 2, min(16, loaded.positions))
    tensors = tuple(torch.from_numpy(feed[name]) for name in loaded.inputs)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "model.onnx")
        try:
            with torch.no_grad(), _quiet_log("torch.onnx"):
                torch.onnx.export(
                    loaded.module,
                    tensors,
                    str(part),
                    input_names=list(loaded.inputs),
                    output_names=list(loaded.outputs),
                    opset_version=opset,
                    **_exporter_options(loaded, exporter),
                )
            return onnx.load(part)
        except Exception as error:  # torch raises many kinds for what it cannot trace
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            raise CompilerError(f"torch cannot export this model: {first_line}") from error


@contextlib.contextmanager
def _quiet_log(name: str) -> Iterator[None]:
    """Hold back what a logger says below an error."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _exporter_options(loaded: Loaded, exporter: Exporter) -> dict[str, Any]:
    """What makes batch and seq dynamic, in the words of the exporter."""
    if exporter == "dynamo":
        from torch.export import Dim

        axes = {0: Dim("batch"), 1: Dim("seq")}
        return {
            "dynamo": True,
            "dynamic_shapes": {"tensors": (axes,) * len(loaded.inputs)},
            "external_data": False,
            "verbose": False,
        }
    by_token = {0: "batch", 1: "seq"}
    names = (*loaded.inputs, *loaded.outputs)
    by_sequence = ("pooler_output", "logits")
    dynamic = {name: {0: "batch"} if name in by_sequence else by_token for name in names}
    return {"dynamo": False, "dynamic_axes": dynamic}


def _example(loaded: Loaded, batch: int, seq: int) -> dict[str, Array]:
    """Random tokens; the last sequence is padded from its middle on."""
    random = np.random.default_rng(batch * 1000 + seq)
    mask = np.ones((batch, seq), np.int64)
    mask[-1, seq // 2 + 1 :] = 0
    # Ids 0 and 1 are the padding of BERT and RoBERTa: kept for the padding.
    ids = np.where(mask == 1, random.integers(2, loaded.vocab, (batch, seq)), 1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": random.integers(0, 2, (batch, seq)),
    }


def _differences(loaded: Loaded, model: onnx.ModelProto) -> dict[str, float]:
    """Largest absolute difference of each output over several shapes."""
    worst = dict.fromkeys(loaded.outputs, 0.0)
    for name, wanted, got in compared(loaded, evaluator(model)):
        worst[name] = float(np.maximum(worst[name], np.abs(got - wanted).max()))
    return worst


def compared(
    loaded: Loaded, run: Evaluator, shapes: Iterable[tuple[int, int]] = CHECKED_SHAPES
) -> Iterator[tuple[str, Array, Array]]:
    """Each output's name, torch's answer and that of `run`, for shapes of [batch, seq]."""
    import torch

    for batch, seq in shapes:
        feed = _example(loaded, batch, min(seq, loaded.positions))
        feed = {name: feed[name] for name in loaded.inputs}
        with torch.no_grad():
            wanted = loaded.module(*(torch.from_numpy(value) for value in feed.values()))
        got = run(feed)
        for name, tensor in zip(loaded.outputs, wanted, strict=True):
            if got[name].shape != tuple(tensor.shape):
                raise CompilerError(
                    f"the exported {name} has shape {list(got[name].shape)} where torch gives "
                    f"{list(tensor.shape)}; nothing was written"
                )
            yield name, tensor.numpy(), got[name]
