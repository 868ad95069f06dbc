"""ITREX 1.1.1 (Intel Extension for Transformers) for the benchmarks; see protocol.py.

`path` is a folder that `compile` made of a QDQ file with the spelling of
peer_forms.itrex_spelling. The engine takes any shape.
"""

from __future__ import annotations

import os
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
from protocol import serve

INPUTS = ("input_ids", "token_type_ids", "attention_mask")  # in the order of the engine


def load(path, inputs, threads):
    """What runs the model once on the arrays of the npz `inputs`, and what names its outputs."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when the engine is imported
    set_up()
    arrays = dict(np.load(inputs))
    values = [arrays[name].astype(np.int32) for name in INPUTS if name in arrays]
    graph = loaded(path)
    return lambda: graph.inference(values), lambda outputs: {
        name.removesuffix(":0"): np.array(array) for name, array in outputs.items()
    }


def compile_model(path, output, sparse):
    """Make the folder `output` of the ONNX file: `sparse` for weights of 4x1 blocks.

    The sparse mode computes on transposed activations, as the engine's own sparse examples have
    it: its product of int8 with 4x1 blocks needs that.
    """
    set_up()
    from intel_extension_for_transformers.llm.runtime.deprecated.compile import compile as build

    partial = Path(output + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if not sparse:
        build(path).save(str(partial))
    else:
        dense = Path(output + ".dense")
        build(path, {"pattern_switch": {"MultiHeadAttention": False}}).save(str(dense))
        graph = read(dense, load_weight=True)
        graph.transpose_mode_int8()
        graph.save(str(partial))
        shutil.rmtree(dense)
    partial.rename(output)
    return {}


@lru_cache(maxsize=1)
def loaded(folder):
    """The graph in a folder: it stays for inputs of other shapes."""
    return read(folder)


def read(folder, **options):
    """The graph in a folder."""
    from intel_extension_for_transformers.llm.runtime.deprecated.compile.graph import Graph

    graph = Graph()
    graph.graph_init(str(Path(folder, "conf.yaml")), str(Path(folder, "model.bin")), **options)
    return graph


def set_up():
    """What the engine reads when it is imported."""
    os.environ["GLOG_minloglevel"] = "2"  # noqa: SIM112 (it would log each step)
    os.environ["UNIFIED_BUFFER"] = "1"  # one buffer for all activations: its fast way


if __name__ == "__main__":
    serve(load, compile=compile_model)
