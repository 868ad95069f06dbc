"""Compile C and link the library: zig's clang and lld from a wheel, or a system compiler.

With zig the C is compiled for glibc 2.17 and the linker is called directly: `zig cc -shared` would
first build all of glibc's stubs, which takes seconds. Instead three stub libraries are made on the
spot from the list of C functions below; a function that is not on it is a link error.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsec.codegen.emit_model import emit_model, emit_targets
from sparsec.codegen.pack_weights import WeightBlob, write_weights
from sparsec.codegen.program import Part, Program
from sparsec.errors import ToolchainFailed
from sparsec.target import Isa

Progress = Callable[[str], None]

RUNTIME = Path(__file__).resolve().parent.parent / "runtime"
EXPORTED = "sparsec_query"
C_FLAGS = (
    "-std=c11",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffunction-sections",
    "-fdata-sections",
    "-fno-stack-protector",
    "-fno-math-errno",
    "-g0",
    "-Wall",
)
# --build-id=none and no soname: the same input gives the same bytes, and libraries of the same
# name load side by side. Debug information would name folders of this machine.
LINK_FLAGS = (
    "--build-id=none",
    "--gc-sections",
    "--strip-debug",
    "-Bsymbolic",
    "-znoexecstack",
    "-zrelro",
    "-znow",
    "-zdefs",
)

# C functions that model.c, the runtime and the kernels may call, by library and symbol version as
# of glibc 2.17 on x86-64: what any newer glibc still has.
_MATH = "acos asin atan atan2 cbrt ceil cos cosh erf erfc exp exp2 expm1 fabs floor fma fmax fmin"
_MATH += " fmod ldexp log log10 log1p log2 lrint modf nearbyint pow remainder rint round sin sinh"
_MATH += " sqrt tan tanh trunc acosh asinh atanh tgamma lgamma"
_C_LIBRARY = "calloc close free getpid madvise memcmp memmove memset open"
_C_LIBRARY += " posix_memalign read sched_yield sigdelset sigfillset snprintf strcmp"
_C_LIBRARY += " strlen strtol syscall vsnprintf"
_THREADS = "pthread_create pthread_join pthread_sigmask"
_THREADS += " pthread_attr_init pthread_attr_destroy pthread_attr_setstacksize"
GLIBC: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "libm.so.6": {
        "GLIBC_2.2.5": tuple(f for name in _MATH.split() for f in (name, f"{name}f")),
    },
    "libpthread.so.0": {
        "GLIBC_2.2.5": tuple(_THREADS.split()),
        "GLIBC_2.3.4": ("pthread_attr_setaffinity_np",),
    },
    "libc.so.6": {
        "GLIBC_2.2.5": tuple(_C_LIBRARY.split()),
        "GLIBC_2.3.4": ("sched_getaffinity",),
        "GLIBC_2.14": ("memcpy",),
        "GLIBC_2.17": ("clock_gettime",),
    },
}


@dataclass(frozen=True, slots=True)
class Toolchain:
    """How to compile and link; commands run in the build folder."""

    compile: tuple[str, ...]
    link: tuple[str, ...]
    is_driver: bool  # `link` is a compiler that knows the C library; else the bare linker

    def compile_c(self, sources: Sequence[str], folder: Path) -> list[str]:
        """One object per source, at the same time; returns their names."""
        objects = [str(Path(source).with_suffix(".o")) for source in sources]
        with ThreadPoolExecutor(max_workers=len(sources)) as pool:
            jobs = [
                pool.submit(_run, (*self.compile, *C_FLAGS, source, "-o", object), folder)
                for source, object in zip(sources, objects, strict=True)
            ]
            for job in jobs:
                job.result()
        return objects

    def link_shared(
        self, objects: Sequence[str], output: str, folder: Path, exported: str = EXPORTED
    ) -> None:
        """`output` exports one symbol only and needs libc, libm and libpthread only."""
        exports = f"{{ global: {exported}; local: *; }};\n"
        (folder / "exports.map").write_text(exports, encoding="utf-8")
        flags = [*LINK_FLAGS, "--version-script=exports.map"]
        if self.is_driver:
            flags = [f"-Wl,{flag}" for flag in flags]
            libraries = ["-lm", "-lpthread"]
        else:
            libraries = self._stub_libraries(folder)
        _run((*self.link, *flags, "-o", output, *objects, *libraries), folder)

    def _stub_libraries(self, folder: Path) -> list[str]:
        stubs = folder / "stubs"
        stubs.mkdir()
        for library, versions in GLIBC.items():
            functions = [f for names in versions.values() for f in names]
            text = "".join(f".globl {f}\n.type {f},@function\n{f}:\n" for f in functions)
            (stubs / f"{library}.s").write_text(f".text\n{text}", encoding="utf-8")
            script = "".join(f"{v} {{ {'; '.join(n)}; }};\n" for v, n in versions.items())
            (stubs / f"{library}.map").write_text(script, encoding="utf-8")
            _run((*self.compile, f"{library}.s", "-o", f"{library}.o"), stubs)
            named = (f"-soname={library}", f"--version-script={library}.map", f"{library}.o")
            _run((*self.link, *named, "-o", library), stubs)
        return [f"stubs/{library}" for library in GLIBC]


def find_toolchain(cc: str | None) -> Toolchain:
    """zig from its wheel when `cc` is None, else the C compiler `cc`."""
    if cc is not None:
        path = shutil.which(cc)
        if path is None:
            raise ToolchainFailed(f"there is no C compiler {cc!r} on the PATH")
        return Toolchain((path, "-c"), (path, "-shared"), is_driver=True)
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise ToolchainFailed(
            "no C compiler: install the package ziglang, or name a system compiler with --cc"
        )
    zig = str(Path(spec.origin).parent / "zig")
    # The runtime is compiled for any x86-64, so that its check of the CPU runs on all of them.
    target = ("-target", "x86_64-linux-gnu.2.17", "-mcpu=x86_64", "-fno-sanitize=all")
    return Toolchain((zig, "cc", "-c", *target), (zig, "ld.lld", "-shared"), is_driver=False)


def build_library(
    program: Program,
    objects: Mapping[str, bytes],
    output: Path,
    *,
    isa: Isa,
    metadata: Mapping[str, Any],
    cc: str | None = None,
    progress: Progress | None = None,
) -> None:
    """`link_library` of a program that is for any machine with the level `isa`."""
    part = Part(program, isa.value, isa, isa, metadata)
    link_library([part], objects, output, cc=cc, progress=progress)


def link_library(
    parts: Sequence[Part],
    objects: Mapping[str, bytes],
    output: Path,
    *,
    cc: str | None = None,
    progress: Progress | None = None,
) -> list[WeightBlob]:
    """Write the library `output` and, beside it, its Python loader as `output` with suffix .py.

    `parts` are for targets of different levels, best first; `objects` are the ELF objects, by
    name, with every kernel that one of them calls. Nothing is left behind on failure. Returns
    where each part's weights lie. Raises ToolchainFailed with the message of the compiler or
    linker.
    """
    tools = find_toolchain(cc)
    tell = progress or (lambda text: None)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sparsec-", dir=output.parent) as name:
        folder = Path(name)
        tell("writing weights")
        weights = [weight for part in parts for weight in part.program.weights]
        blobs = _split(write_weights(weights, folder / "weights.o"), parts)
        tell("compiling model.c")
        _write_models(parts, blobs, folder)
        for source in sorted([*RUNTIME.glob("src/*.[ch]"), RUNTIME / "include" / "sparsec.h"]):
            shutil.copyfile(source, folder / source.name)
        linked = tools.compile_c(sorted(p.name for p in folder.glob("*.c")), folder)
        for index, (_, data) in enumerate(sorted(objects.items())):
            (folder / f"kernel_{index}.o").write_bytes(data)
            linked.append(f"kernel_{index}.o")
        tell("linking")
        tools.link_shared([*linked, "weights.o"], "model.so", folder)
        shutil.copyfile(RUNTIME / "loader.py", folder / "model.py")
        os.replace(folder / "model.so", output)
        os.replace(folder / "model.py", output.with_suffix(".py"))
    return blobs


def _split(blob: WeightBlob, parts: Sequence[Part]) -> list[WeightBlob]:
    """The same blob for each part, with the offsets of its weights."""
    offsets = iter(blob.offsets)
    return [
        replace(blob, offsets=tuple(itertools.islice(offsets, len(part.program.weights))))
        for part in parts
    ]


def _write_models(parts: Sequence[Part], blobs: Sequence[WeightBlob], folder: Path) -> None:
    """The C sources of a library: one per part, and the list of them."""
    texts = {
        f"model_{part.level.value}.c": emit_model(part, blob, len(parts))
        for part, blob in zip(parts, blobs, strict=True)
    }
    for name, text in {**texts, "targets.c": emit_targets(parts)}.items():
        (folder / name).write_text(text, encoding="utf-8")


def link_kernels(objects: Sequence[bytes], output: Path) -> None:
    """`output`, a library of kernels alone with all of their names: to time them one by one."""
    tools = find_toolchain(None)
    with tempfile.TemporaryDirectory(prefix=".sparsec-", dir=output.parent) as name:
        folder = Path(name)
        names = [f"kernel_{index}.o" for index in range(len(objects))]
        for file, data in zip(names, objects, strict=True):
            (folder / file).write_bytes(data)
        _run((*tools.link, "-o", "kernels.so", *names), folder)
        os.replace(folder / "kernels.so", output)


def _run(command: Sequence[str], folder: Path) -> None:
    """Raises ToolchainFailed with the tool's own message."""
    cache = str(folder / "cache")  # zig keeps one: here it needs no home folder
    places = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    env = {**os.environ, **places, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise ToolchainFailed(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode:
        message = (done.stderr or done.stdout).strip()
        raise ToolchainFailed(
            f"{' '.join(command[:3])} ended with status {done.returncode}:\n{message}"
        )
