"""CONVERTERS: one small function per ONNX op."""

from __future__ import annotations

from sparsec.frontend.call import Converter
from sparsec.frontend.onnx_ops_control import CONTROL
from sparsec.frontend.onnx_ops_conv import CONV
from sparsec.frontend.onnx_ops_index import INDEX
from sparsec.frontend.onnx_ops_math import MATH
from sparsec.frontend.onnx_ops_nn import NN
from sparsec.frontend.onnx_ops_quant import QUANT
from sparsec.frontend.onnx_ops_reduce import REDUCE
from sparsec.frontend.onnx_ops_shape import SHAPE

CONVERTERS: dict[str, Converter] = {
    **CONTROL,
    **CONV,
    **INDEX,
    **MATH,
    **NN,
    **QUANT,
    **REDUCE,
    **SHAPE,
}
