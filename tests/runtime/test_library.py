"""What the file is: exported symbols, needed libraries, use from C, checks of the CPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsec import errors
from sparsec.codegen.isa import FEATURES
from sparsec.runtime import describe, load, loader
from sparsec.target import Isa, Target, required_flags

ROOT = Path(__file__).parents[2]
INCLUDE = Path(loader.__file__).parent / "include"
SOURCES = Path(loader.__file__).parent / "src"
EXAMPLE = ROOT / "examples" / "run_from_c" / "main.c"
GLIBC = {"libc.so.6", "libm.so.6", "libpthread.so.0"}
CLibrary = Callable[..., Path]


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"this system has no {name}")
    return path


@pytest.fixture
def c_library(zig: Callable[..., None], tmp_path: Path) -> CLibrary:
    """A shared library of one C file; an executable would take zig half a minute."""

    def build(source: Path, *flags: str) -> Path:
        compiled, library = tmp_path / "x.o", tmp_path / f"{source.stem}.so"
        target = ("-target", "x86_64-linux-gnu.2.17", "-O2", "-fno-sanitize=all")
        zig("cc", "-c", "-fPIC", *target, *flags, str(source), "-o", str(compiled))
        zig("ld.lld", "-shared", str(compiled), "-o", str(library))
        return library

    return build


def test_exports_one_symbol(library: Path) -> None:
    shown = subprocess.run(
        [_tool("nm"), "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in shown.stdout.splitlines()] == ["sparsec_query"]


def test_has_no_variables(library: Path) -> None:
    """Contexts can share no lock and no state: all that can be written is for the dynamic linker,
    which makes it read-only."""
    shown = subprocess.run(
        [_tool("readelf"), "-SW", library], capture_output=True, text=True, check=True
    ).stdout
    # "[ 14] .data.rel.ro PROGBITS address offset size entry-size flags ..."
    rows = re.findall(r"\] (\.\S+) +[A-Z]\S*(?: +[0-9a-f]+){4} +([A-Za-z]*) ", shown)
    assert (".text", "AX") in rows
    writable = {name for name, flags in rows if "W" in flags}
    assert writable <= {".data.rel.ro", ".dynamic", ".got", ".got.plt", ".relro_padding"}


def test_needs_old_glibc_only(library: Path) -> None:
    shown = subprocess.run(
        [_tool("readelf"), "-dVW", library], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", shown))
    assert needed <= GLIBC
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([\d.]+)", shown)}
    assert versions
    assert max(versions) <= (2, 17)


def _build_example(compiler: str, c_library: CLibrary, folder: Path) -> list[str]:
    """The command that runs examples/run_from_c."""
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}"]
    if compiler == "zig":
        library = c_library(EXAMPLE, *flags)
        call = (
            "import ctypes, sys; words = [w.encode() for w in sys.argv];"
            f"library = ctypes.CDLL({str(library)!r});"
            "sys.exit(library.main(len(words), (ctypes.c_char_p * (len(words) + 1))(*words)))"
        )
        return [sys.executable, "-c", call]
    program = str(folder / "run_from_c")
    command = [_tool(compiler), *flags, str(EXAMPLE), "-ldl", "-o", program]
    subprocess.run(command, check=True)
    return [program]


@pytest.mark.parametrize("compiler", ["zig", "gcc"])
def test_runs_from_c(
    compiler: str,
    library: Path,
    expected: Callable[..., dict[str, np.ndarray[Any, Any]]],
    c_library: CLibrary,
    tmp_path: Path,
) -> None:
    command = _build_example(compiler, c_library, tmp_path)
    shown = subprocess.run(
        [*command, library, "2", "3"], capture_output=True, text=True, check=True
    ).stdout
    assert '"name": "hand"' in shown
    ids = (1 + np.arange(6) % 20).reshape(2, 3)
    x = (0.01 * np.arange(24)).reshape(2, 3, 4)
    wanted = expected(ids, x)
    for name, shape in (("y", "[2, 3, 4]"), ("z", "[2, 4]")):
        line = next(s for s in shown.splitlines() if s.startswith(f"{name}: "))
        values = [float(v) for v in line.removeprefix(f"{name}: {shape} ").split()]
        np.testing.assert_allclose(values, wanted[name].ravel()[:8], rtol=1e-5)
    failed = subprocess.run([*command, "missing.so"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "missing.so" in failed.stderr


@pytest.mark.parametrize(("name", "standard"), [("c", "c99"), ("c", "c11"), ("cpp", "c++17")])
def test_header_is_plain(
    name: str, standard: str, zig: Callable[..., None], tmp_path: Path
) -> None:
    source = tmp_path / f"use.{name}"
    source.write_text('#include "sparsec.h"\nint use(void) { return (int)SPARSEC_OK; }\n')
    strict = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{INCLUDE}", "-nostdlibinc"]
    # Only stdint.h, which is clang's own: with `zig c++` a C++ library would be built first.
    args = [f"-std={standard}", "-ffreestanding", *strict, "-c", str(source)]
    zig("cc", *args, "-o", str(tmp_path / "use.o"))


def test_runtime_compiles_without_warnings(zig: Callable[..., None], tmp_path: Path) -> None:
    strict = ["-std=c11", "-Wall", "-Wextra", "-pedantic", "-Wconversion", "-Wno-sign-conversion"]
    for source in sorted(SOURCES.glob("*.c")):
        args = [*strict, "-Werror", f"-I{INCLUDE}", "-c", str(source)]
        zig("cc", *args, "-o", str(tmp_path / "x.o"))


def test_lines_of_c_have_100_columns_at_most() -> None:
    files = [f for folder in (INCLUDE, SOURCES) for f in folder.iterdir()]
    lines = [(f.name, line) for f in [*files, EXAMPLE] for line in f.read_text().splitlines()]
    assert [(name, line) for name, line in lines if len(line) > 100] == []


def test_unsupported_cpu_is_an_error(build_hand: Callable[..., Path]) -> None:
    """A library for the first level that this machine lacks."""
    lacking = [isa for isa in Isa if not Target.host().has(isa)]
    if not lacking:
        pytest.skip("this machine has every level; test_libraries_of_others covers the refusal")
    path = build_hand("foreign", isa=lacking[0])
    with pytest.raises(
        errors.UnsupportedCpu, match=rf"compiled for {lacking[0].value}; this machine lacks \w+"
    ):
        load(path)
    assert describe(path)["isa"] == lacking[0].value


_FAKE = """
#include "sparsec.h"
static const char *missing(void) { return "WARP-9"; }
static const sparsec_model_v1 model = {
    .struct_bytes = sizeof(sparsec_model_v1) - SHORTER, .abi_version = VERSION, .name = "fake",
    .description = "{}", .required_isa = "warp", .missing_feature = missing};
const sparsec_model_v1 *sparsec_query(uint32_t version) { return version == VERSION ? &model : 0; }
"""


def _fake_library(c_library: CLibrary, folder: Path, version: int = 1, shorter: int = 0) -> Path:
    source = folder / "fake.c"
    source.write_text(_FAKE)
    defines = [f"-DVERSION={version}", f"-DSHORTER={shorter}", f"-I{INCLUDE}"]
    return c_library(source, *defines)


@pytest.mark.parametrize(
    ("version", "shorter", "error", "message"),
    [
        (1, 0, errors.UnsupportedCpu, "compiled for warp; this machine lacks WARP-9"),
        (2, 0, errors.AbiMismatch, "does not speak version 1 of the model ABI"),
        (1, 32, errors.UnsupportedCpu, "compiled for warp; this machine lacks WARP-9"),
        (1, 40, errors.AbiMismatch, "wanted a model table of 176 bytes or more, got 168"),
    ],
)
def test_libraries_of_others(
    version: int,
    shorter: int,
    error: type[Exception],
    message: str,
    c_library: CLibrary,
    tmp_path: Path,
) -> None:
    path = _fake_library(c_library, tmp_path, version, shorter)
    with pytest.raises(error, match=message):
        load(path)


def test_the_loader_alone_describes_what_this_cpu_lacks(
    c_library: CLibrary, tmp_path: Path
) -> None:
    """And the library that it stands beside is found by its name."""
    _fake_library(c_library, tmp_path)
    alone = shutil.copy(loader.__file__, tmp_path / "fake.py")
    shown = subprocess.run([sys.executable, alone], capture_output=True, text=True)
    assert (shown.stdout, shown.stderr) == ("{}\n", "")


# What LLVM calls a feature, where it is not the flag that Linux shows.
_LLVM_NAMES = {"bmi": "bmi1", "lzcnt": "abm", "avx512vnni": "avx512_vnni",
               "avx512bf16": "avx512_bf16", "avx512vbmi2": "avx512_vbmi2"}  # fmt: skip


@pytest.mark.parametrize("isa", FEATURES)
def test_the_check_covers_what_kernels_are_compiled_for(isa: Isa) -> None:
    compiled = {f[1:] for f in FEATURES[isa] if f.startswith("+")}
    flags = {_LLVM_NAMES.get(f, f.replace("-", "_")) for f in compiled}
    assert flags <= required_flags(isa)
    levels = dict(re.findall(r'\{"(\w+)", (\d+)\}', (SOURCES / "cpu_check.c").read_text()))
    assert int(levels[isa.value]) == len(required_flags(isa))


def test_missing_feature(host: Target, c_library: CLibrary) -> None:
    """The C check agrees with the flags that the system shows, and refuses unknown levels."""
    check = ctypes.CDLL(str(c_library(SOURCES / "cpu_check.c", "-std=c11")))
    check.sparsec_missing_feature.restype = ctypes.c_char_p
    for isa in Isa:
        missing = check.sparsec_missing_feature(isa.value.encode())
        assert host.has(isa) == (missing is None), (isa, missing)
        assert host.has(isa) == bool(check.sparsec_is_machine_of(isa.value.encode())), isa
    assert check.sparsec_missing_feature(b"warp") == b"warp"
    assert not check.sparsec_is_machine_of(b"warp")


# A chain of one step, which notes where the places of the worker are.
_CHAIN = """
#include "chain.c"
int64_t sparsec_now_ns(void) { return 0; }
static const int64_t *seen;
static int32_t note(const sparsec_frame *frame, void *scratch, int64_t begin, int64_t end) {
  seen = frame->places;
  return (scratch || begin < end) ? SPARSEC_OK : SPARSEC_INVALID_SHAPE;
}
int64_t offset_of_places(uint32_t worker, uint32_t count) {
  static int64_t memory[64], places[16], items[] = {1};
  static const sparsec_chain chain = {0, 0, 1};
  static const sparsec_step step = {.run = note, .per_panel = 1};
  const sparsec_code code = {.place_count = count, .steps = &step};
  const sparsec_frame frame = {.places = places};
  const sparsec_chain_run run = {&code, &chain, &frame, items, 1, memory, NULL};
  return sparsec_chain_work(&run, worker, NULL, 0, 1) == SPARSEC_OK ? (seen - memory) * 8 : -1;
}
"""


def test_workers_in_a_chain_share_no_cache_line(c_library: CLibrary, tmp_path: Path) -> None:
    source = tmp_path / "chain_alone.c"
    source.write_text(_CHAIN)
    flags = (f"-I{INCLUDE}", f"-I{SOURCES}")
    library = ctypes.CDLL(str(c_library(source, *flags)))
    library.offset_of_places.restype = ctypes.c_int64
    for count, stride in ((1, 64), (7, 64), (8, 64), (9, 128)):
        offsets = [library.offset_of_places(worker, count) for worker in range(3)]
        assert offsets == [0, stride, 2 * stride]


# sparsec_query on a machine with AMX; it counts what it asks of the kernel.
_QUERY = """
#include <string.h>
#include "query.c"
int requests;
const char *sparsec_missing_feature(const char *isa) {
  requests += strcmp(isa, "amx") == 0;
  return NULL;
}
int sparsec_is_machine_of(const char *isa) { return isa != NULL; }
static const sparsec_model_v1 best = {.required_isa = NEEDED, .target_isa = "amx"};
static const sparsec_model_v1 other = {.required_isa = "avx512", .target_isa = "avx512"};
const sparsec_model_v1 *const sparsec_targets[] = {&best, &other};
const uint32_t sparsec_target_count = 2;
"""


@pytest.mark.parametrize(("needed", "requests"), [("amx", 1), ("avx512", 0)])
def test_permission_is_requested_for_code_that_needs_it(
    needed: str, requests: int, c_library: CLibrary, tmp_path: Path
) -> None:
    """From then on a process can have no signal stack that is too small for tile registers."""
    source = tmp_path / "query_alone.c"
    source.write_text(_QUERY)
    flags = (f'-DNEEDED="{needed}"', f"-I{INCLUDE}", f"-I{SOURCES}")
    library = ctypes.CDLL(str(c_library(source, *flags)))
    library.sparsec_query.restype = ctypes.POINTER(loader.ModelStruct)
    assert library.sparsec_query(1).contents.target_isa == b"amx"
    assert ctypes.c_int.in_dll(library, "requests").value == requests
