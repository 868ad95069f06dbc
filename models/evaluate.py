"""Runs an ONNX model: with ONNX Runtime when it is installed, else with onnx's own evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
from numpy.typing import NDArray

Array = NDArray[Any]
Evaluator = Callable[[Mapping[str, Array]], dict[str, Array]]


def evaluator(model: onnx.ModelProto, *, optimise: bool = True) -> Evaluator:
    """Return a function from named inputs to named outputs.

    Without `optimise` ONNX Runtime computes each node as it stands, in fp32 between roundings.
    """
    names = [output.name for output in model.graph.output]
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        run = ReferenceEvaluator(model).run
    else:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        if not optimise:
            level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.graph_optimization_level = level
        run = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        ).run
    return lambda feed: dict(zip(names, run(names, dict(feed)), strict=True))
