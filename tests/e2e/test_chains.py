"""A run that takes some panels through a chain at a time gives what one step by step gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsec
from sparsec import stages
from sparsec.models.build import Pruning, build_model
from sparsec.models.tiny import tiny_spec
from sparsec.options import Calibration
from sparsec.passes import find_chains
from sparsec.target import Isa
from sparsec.tools.inputs import random_inputs

# Around the edges of panels of 64 tokens and of blocks of two panels; and a last batch that packs.
SIZES = [(1, 64), (1, 65), (2, 64), (1, 129), (3, 65), (5, 64), (1, 300), (6, 100), (9, 128)]

Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """`compiled(isa, chains, dynamic)`: an int8 model, with chains of two panels or none."""
    folder = tmp_path_factory.mktemp("chains")
    spec = tiny_spec(ffn=256, positions=300)
    onnx.save(build_model(spec, pruning=Pruning(0.7, 4, 1)), folder / "m.onnx")
    ones = np.ones((8, 40), np.int64)
    ids = np.random.default_rng(0).integers(0, 100, ones.shape)
    arrays = {"input_ids": ids, "attention_mask": ones, "token_type_ids": 0 * ones}
    np.savez(folder / "samples.npz", allow_pickle=False, **arrays)

    def make(isa: str, chains: bool, dynamic: bool = False) -> Path:
        path = folder / f"{isa}-{chains}-{dynamic}.so"
        if path.exists():
            return path
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(find_chains, "SHARE_OF_L2", 1e-9)
            if not chains:
                patch.setattr(stages, "_chained", lambda graph, target: None)
            quantised = {} if dynamic else {"calibration": Calibration(folder / "samples.npz")}
            sparsec.compile_model(
                folder / "m.onnx", path, precision="int8", dynamic=dynamic,
                target="sapphirerapids", isa=Isa(isa), **quantised,
            )  # fmt: skip
        return path

    return make


@pytest.mark.parametrize(
    ("isa", "dynamic"),
    [
        pytest.param("avx2", False, marks=pytest.mark.isa("avx2")),
        pytest.param("avx512vnni", False, marks=pytest.mark.isa("avx512vnni")),
        pytest.param("avx512vnni", True, marks=pytest.mark.isa("avx512vnni")),
    ],
)
def test_chained_equals_step_by_step(compiled: Compile, isa: str, dynamic: bool) -> None:
    plain, chained = (compiled(isa, chains, dynamic) for chains in (False, True))
    with_chains = sparsec.load(chained).description["chains"]
    assert len(with_chains) >= 2  # one for each layer
    assert {chain["panels_at_a_time"] for chain in with_chains} == {2}
    assert "chains" not in sparsec.load(plain).description
    one = sparsec.load(plain, threads=1)
    for threads in (1, 2, 3):
        model = sparsec.load(chained, threads=threads)
        for batch, seq in SIZES:
            for padding in (False, True):
                arrays = random_inputs(model, batch, seq, seed=seq, padding=padding)
                wanted, got = one(arrays), model(arrays)
                for name, array in wanted.items():
                    assert np.array_equal(got[name], array), (threads, batch, seq, padding, name)


@pytest.mark.isa("avx2")
def test_a_chain_needs_less_memory(compiled: Compile) -> None:
    """What is made and read inside a chain is there for two panels, not for all."""
    arena = []
    for chains in (False, True):
        model = sparsec.load(compiled("avx2", chains), threads=1)
        model(random_inputs(model, 300, 128, seed=0, padding=False))
        (context,) = model._idle
        arena.append(model._model.arena_bytes(context.handle))
    assert arena[1] < arena[0]


@pytest.mark.isa("avx2")
def test_times_of_a_chain_are_those_of_its_steps(compiled: Compile) -> None:
    model = sparsec.load(compiled("avx2", chains=True), threads=1)
    arrays = random_inputs(model, 5, 64, seed=0, padding=False)
    _, seconds = model.run_timed(arrays)
    steps = model.description["steps"]
    timed = {step["op"] for step, s in zip(steps, seconds, strict=True) if s > 0}
    assert {"linear_int8", "layer_norm", "attention_int8"} <= timed
