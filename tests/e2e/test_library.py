"""The shared library stands alone, is small and is reproducible."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import sparsec
from sparsec.tools.inputs import random_inputs

Build = Callable[..., tuple[Path, Path]]
GLIBC = {"linux-vdso.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}


@pytest.mark.skipif(shutil.which("ldd") is None, reason="this system has no ldd")
def test_needs_only_glibc(build: Build) -> None:
    _, library = build("tiny-bert")
    lines = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    needed = {Path(line.split()[0]).name for line in lines.splitlines() if line.strip()}
    assert needed <= GLIBC


def test_size_is_the_weights(build: Build) -> None:
    path, library = build("bert-mini")
    assert library.stat().st_size < 1.1 * path.stat().st_size


def test_same_input_same_bytes(build: Build, tmp_path: Path) -> None:
    path, library = build("tiny-bert")
    again = tmp_path / "again.so"
    code = f"import sparsec; sparsec.compile_model({str(path)!r}, {str(again)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)  # a process with other hash seeds
    assert _digest(again) == _digest(library)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_runs_where_only_numpy_is_installed(build: Build, tmp_path: Path) -> None:
    _, library = build("tiny-bert")
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / "env" / "lib" / version / "site-packages"
    source = Path(np.__file__).parent
    (packages / "numpy").symlink_to(source)
    if (source.parent / "numpy.libs").exists():
        (packages / "numpy.libs").symlink_to(source.parent / "numpy.libs")
    shutil.copy(library, tmp_path / "model.so")
    shutil.copy(library.with_suffix(".py"), tmp_path / "model.py")
    code = (
        "import runpy, sys, numpy;"
        "m = runpy.run_path('model.py')['load']('model.so');"
        "a = {i.name: numpy.ones((2, 5), i.dtype) for i in m.inputs};"
        "out = m(a);"
        "assert 'sparsec' not in sys.modules;"
        "print(*(f'{n}:{v.shape}' for n, v in out.items()))"
    )
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "last_hidden_state:(2, 5, 32)" in done.stdout


def test_two_models_in_one_process(build: Build) -> None:
    _, bert = build("tiny-bert")
    _, distilbert = build("tiny-distilbert")
    first, second = sparsec.load(bert), sparsec.load(distilbert)
    a = random_inputs(first, 2, 9, seed=3, padding=True)
    b = random_inputs(second, 1, 4, seed=4, padding=True)
    wanted_a, wanted_b = first(a), second(b)
    for name, array in first(a).items():
        np.testing.assert_array_equal(array, wanted_a[name])
    for name, array in second(b).items():
        np.testing.assert_array_equal(array, wanted_b[name])
