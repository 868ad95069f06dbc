"""Fixtures that all tests share."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsec.codegen import toolchain
from sparsec.target import Isa, Target, may_use_tiles

GOLDEN = Path(__file__).parent / "golden"
AMX = Path(__file__).parent / "amx"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests whose `isa(name)` mark this CPU does not meet, and says which."""
    host = Target.host()
    for item in items:
        for mark in item.iter_markers("isa"):
            isa = Isa(mark.args[0])
            # Tile instructions are emulated: see `amx`.
            if not host.has(Isa.AVX512_VBMI2 if isa is Isa.AMX else isa):
                item.add_marker(pytest.mark.skip(reason=f"this CPU has no {isa.value}"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20230616)


@pytest.fixture(scope="session")
def host() -> Target:
    return Target.host()


@pytest.fixture(scope="session")
def zig(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """`zig("cc", ...)`, without an error and without a warning."""
    folder = str(tmp_path_factory.mktemp("zig"))
    env = {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}

    def call(*args: str) -> None:
        command = [sys.executable, "-m", "ziglang", *args]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr

    return call


@pytest.fixture(scope="session")
def emulate_amx(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], ctypes.CDLL]:
    """Makes this process run tile instructions through `amx/emulator.c`; returns its library."""
    folder = tmp_path_factory.mktemp("emulator")

    def install() -> ctypes.CDLL:
        library = build_emulator(folder)
        assert library.amx_emulator_install() == 0
        return library

    return install


def build_emulator(folder: Path) -> ctypes.CDLL:
    tools = toolchain.find_toolchain(None)
    output = folder / "emulator.so"
    if not output.exists():
        source = AMX / "emulator.c"
        flags = [*toolchain.C_FLAGS, "-fvisibility=default", "-O3", "-Werror"]
        cache = {n: str(folder) for n in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
        compile = [*tools.compile, *flags, str(source), "-o", str(folder / "emulator.o")]
        subprocess.run(compile, check=True, env={**os.environ, **cache})
        subprocess.run([*tools.link, str(folder / "emulator.o"), "-o", str(output)], check=True)
    library = ctypes.CDLL(str(output))
    library.amx_emulator_executed.restype = ctypes.c_uint64
    return library


@pytest.fixture(scope="session")
def amx(request: pytest.FixtureRequest, host: Target) -> ctypes.CDLL | None:
    """Tile instructions can be executed in this process: by the CPU, or else by the emulator,
    whose library this is then. On a CPU without AMX, tests of AMX kernels need AVX512-VBMI2."""
    if not host.has(Isa.AMX):
        library: ctypes.CDLL = request.getfixturevalue("emulate_amx")()
        return library
    assert may_use_tiles()
    return None


@pytest.fixture
def amx_models(
    amx: ctypes.CDLL | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> ctypes.CDLL | None:
    """Libraries compiled during the test run here even if they use AMX: where it is emulated they
    get a CPU check that accepts every machine."""
    if amx is not None:
        runtime = tmp_path / "runtime"
        shutil.copytree(toolchain.RUNTIME, runtime)
        shutil.copyfile(AMX / "cpu_check.c", runtime / "src" / "cpu_check.c")
        monkeypatch.setattr(toolchain, "RUNTIME", runtime)
    return amx


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with `tests/golden/NAME.txt`; `--update-golden` rewrites the file."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert path.exists(), f"{path.name} is missing: run pytest --update-golden"
        assert text == path.read_text()

    return check
