"""ONNX ops that hold constants or subgraphs, and those that cannot be compiled."""

from __future__ import annotations

import numpy as np

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend.builder import Operand
from sparsec.frontend.call import Call, Converter, Result


def constant(call: Call) -> Operand:
    """All forms of the attribute; a sparse value and text have no lowering."""
    for name, dtype in (("value", None), *_NUMBERS.items()):
        if name in call.attrs:
            return call.g.constant(np.asarray(call.attrs[name], dtype))
    for name in ("sparse_value", "value_string", "value_strings"):
        if name in call.attrs:
            raise UnsupportedOp(f"a Constant given by {name} is not supported")
    raise InvalidModel("it has no value")


_NUMBERS = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def condition(call: Call) -> Result:
    """The branch is chosen now; a condition that depends on data has no lowering."""
    (taken,) = call.g.ints(call.input(0), "the condition of If")
    branch = call.required("then_branch" if taken else "else_branch")
    return list(call.subgraph(branch))


def identity(call: Call) -> Operand:
    return call.input(0)


def data_dependent(call: Call) -> Operand:
    raise UnsupportedOp(
        f"the shape of what {call.op_type} gives depends on the data; shapes must follow from the "
        "shapes of the inputs: rewrite this part of the model, for example with Where"
    )


def loop(call: Call) -> Operand:
    raise UnsupportedOp(f"{call.op_type} has no lowering; export the model with the loop unrolled")


def random(call: Call) -> Operand:
    raise UnsupportedOp(
        f"{call.op_type} gives another answer on every run; export the model for inference"
    )


_SEQUENCES = (
    "ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert "
    "SequenceLength SequenceMap SplitToSequence Optional OptionalGetElement OptionalHasElement"
)


def sequence(call: Call) -> Operand:
    raise UnsupportedOp(
        f"{call.op_type} works on sequences of tensors, which have no lowering; "
        "export with a newer opset, which has plain ops for it"
    )


CONTROL: dict[str, Converter] = {
    "Compress": data_dependent,
    "Constant": constant,
    "Identity": identity,
    "If": condition,
    "Loop": loop,
    "NonMaxSuppression": data_dependent,
    "NonZero": data_dependent,
    "Scan": loop,
    "Unique": data_dependent,
    **dict.fromkeys(
        ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"), random
    ),
    "RandomUniformLike": random,
    **dict.fromkeys(_SEQUENCES.split(), sequence),
}
