"""The ONNX project's own node tests: each agrees, or is refused with an error of ours."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run


def as_array(item: Any) -> np.ndarray:
    return numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else np.asarray(item)


def with_constant_operands(model: onnx.ModelProto, arrays: list[np.ndarray]) -> onnx.ModelProto:
    """Shapes, axes and the like, which these models take as inputs, become initialisers."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for index, (info, data) in enumerate(zip(model.graph.input, arrays, strict=False)):
        is_shape = data.ndim <= 1 and data.dtype.kind in "ib" and (index or len(arrays) == 1)
        if is_shape or (index and data.size <= 1):
            result.graph.initializer.append(numpy_helper.from_array(data, info.name))
    return result


def outcome(case: Any) -> str:
    inputs, outputs = case.data_sets[0]
    try:
        arrays, expected = [[as_array(i) for i in side] for side in (inputs, outputs)]
    except (TypeError, ValueError):
        return "refused"  # sequences and optional values: not tensors
    constant = with_constant_operands(case.model, arrays)
    for model in (case.model, constant):
        try:
            graph = import_model(model)
        except UnsupportedOp:
            continue
        except InvalidModel as error:
            if "sizes are at least 1" in str(error):
                return "refused"
            raise
        names = {v.name for v in graph.inputs}
        pairs = zip(model.graph.input, arrays, strict=False)
        got = run(graph, {i.name: a for i, a in pairs if i.name in names})
        return compare(list(got.values()), expected)
    return "refused"


def compare(got: list[np.ndarray], expected: list[np.ndarray]) -> str:
    for a, b in zip(got, expected, strict=False):
        # A half has 11 bits; functions of floats are compared as ONNX's own runner does.
        loose = 1e-2 if b.dtype == np.float16 else 1e-3
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{a.dtype}{a.shape} instead of {b.dtype}{b.shape}"
        if not np.allclose(a, b, rtol=loose, atol=1e-5 if loose < 1e-2 else loose, equal_nan=True):
            return "wrong numbers"
    return "agrees"


@pytest.mark.slow
def test_standard_cases_agree_or_are_refused():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases overflow on purpose
        outcomes = {case.name: outcome(case) for case in collect_testcases(None)}
    wrong = {name: o for name, o in outcomes.items() if o not in ("agrees", "refused")}
    assert not wrong
    # Of 1884 in onnx 1.23; the rest are ops and element types without a lowering.
    assert list(outcomes.values()).count("agrees") > 1080
