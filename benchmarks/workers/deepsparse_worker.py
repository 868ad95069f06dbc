"""DeepSparse 1.8.0 for bench_models.py and bench_latency.py; see protocol.py.

`path` is a model in the form of peer_forms.matmul_integer. The engine computes one fixed shape.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from protocol import serve


def load(path, inputs, threads):
    """What runs the model once on the arrays of the npz `inputs`, and what names its outputs."""
    os.environ["NM_DISABLE_ANALYTICS"] = "1"  # before the import: it would report to its makers
    from deepsparse import compile_model

    arrays = dict(np.load(inputs))
    names = model_inputs(path)
    batch = len(arrays[names[0]])
    with tempfile.TemporaryDirectory() as folder:
        # compile_model writes the input shapes into the file that it is given.
        copy = shutil.copy(path, Path(folder, "model.onnx"))
        engine = compile_model(
            str(copy),
            batch_size=batch,
            num_cores=threads,
            input_shapes=[list(arrays[name].shape) for name in names],
        )
    values = [np.ascontiguousarray(arrays[name]) for name in engine.input_names]
    engine.run(values)  # checks them
    return lambda: engine.run(values, val_inp=False), lambda outputs: dict(
        zip(engine.output_names, outputs, strict=True)
    )


def model_inputs(path):
    """Names of the inputs in the order of the file."""
    import onnx

    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]


if __name__ == "__main__":
    serve(load)
