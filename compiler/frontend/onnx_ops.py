"""CONVERTERS: one small function per ONNX op; DOMAINS has those of other domains too."""

from __future__ import annotations

from sparsec.frontend.call import Converter
from sparsec.frontend.onnx_ops_control import CONTROL
from sparsec.frontend.onnx_ops_conv import CONV
from sparsec.frontend.onnx_ops_index import INDEX
from sparsec.frontend.onnx_ops_integer import INTEGER
from sparsec.frontend.onnx_ops_math import MATH
from sparsec.frontend.onnx_ops_microsoft import MICROSOFT
from sparsec.frontend.onnx_ops_nn import NN
from sparsec.frontend.onnx_ops_quant import QUANT
from sparsec.frontend.onnx_ops_reduce import REDUCE
from sparsec.frontend.onnx_ops_rotary import ROTARY
from sparsec.frontend.onnx_ops_shape import SHAPE

CONVERTERS: dict[str, Converter] = {
    **CONTROL,
    **CONV,
    **INDEX,
    **INTEGER,
    **MATH,
    **NN,
    **QUANT,
    **REDUCE,
    **ROTARY,
    **SHAPE,
}
DOMAINS: dict[str, dict[str, Converter]] = {
    "": CONVERTERS,
    "ai.onnx": CONVERTERS,
    "com.microsoft": MICROSOFT,
}
