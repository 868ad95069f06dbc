"""The ONNX project's own node tests: right, or refused with an error of ours.

All of them through the oracle, which takes no compiler, and a sample through compiled libraries;
`make conformance` compiles all.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sparsec.errors import UnsupportedOp
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "conformance.py"
STRIDE = 45  # of the sample: a prime to the groups in which tests of one op come


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conformance", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["conformance"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cases(script: ModuleType) -> list[Any]:
    return script.node_cases()


def outcome(script: ModuleType, case: Any) -> str:
    for model in (case.model, script.with_constant_operands(case)):
        try:
            graph = import_model(model)
        except UnsupportedOp:
            continue
        names = {v.name for v in graph.inputs}
        inputs, wanted = case.sets[0]
        pairs = zip(case.model.graph.input, inputs, strict=False)
        feed = {i.name: script.as_array(a) for i, a in pairs if i.name in names}
        return script.difference(list(run(graph, feed).values()), wanted) or "right"
    return "unsupported"


@pytest.mark.slow
def test_every_test_is_right_or_refused(script: ModuleType, cases: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests overflow on purpose
        outcomes = {case.name: outcome(script, case) for case in cases}
    wrong = {n: o for n, o in outcomes.items() if o not in ("right", "unsupported")}
    assert not wrong
    # Of 1884 in onnx 1.23; the rest are ops and element types without a lowering.
    assert list(outcomes.values()).count("right") > 1140


def test_a_sample_is_right_when_compiled(script: ModuleType, cases: list[Any]) -> None:
    sample = cases[::STRIDE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = script.outcomes(sample)
    assert not script.defects(found)
    assert len(found) == len(sample)
    kinds = [one.kind for one in found]
    assert kinds.count(script.RIGHT) + kinds.count(script.CONSTANT) > 0.5 * len(sample)


def test_a_wrong_answer_is_found_among_right_ones(script: ModuleType, cases: list[Any]) -> None:
    by_name = {c.name: c for c in cases}
    good, bad = by_name["test_add"], by_name["test_sub"]
    (inputs, outputs), *_ = bad.sets
    changed = script.as_array(outputs[0]).copy()
    changed.flat[7] += np.float32(0.5)
    wrong = script.Case("changed", bad.model, [(inputs, [changed])])
    kinds = {o.name: o.kind for o in script.outcomes([good, wrong])}
    assert kinds == {"test_add": script.RIGHT, "changed": "wrong answer"}


def test_differences(script: ModuleType) -> None:
    one = np.array([1.0, np.nan], np.float32)
    assert script.difference([one], [one]) == ""
    assert "wanted" in script.difference([one], [one.astype(np.float64)])
    assert "wanted" in script.difference([one], [one[:1]])
    assert "has 1.0" in script.difference([one], [np.array([1.1, np.nan], np.float32)])
    assert "0 outputs, wanted 1" in script.difference([], [one])
    assert script.difference([np.array([3])], [np.array([4])])
