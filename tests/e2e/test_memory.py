"""What a process has resident at most: the library's pages that were touched, and the arena."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.models.build import build_model
from sparsec.models.tiny import tiny_spec
from sparsec.options import Calibration
from sparsec.runtime import describe

WORDS, CHANNELS, TOKENS = 32768, 128, 128
TABLE = WORDS * (CHANNELS + 4)  # bytes as int8 with a scale per row
# Touches every group of 16 pages, which Linux maps at once around a fault, of the table in fp32.
CHILD = f"""
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from loader_copy import load

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
model = load(sys.argv[2], threads=1)
arrays = {{port.name: np.ones((1, {TOKENS}), np.int64) for port in model.inputs}}
arrays["token_type_ids"][:] = 0
for first in range(0, 128, 32):
    arrays["input_ids"][:] = np.arange({TOKENS}) * {WORDS // TOKENS} + first
    model(arrays)
    arrays["input_ids"] += 128
    model(arrays)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8, with an embedding table that is most of it."""
    folder = tmp_path_factory.mktemp("memory")
    spec = tiny_spec(layers=1, hidden=CHANNELS, ffn=256, vocab=WORDS, positions=TOKENS)
    onnx.save(build_model(spec, seed=0), folder / "model.onnx")
    samples = {
        name: np.full((2, 16), value, np.int64)
        for name, value in (("input_ids", 7), ("attention_mask", 1), ("token_type_ids", 0))
    }
    np.savez(folder / "samples.npz", allow_pickle=False, **samples)
    result = sparsec.compile_model(
        folder / "model.onnx",
        folder / "model.so",
        precision="int8",
        calibration=Calibration(data=folder / "samples.npz"),
    )
    (record,) = [r for r in result.report["passes"] if r["name"] == "quantize_tables"]
    assert "stored in int8" in record["notes"][0]
    return result.library


def test_peak_resident_is_the_int8_weights_and_the_arena(library: Path) -> None:
    arena = describe(library)["arena"]
    assert arena["example"] == f"1x{TOKENS}"
    # The loader under a name that Python does not take for the library's own.
    library.with_name("loader_copy.py").write_bytes(library.with_suffix(".py").read_bytes())
    command = [sys.executable, "-c", CHILD, str(library.parent), str(library)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # 3 MB: code, weights of the layer (0.2 MB), stacks, the description and arrays in Python.
    # The table in fp32 would be 16 MB.
    assert int(out) < TABLE + arena["bytes"] + 3e6
    assert int(out) > TABLE  # all of it was read


def test_the_arena_is_what_the_description_says(library: Path) -> None:
    model = sparsec.load(library, threads=1)
    shape = (1, TOKENS)
    model({p.name: np.full(shape, p.name == "attention_mask", np.int64) for p in model.inputs})
    (context,) = model._idle
    assert model._model.arena_bytes(context.handle) == model.description["arena"]["bytes"]


def test_the_file_holds_no_fp32_table(library: Path) -> None:
    assert TABLE < library.stat().st_size < TABLE + 1.5e6
