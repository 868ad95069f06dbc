"""Several instances of the other engines: sessions of ONNX Runtime, streams of OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsec.errors import InvalidInput
from sparsec.tools.inputs import Arrays
from sparsec.tools.instances import Call, LocalEngine, Places
from sparsec.tools.peers import (
    Run,
    onnxruntime_runner,
    openvino_compiled,
    openvino_has_bf16,
    openvino_version,
)


def onnxruntime_engine(path: Path) -> LocalEngine:
    """A session per instance, its threads pinned; each session has weights of its own.

    Raises InvalidInput, as its calls do, when it is not installed or refuses the model.
    """
    name, _ = onnxruntime_runner(path, 1)

    @lru_cache(maxsize=1)
    def sessions(places: Places) -> list[Run]:
        return [onnxruntime_runner(path, len(cpus), cpus=cpus)[1] for cpus in places]

    def calls(places: Places, arrays: Arrays) -> list[Call]:
        return [partial(run, arrays) for run in sessions(places)]

    return LocalEngine(name, calls)


def openvino_engine(path: Path) -> LocalEngine:
    """A stream per instance, pinned by OpenVINO, of one model compiled for the arrays' shapes.

    Where the CPU has bf16 it may compute in that what is not quantised; the name says so.
    Raises InvalidInput, as its calls do, when it is not installed or refuses the model.
    """
    name = openvino_version() + (", bf16 allowed" if openvino_has_bf16() else "")
    import openvino as ov

    core = ov.Core()
    latest: dict[Any, list[Any]] = {}

    def calls(places: Places, arrays: Arrays) -> list[Call]:
        key = (places, tuple(arrays[name].shape for name in sorted(arrays)))
        if key not in latest:
            config = {
                "PERFORMANCE_HINT": "THROUGHPUT",
                "NUM_STREAMS": len(places),
                "INFERENCE_NUM_THREADS": sum(len(cpus) for cpus in places),
                "ENABLE_CPU_PINNING": True,
                "ENABLE_HYPER_THREADING": False,  # a thread per core, as the others have
            }
            compiled = openvino_compiled(core, path, arrays, config)
            latest.clear()
            latest[key] = [compiled.create_infer_request() for _ in places]
        return [partial(_infer, request, arrays) for request in latest[key]]

    return LocalEngine(name, calls, is_pinned_by_caller=False)


def _infer(request: Any, arrays: Arrays) -> None:
    # Only an asynchronous request runs in the threads of a stream; `infer` uses the caller's.
    request.start_async(arrays, share_inputs=True)
    request.wait()


def is_installed(name: str) -> bool:
    """Whether the peer of that name can be imported."""
    return find_spec(name) is not None


# By the name that `bench --against` takes, which is also that of the package.
PEER_ENGINES: dict[str, Callable[[Path], LocalEngine]] = {
    "onnxruntime": onnxruntime_engine,
    "openvino": openvino_engine,
}


def peer_engines(onnx: Path | None, against: str | None) -> list[LocalEngine]:
    """The peer asked for, or all that are installed, with the ONNX file; none without a file."""
    if onnx is None:
        if against is not None:
            raise InvalidInput(f"--against {against} needs the ONNX file: add --onnx FILE")
        return []
    names = [against] if against else [name for name in PEER_ENGINES if is_installed(name)]
    if not names:
        raise InvalidInput(
            f"--onnx: none of {', '.join(PEER_ENGINES)} is installed; "
            "pip install 'sparsec[bench]', or leave --onnx out"
        )
    return [PEER_ENGINES[name](onnx) for name in names]
