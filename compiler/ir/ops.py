"""The table of operations: every op that a Graph may hold, with its types and its meaning."""

from __future__ import annotations

from sparsec.ir.op_spec import OpSpec
from sparsec.ir.ops_attention_int8 import ATTENTION_INT8_OPS
from sparsec.ir.ops_bf16 import BF16_OPS
from sparsec.ir.ops_channels import CHANNEL_OPS
from sparsec.ir.ops_conv import CONV_OPS
from sparsec.ir.ops_core import CORE_OPS
from sparsec.ir.ops_dynamic import DYNAMIC_OPS
from sparsec.ir.ops_elementwise import ELEMENTWISE_OPS
from sparsec.ir.ops_int8 import INT8_OPS
from sparsec.ir.ops_packing import PACKING_OPS
from sparsec.ir.ops_reduce import REDUCE_OPS
from sparsec.ir.ops_shape import SHAPE_OPS

OPS: dict[str, OpSpec] = {
    **ELEMENTWISE_OPS,
    **REDUCE_OPS,
    **SHAPE_OPS,
    **CORE_OPS,
    **CHANNEL_OPS,
    **CONV_OPS,
    **INT8_OPS,
    **ATTENTION_INT8_OPS,
    **PACKING_OPS,
    **BF16_OPS,
    **DYNAMIC_OPS,
}
