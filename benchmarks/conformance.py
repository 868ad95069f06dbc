"""The ONNX project's own node tests, run through compiled libraries.

    python benchmarks/conformance.py [--only NAME,NAME] [--dynamic] [--workers 2] [--json FILE]

Each test is a model of one node with inputs and outputs. It is right when the library that its
model is compiled to gives those outputs, unsupported when the compiler refuses it with
UnsupportedOp; anything else is a defect and makes the exit status 1. With --dynamic every size of
every input is left open, so that the kernels take them when they run.

Many models share one library, which costs a link and a start of LLVM: their graphs go through the
passes one by one and become one graph for the lowering. When something is wrong with a library
its models are halved until the one to blame is alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from sparsec.codegen.lower import lower, schedule_of
from sparsec.codegen.toolchain import build_library
from sparsec.driver import build_kernels
from sparsec.errors import UnsupportedOp
from sparsec.frontend.onnx_import import import_model
from sparsec.ir.graph import Graph, Value
from sparsec.passes import Roundings, graph_pipeline, target_pipeline
from sparsec.passes.manager import PassManager
from sparsec.passes.plan_memory import plan_memory
from sparsec.runtime import load
from sparsec.target import Isa, Target

CHUNK = 48  # tests in one library
CHUNK_SECONDS = 300  # a chunk that takes longer hangs
RIGHT, CONSTANT, UNSUPPORTED = "right", "right with constant operands", "unsupported"
BF16 = np.dtype(ml_dtypes.bfloat16)
# A half has 11 bits, or 8; functions of floats are compared as ONNX's own runner does, and sums
# near zero by the rounding of their terms.
RELATIVE = {np.dtype(np.float16): 1e-2, BF16: 1e-2}
ABSOLUTE = {np.dtype(np.float16): 1e-2, BF16: 1e-2}

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """One test: `sets` are pairs of the inputs and the outputs, in the order of the model."""

    name: str
    model: ModelProto
    sets: Sequence[tuple[Sequence[Any], Sequence[Any]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`kind` is RIGHT, CONSTANT, UNSUPPORTED or what is wrong."""

    name: str
    kind: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A case after the passes, with the names of its inputs and outputs in the shared graph."""

    case: Case
    graph: Graph
    kind: str


def node_cases() -> list[Case]:
    """All node tests of the installed onnx package."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests overflow on purpose
        return [Case(c.name, c.model, c.data_sets) for c in collect_testcases(None)]


def outcomes(cases: Sequence[Case], *, dynamic: bool = False) -> list[Outcome]:
    """What comes of the cases, compiled together in this process."""
    target = Target.host()
    done: list[Outcome] = []
    prepared: list[Prepared] = []
    for case in cases:
        try:
            prepared.append(_prepare(case, target, dynamic))
        except UnsupportedOp as error:
            done.append(Outcome(case.name, UNSUPPORTED, str(error)))
        except Exception as error:
            done.append(Outcome(case.name, type(error).__name__, _text(error)))
    return done + _together(prepared, target)


def _prepare(case: Case, target: Target, dynamic: bool) -> Prepared:
    """Compiles the model as it is; failing that, with shapes, axes and the like as constants."""
    models = {RIGHT: case.model, CONSTANT: with_constant_operands(case)}
    for kind, model in models.items():
        try:
            graph = import_model(_opened(model, case.name) if dynamic else model)
            PassManager(graph_pipeline(roundings=Roundings.NONE)).run(graph)
            PassManager(target_pipeline(lambda node, b: schedule_of(node, target, b))).run(graph)
            lower(graph, plan_memory(graph), target)  # says what it does not support
            return Prepared(case, graph, kind)
        except UnsupportedOp:
            if kind == CONSTANT:
                raise
    raise AssertionError(case.name)


def with_constant_operands(case: Case) -> ModelProto:
    """Shapes, axes and the like, which these models take as inputs, become initialisers."""
    model = ModelProto()
    model.CopyFrom(case.model)
    inputs = case.sets[0][0]
    for index, (info, item) in enumerate(zip(case.model.graph.input, inputs, strict=False)):
        data = as_array(item)
        if data is None:
            continue
        is_shape = data.ndim <= 1 and data.dtype.kind in "ib" and (index or len(inputs) == 1)
        if is_shape or (index and data.size <= 1):
            model.graph.initializer.append(numpy_helper.from_array(data, info.name))
    return model


def _opened(model: ModelProto, name: str) -> ModelProto:
    """The model with a symbol of its own for every size of its inputs."""
    result = ModelProto()
    result.CopyFrom(model)
    fixed = {t.name for t in result.graph.initializer}
    for count, info in enumerate(i for i in result.graph.input if i.name not in fixed):
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            dim.dim_param = f"{name}_{count}_{axis}"
    return result


def _together(prepared: Sequence[Prepared], target: Target) -> list[Outcome]:
    """One library of all; halves when it can not be made or run."""
    if not prepared:
        return []
    try:
        results = _run_library(prepared, target)
    except Exception as error:
        if len(prepared) == 1:
            return [Outcome(prepared[0].case.name, type(error).__name__, _text(error))]
        half = len(prepared) // 2
        return _together(prepared[:half], target) + _together(prepared[half:], target)
    return [_judged(p, r) for p, r in zip(prepared, results, strict=True)]


def _run_library(prepared: Sequence[Prepared], target: Target) -> list[list[list[Any]]]:
    """The outputs of each case, per set."""
    graph = merged([p.graph for p in prepared])
    program = lower(graph, plan_memory(graph), target)
    objects = build_kernels(program)
    isa = max((Isa(c.kernel.isa) for c in program.calls), key=lambda i: i.rank, default=Isa.AVX2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.so"
        build_library(program, objects, path, isa=isa, metadata={})
        with load(path, threads=1) as model:
            return _run_sets(prepared, model)


def _run_sets(
    prepared: Sequence[Prepared], model: Callable[[Arrays], Arrays]
) -> list[list[list[Any]]]:
    """Runs as often as the case with most sets needs; others repeat their last one."""
    results: list[list[list[Any]]] = [[] for _ in prepared]
    for turn in range(max(len(p.case.sets) for p in prepared)):
        feed: Arrays = {}
        for index, one in enumerate(prepared):
            given = one.case.sets[min(turn, len(one.case.sets) - 1)][0]
            arrays = dict(zip(_input_names(one.case), map(as_array, given), strict=False))
            feed |= {f"{index}.{v.name}": arrays[v.name] for v in one.graph.inputs}
        made = model(feed)
        for index, one in enumerate(prepared):
            if turn < len(one.case.sets):
                results[index].append([made[f"{index}.{n}"] for n in one.graph.output_names])
    return results


def merged(graphs: Sequence[Graph]) -> Graph:
    """One graph of all, its inputs and outputs named `INDEX.NAME`."""
    result = Graph("conformance")
    for index, graph in enumerate(graphs):
        values: dict[Value, Value] = {}
        for value in graph.inputs:
            type = value.type
            values[value] = result.add_input(f"{index}.{value.name}", type.dtype, type.shape)
        for value in graph.constants():
            assert value.data is not None
            values[value] = result.add_constant(value.data, value.name)
            result.set_type(values[value], value.type)
        for node in graph.nodes:
            operands = [None if v is None else values[v] for v in node.inputs]
            copy = result.add_node(node.op, operands, node.attrs, name=f"n{index}.{node.name}")
            result.set_schedules(copy, node.schedules)
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                result.set_type(new, old.type)
                values[old] = new
        for name, value in zip(graph.output_names, graph.outputs, strict=True):
            result.add_output(f"{index}.{name}", values[value])
        for limit in graph.limits:
            result.add_limit(limit.dim, limit.most, limit.reason)
    return result


def _judged(one: Prepared, results: Sequence[Sequence[Any]]) -> Outcome:
    for (_, wanted), made in zip(one.case.sets, results, strict=True):
        problem = difference(made, wanted)
        if problem:
            return Outcome(one.case.name, "wrong answer", problem)
    return Outcome(one.case.name, one.kind)


def difference(made: Sequence[np.ndarray[Any, Any]], wanted: Sequence[Any]) -> str:
    """How the outputs differ from the wanted ones; empty when they do not."""
    if len(made) != len(wanted):
        return f"{len(made)} outputs, wanted {len(wanted)}"
    for number, (a, item) in enumerate(zip(made, wanted, strict=True)):
        b = as_array(item)
        if b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            came = f"{a.dtype}{list(a.shape)}"
            return f"output {number} is {came}, wanted " + (
                "no tensor" if b is None else f"{b.dtype}{list(b.shape)}"
            )
        stored = BF16 if _is_bf16(item) else b.dtype
        relative, absolute = RELATIVE.get(stored, 1e-3), ABSOLUTE.get(stored, 1e-5)
        near = (
            a == b
            if b.dtype.kind in "iub"
            else np.isclose(a, b, rtol=relative, atol=absolute, equal_nan=True)
        )
        if not np.all(near):
            first = tuple(int(i) for i in np.argwhere(~near)[0]) if b.ndim else ()
            return f"output {number} has {a[first]} at {first}, wanted {b[first]}"
    return ""


def as_array(item: Any) -> np.ndarray[Any, Any] | None:
    """The tensor of a test, or None for a sequence or an optional that is none."""
    if isinstance(item, onnx.TensorProto):
        item = numpy_helper.to_array(item)
    if not isinstance(item, (np.ndarray, np.generic, int, float)):
        return None
    array = np.asarray(item)
    return array.astype(np.float32) if array.dtype == BF16 else array  # as libraries have it


def _is_bf16(item: Any) -> bool:
    if isinstance(item, onnx.TensorProto):
        return item.data_type == onnx.TensorProto.BFLOAT16
    return getattr(item, "dtype", None) == BF16


def _input_names(case: Case) -> list[str]:
    return [i.name for i in case.model.graph.input]


def _text(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error} ({Path(place.filename).name}:{place.lineno})"


# Processes: a library that ends its process must not end the run.


def run_all(
    cases: Sequence[Case], *, dynamic: bool, workers: int, progress: Callable[[int], None]
) -> list[Outcome]:
    """The outcomes of all cases, each chunk of them in a process of its own."""
    chunks = [cases[i : i + CHUNK] for i in range(0, len(cases), CHUNK)]
    found: list[Outcome] = []
    with ThreadPoolExecutor(workers) as pool:
        for part in pool.map(partial(_in_process, dynamic=dynamic), chunks):
            found += part
            progress(len(found))
    return found


def _in_process(cases: Sequence[Case], *, dynamic: bool) -> list[Outcome]:
    """`outcomes` in a child; when that dies or hangs, of each half."""
    context = multiprocessing.get_context("fork")  # the cases take long to make again
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(writer, cases, dynamic))
    child.start()
    writer.close()
    result: list[Outcome] | None = None
    try:
        if reader.poll(CHUNK_SECONDS):
            result = reader.recv()
    except EOFError:
        pass
    child.kill()
    child.join()
    if result is not None:
        return result
    if len(cases) == 1:
        return [Outcome(cases[0].name, "crash", f"status {child.exitcode}")]
    half = len(cases) // 2
    parts = (cases[:half], cases[half:])
    return [o for part in parts for o in _in_process(part, dynamic=dynamic)]


def _child(writer: Connection, cases: Sequence[Case], dynamic: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer.send(outcomes(cases, dynamic=dynamic))


def summary(found: Sequence[Outcome]) -> Iterator[str]:
    """The counts, why tests are unsupported, and each defect."""
    kinds = Counter(o.kind for o in found)
    right = kinds[RIGHT] + kinds[CONSTANT]
    yield f"{right} of {len(found)} right, {kinds[CONSTANT]} of them with shapes and axes constant"
    reasons = Counter(_reason(o) for o in found if o.kind == UNSUPPORTED)
    yield f"{kinds[UNSUPPORTED]} unsupported"
    for reason, count in reasons.most_common():
        yield f"  {count:4} {reason}"
    for one in defects(found):
        yield f"DEFECT {one.name}: {one.kind}: {one.detail}"


def defects(found: Sequence[Outcome]) -> list[Outcome]:
    return [o for o in found if o.kind not in (RIGHT, CONSTANT, UNSUPPORTED)]


def _reason(one: Outcome) -> str:
    """The message without the name of the node and what to do about it."""
    text = re.sub(r"node '[^']*' ", "", one.detail)
    return text.split(";")[0][:120]


def main() -> int:
    parser = argparse.ArgumentParser(description="ONNX's node tests through compiled libraries.")
    parser.add_argument("--only", help="names of tests, or parts of them, with commas between")
    parser.add_argument("--dynamic", action="store_true", help="leave all input sizes open")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    options = parser.parse_args()
    started = time.perf_counter()
    parts = options.only.split(",") if options.only else [""]
    cases = [c for c in node_cases() if any(p in c.name for p in parts)]

    def progress(count: int) -> None:
        print(f"\r{count}/{len(cases)}", end="", file=sys.stderr, flush=True)

    found = run_all(cases, dynamic=options.dynamic, workers=options.workers, progress=progress)
    print(file=sys.stderr)
    for line in summary(found):
        print(line)
    print(f"{time.perf_counter() - started:.0f} s, onnx {onnx.__version__}")
    if options.json:
        rows: list[Mapping[str, str]] = [
            {"name": o.name, "kind": o.kind, "detail": o.detail} for o in found
        ]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if defects(found) else 0


if __name__ == "__main__":
    sys.exit(main())
