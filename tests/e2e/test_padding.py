"""Models that do not compute padding: the same answers at real tokens, zeros at padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.errors import InvalidInput
from sparsec.models.tiny import tiny_model
from sparsec.options import Calibration
from sparsec.runtime import Model
from sparsec.target import Isa
from sparsec.tools.inputs import random_inputs
from sparsec.tools.verify import without_padding

# fp32: sums of up to 64 products of order 1 in another order, through two layers.
TOLERANCE = 1e-5
SIZES = [(1, 1), (1, 7), (3, 33), (2, 63), (9, 16)]
RANDOM = {"precision": "int8", "calibration": Calibration(random=True)}
DYNAMIC = {"precision": "int8", "dynamic": True}
PRECISIONS: dict[str, dict] = {"fp32": {}, "int8": RANDOM, "dynamic": DYNAMIC,
                               "int8-avx2": {"isa": Isa.AVX2, **RANDOM}}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """`pair(precision, head)`: a tiny model that drops padding, and one that computes it."""
    folder = tmp_path_factory.mktemp("padding")

    def make(precision: str, head: str) -> tuple[Path, Path]:
        name = f"{precision}-{head}"
        packed, kept = folder / f"{name}.so", folder / f"{name}-kept.so"
        if not packed.exists():
            path = folder / f"{name}.onnx"
            onnx.save(tiny_model("bert", head=head), path)
            options = PRECISIONS[precision]
            sparsec.compile_model(path, packed, **options)
            sparsec.compile_model(path, kept, keep_padding=True, **options)
        return packed, kept

    return make


def masks(batch: int, seq: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([batch, seq])
    right = np.arange(seq) < rng.integers(1, seq + 1, (batch, 1))
    empty = right.copy()
    empty[0] = False
    holes = rng.random((batch, seq)) < 0.5
    every = {"full": np.ones_like(right), "right": right, "left": right[:, ::-1], "holes": holes,
             "a sequence of padding": empty, "nothing": np.zeros_like(right)}  # fmt: skip
    return {name: mask.astype(np.int64) for name, mask in every.items()}


def check(packed: Model, kept: Model, size: tuple[int, int], *, exact: bool) -> None:
    arrays = random_inputs(kept, *size, seed=sum(size), padding=False)
    for name, mask in masks(*size).items():
        arrays["attention_mask"] = mask
        wanted = without_padding(packed, arrays, kept(arrays))
        for output, got in packed(arrays).items():
            if exact:
                np.testing.assert_array_equal(got, wanted[output], err_msg=name)
            else:
                np.testing.assert_allclose(got, wanted[output], atol=TOLERANCE, err_msg=name)


CASES = [("fp32", "none"), ("fp32", "qa"), ("int8", "classify"), ("int8-avx2", "none"),
         ("dynamic", "classify"), ("dynamic", "qa")]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("precision", "head"), CASES)
def test_answers_are_those_of_the_model_that_computes_padding(
    pair: Callable[[str, str], tuple[Path, Path]], precision: str, head: str, threads: int
) -> None:
    """int8: to the last bit, as its sums are of integers and its other steps are per token."""
    packed, kept = (sparsec.load(path, threads=threads) for path in pair(precision, head))
    assert packed.description["padding"]["dropped"]
    assert not kept.description["padding"]["dropped"]
    attention = {s["kernel"] for s in kept.description["steps"] if "attention" in s["kernel"]}
    exact = all(kernel.startswith("attention_u8") for kernel in attention)
    for size in SIZES:
        check(packed, kept, size, exact=exact)


def test_description_says_which_outputs_are_zero(pair: Callable) -> None:
    qa, _ = pair("fp32", "qa")
    padding = sparsec.load(qa).description["padding"]
    assert padding["mask"] == "attention_mask"
    assert padding["outputs"] == ["start_logits", "end_logits"]
    classify, kept = pair("int8", "classify")
    assert sparsec.load(classify).description["padding"]["outputs"] == []
    assert "--keep-padding" in sparsec.load(kept).description["padding"]["why"]


def test_calls_do_not_leave_their_lengths_behind(pair: Callable) -> None:
    """One context, the same shapes, other masks: what a call finds is of that call alone."""
    packed = sparsec.load(pair("fp32", "none")[0], threads=2)
    arrays = random_inputs(packed, 9, 16, seed=0, padding=False)
    cases = [{**arrays, "attention_mask": mask} for mask in masks(9, 16).values()]
    first = [packed(case)["last_hidden_state"].copy() for case in cases]
    for case, wanted in zip(reversed(cases), reversed(first), strict=True):
        np.testing.assert_array_equal(packed(case)["last_hidden_state"], wanted)


def test_ids_at_padding_are_not_read(pair: Callable) -> None:
    packed, kept = (sparsec.load(path, threads=1) for path in pair("fp32", "none"))
    arrays = random_inputs(packed, 2, 8, seed=0, padding=False)
    arrays["attention_mask"][1, 5:] = 0
    arrays["input_ids"][1, 5:] = -(10**6)
    assert not packed(arrays)["last_hidden_state"][1, 5:].any()
    with pytest.raises(InvalidInput, match="out of range"):
        kept(arrays)


@pytest.mark.parametrize("size", [(3, 33), (1, 16), (1, 1)])
def test_fixed_sizes(size: tuple[int, int], pair: Callable, tmp_path: Path) -> None:
    onnx.save(tiny_model("bert"), tmp_path / "m.onnx")
    shapes = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), size)
    sparsec.compile_model(tmp_path / "m.onnx", tmp_path / "m.so", shapes=shapes)
    packed, kept = (
        sparsec.load(p, threads=1) for p in (tmp_path / "m.so", pair("fp32", "none")[1])
    )
    check(packed, kept, size, exact=False)
