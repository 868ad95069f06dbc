"""Other engines that run the same ONNX file: ONNX Runtime, OpenVINO, the ONNX evaluator.

A runner takes (file, threads) and gives (name with version, function on arrays).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.errors import InvalidInput

Arrays = dict[str, np.ndarray[Any, Any]]
Run = Callable[[Arrays], Arrays]
Runner = Callable[[Path, int], tuple[str, Run]]


def onnxruntime_runner(path: Path, threads: int, *, cpus: Sequence[int] = ()) -> tuple[str, Run]:
    """(name with version, function) for ONNX Runtime on the CPU; 0 threads: its own choice.

    With `cpus`, one for each thread, its threads stay on all but the first, which is that of the
    caller. Raises InvalidInput when it is not installed or refuses the model or the arrays.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise _not_installed("onnxruntime") from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its threads spin while it runs, as always, but not while another engine is being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if len(cpus) > 1:
        # It counts CPUs from 1.
        places = ";".join(str(cpu + 1) for cpu in cpus[1:])
        options.add_session_config_entry("session.intra_op_thread_affinities", places)
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own classes, one per status
        raise InvalidInput(f"{path}: ONNX Runtime refuses the model: {error}") from None
    names = [o.name for o in session.get_outputs()]

    def run(arrays: Arrays) -> Arrays:
        try:
            results = session.run(names, arrays)
        except Exception as error:
            raise InvalidInput(f"{path}: ONNX Runtime refuses the inputs: {error}") from None
        return dict(zip(names, results, strict=True))

    return f"onnxruntime {ort.__version__}", run


def openvino_runner(path: Path, threads: int, *, precision: str | None = None) -> tuple[str, Run]:
    """(name with version, function) for OpenVINO on the CPU; 0 threads: its own choice.

    One request at a time (the latency hint), compiled for the shapes of the arrays, which is its
    fastest form, when they first come. `precision` is that of the layers that are not quantised:
    "f32", "bf16", or None for its own choice. Raises InvalidInput when it is not installed or
    refuses the model.
    """
    version = openvino_version()
    import openvino as ov

    core = ov.Core()
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    if precision is not None:
        config["INFERENCE_PRECISION_HINT"] = precision
    try:
        names = [_name(port) for port in core.read_model(str(path)).outputs]
    except RuntimeError as error:
        raise InvalidInput(f"{path}: OpenVINO refuses the model: {error}") from None
    requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def run(arrays: Arrays) -> Arrays:
        key = tuple(arrays[name].shape for name in sorted(arrays))
        if key not in requests:
            requests[key] = openvino_compiled(core, path, arrays, config).create_infer_request()
        results = requests[key].infer(arrays, share_inputs=True)
        return dict(zip(names, results.values(), strict=True))

    return version, run


def openvino_compiled(core: Any, path: Path, arrays: Arrays, config: dict[str, Any]) -> Any:
    """The model of the file, compiled for the shapes of the arrays; raises InvalidInput."""
    try:
        model = core.read_model(str(path))
        wanted = {_name(port) for port in model.inputs}
        if wanted != set(arrays):
            raise InvalidInput(
                f"{path}: has the inputs {sorted(wanted)}, the library {sorted(arrays)}; is it "
                "the file that was compiled?"
            )
        model.reshape({name: list(array.shape) for name, array in arrays.items()})
        return core.compile_model(model, "CPU", config)
    except RuntimeError as error:
        raise InvalidInput(f"{path}: OpenVINO refuses the model: {error}") from None


def openvino_version() -> str:
    """Name and version; raises InvalidInput when it is not installed."""
    try:
        import openvino as ov
    except ImportError:
        raise _not_installed("openvino") from None
    return f"openvino {ov.__version__.split('-')[0]}"


# By the name that `bench --against` takes.
PEERS: dict[str, Runner] = {"onnxruntime": onnxruntime_runner, "openvino": openvino_runner}


def openvino_has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU when it may; it must be installed."""
    import openvino as ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def reference_runner(path: Path, threads: int) -> tuple[str, Run]:
    """ONNX Runtime when installed, else the evaluator of the onnx package (slow)."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return _evaluator(path)
    return onnxruntime_runner(path, threads)


def _evaluator(path: Path) -> tuple[str, Run]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    names = list(evaluator.output_names)

    def run(arrays: Arrays) -> Arrays:
        return dict(zip(names, evaluator.run(None, arrays), strict=True))

    return f"onnx {onnx.__version__} reference evaluator", run


def _name(port: Any) -> str:
    """The name of an OpenVINO port; one that has several names has them all for one tensor."""
    return str(port.get_any_name())


def _not_installed(peer: str) -> InvalidInput:
    return InvalidInput(
        f"{peer} is not installed; pip install 'sparsec[bench]', or leave --against out"
    )
