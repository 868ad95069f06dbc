"""Other engines that run the same ONNX file: ONNX Runtime, and the ONNX reference evaluator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.errors import InvalidInput

Arrays = dict[str, np.ndarray[Any, Any]]
Run = Callable[[Arrays], Arrays]


def onnxruntime_runner(path: Path, threads: int) -> tuple[str, Run]:
    """(name with version, function) for ONNX Runtime on the CPU; 0 threads: its own choice.

    Raises InvalidInput when it is not installed or refuses the model.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise InvalidInput(
            "onnxruntime is not installed; pip install 'sparsec[bench]', or leave --against out"
        ) from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own classes, one per status
        raise InvalidInput(f"{path}: ONNX Runtime refuses the model: {error}") from None
    names = [o.name for o in session.get_outputs()]

    def run(arrays: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, arrays), strict=True))

    return f"onnxruntime {ort.__version__}", run


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
