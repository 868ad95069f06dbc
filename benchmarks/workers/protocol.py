"""What a worker answers: an engine in a Python of its own, asked by ../remote.py.

A request is a line of JSON with one key, the name of a function of the worker, and its arguments;
the answer is a line of JSON. The engine is timed here, so that the pipe is in no figure.

    {"load": {"path": FILE, "inputs": FILE.npz, "threads": 1, "clock": "wall", ...}}  -> {}
    {"turn": {"seconds": 0.2}}       -> {"seconds": [0.0041, ...]}
    {"warm": {}}                     -> {}
    {"window": {"seconds": 0.2}}     -> {"seconds": [0.0041, ...]}, by the wall clock
    {"answer": {"path": FILE.npz}}   -> {}, and the file has the outputs by name
    anything that goes wrong         -> {"error": TEXT}

A turn is of an engine alone (sparsec.tools.turns.Timed). A window is of one that works beside
others, all warm (sparsec.tools.turns.window). A second `load` is of the same path and threads
with other inputs.

Runs under Python 3.10 and later and needs NumPy only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np

TURNS = Path(__file__).resolve().parents[2] / "compiler" / "tools" / "turns.py"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# The threads of an engine go on spinning for a while after a run, those of an OpenMP library for
# 0.2 s; the others wait for that.
REST_SECONDS = 0.3


def serve(load, **functions):
    """Answer requests until there are no more.

    `load(path, inputs, threads, **settings)` gives a function that runs the model once, and one
    that makes a dictionary of what that gives; each of `functions` answers a request of its name
    with a dictionary.
    """
    answers = _private_stdout()
    turns = _turns()
    engine = named = None

    def load_and_keep(path, inputs, threads, clock, **settings):
        nonlocal engine, named
        run, named = load(path, inputs, threads, **settings)
        engine = turns.Function(run, CLOCKS[clock])
        return {}

    def turn(seconds):
        taken = engine.turn(seconds)
        time.sleep(REST_SECONDS)
        return {"seconds": taken}

    def warm():
        for _ in range(turns.WARM_UP_RUNS):
            engine.run()
        return {}

    def window(seconds):
        taken = turns.window(engine.run, seconds)
        time.sleep(REST_SECONDS)
        return {"seconds": taken}

    def answer(path):
        np.savez(path, **named(engine.run()))
        return {}

    known = {
        "load": load_and_keep,
        "turn": turn,
        "warm": warm,
        "window": window,
        "answer": answer,
        **functions,
    }
    for line in sys.stdin:
        ((name, arguments),) = json.loads(line).items()
        try:
            reply = known[name](**arguments)
        except BaseException as error:  # engines raise anything
            traceback.print_exc()
            text = str(error).strip() or "it gives no reason"
            reply = {"error": type(error).__name__ + ": " + text}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _private_stdout():
    """Standard output for the answers; whatever an engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _turns():
    """sparsec.tools.turns, by its file: sparsec itself needs a newer Python."""
    spec = importlib.util.spec_from_file_location("turns", TURNS)
    module = importlib.util.module_from_spec(spec)
    sys.modules["turns"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module
