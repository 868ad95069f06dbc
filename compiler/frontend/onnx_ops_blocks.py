"""Constants of few bits with a scale per block become fp32 constants.

MatMulNBits(x, w)             ->   matmul(x, numbers of w)
GatherBlockQuantized(w, i)    ->   gather(numbers of w, i)

Int8 weights can be made of the numbers as of those of any fp32 model. Meanings:
docs/ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.frontend.builder import Operand
from sparsec.frontend.call import Call, Converter, wrap_axis
from sparsec.ir.op_spec import Array
from sparsec.ir.types import DType

BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Blocks:
    """`real = (stored - zero) * scale`; the last two have one entry for each `size` elements of
    `axis`."""

    stored: Array
    scale: Array
    zero: Array
    axis: int
    size: int

    def numbers(self) -> Array:
        """In fp32, which is exact but for the last product: 8 bits less 8 bits."""
        scale, zero = self._spread(self.scale), self._spread(self.zero)
        return np.asarray((self.stored.astype(np.float32) - zero) * scale, np.float32)

    def _spread(self, parameter: Array) -> Array:
        """A parameter with one entry for each element; the last block may be cut off."""
        count = self.stored.shape[self.axis]
        shape = list(self.stored.shape)
        shape[self.axis] = -(-count // self.size)
        if parameter.size != np.prod(shape):
            raise InvalidModel(
                f"{list(parameter.shape)} scales or zero points do not go with blocks of "
                f"{self.size} on axis {self.axis} of {list(self.stored.shape)}: {shape} are wanted"
            )
        whole = np.repeat(parameter.reshape(shape).astype(np.float32), self.size, self.axis)
        return whole.take(range(count), self.axis)


def matmul_n_bits(call: Call) -> Operand:
    """x, w [n, blocks, bytes], scales, zero points? (packed as w, or fp32), order?, bias?"""
    if call.optional(4) is not None:
        raise call.refuse("MatMulNBits with g_idx")
    if call.attr("weight_prepacked", 0):
        raise call.refuse("MatMulNBits with weight_prepacked")
    bits, size = _bits(call, 4), _block_size(call)
    rows, depth = int(call.required("N")), int(call.required("K"))
    blocks = -(-depth // size)
    stored, scale = _constant(call, 1), _constant(call, 2)
    if stored.dtype != np.uint8 or stored.size != rows * blocks * size * bits // 8:
        raise InvalidModel(
            f"{stored.dtype}{list(stored.shape)} is not {rows} x {blocks} blocks of uint8"
        )
    unpacked = _unpacked(stored.reshape(rows, -1), bits)[:, :depth]
    zero = _zero_of_products(call, bits, (rows, blocks))
    weight = Blocks(unpacked, scale, zero, 1, size).numbers()
    y = call.g.add("matmul", [call.input(0), _named(call, 1, np.ascontiguousarray(weight.T))])
    bias = call.optional(5)
    return y if bias is None else call.g.add("add", [y, bias])


def _zero_of_products(call: Call, bits: int, shape: tuple[int, int]) -> Array:
    """Per block; bytes are packed along each row, which begins with a new one."""
    if call.optional(3) is None:
        return np.full(shape, 1 << (bits - 1), np.float32)
    given = _constant(call, 3)
    if given.dtype != np.uint8:
        return given
    rows, blocks = shape
    if given.size != rows * -(-blocks * bits // 8):
        raise InvalidModel(f"zero points {list(given.shape)} are not those of {rows} x {blocks}")
    return _unpacked(given.reshape(rows, -1), bits)[:, :blocks]


def gather_block_quantized(call: Call) -> Operand:
    """table, indices, scales, zero points?

    In uint8 numbers are packed along the last axis; those of 4-bit types have been widened to i8.
    """
    stored, scale = _constant(call, 0), _constant(call, 2)
    zero = None if call.optional(3) is None else _constant(call, 3)
    bits, middle = _bits(call, 4), 0
    if call.dtype() is DType.U8:
        middle = 1 << (bits - 1)
        stored = _unpacked(stored, bits)
        zero = None if zero is None else _unpacked(zero, bits)
    axis = wrap_axis(call.attr("quantize_axis", 1), stored.ndim)
    if zero is None:
        zero = np.full(scale.shape, middle, np.float32)
    elif zero.ndim == stored.ndim:
        zero = zero[tuple(slice(n) for n in scale.shape)]  # the last byte may be half full
    table = Blocks(stored, scale, zero, axis, _block_size(call, 128)).numbers()
    gathered = wrap_axis(call.attr("gather_axis", 0), stored.ndim)
    return call.g.add("gather", [_named(call, 0, table), call.input(1)], axis=gathered)


def dequantize_blocks(call: Call) -> Operand:
    """DequantizeLinear of a constant with a scale per block"""
    stored, scale = _constant(call, 0), _constant(call, 1)
    zero = np.zeros(scale.shape) if call.optional(2) is None else _constant(call, 2)
    axis, size = wrap_axis(call.attr("axis", 1), stored.ndim), int(call.required("block_size"))
    if size < 1 or scale.shape != zero.shape or scale.ndim != stored.ndim:
        raise InvalidModel(
            f"blocks of {size}, scales {list(scale.shape)} and zero points {list(zero.shape)} do "
            f"not go with {list(stored.shape)}"
        )
    return _named(call, 0, Blocks(stored, scale, zero, axis, size).numbers())


def _unpacked(data: Array, bits: int) -> Array:
    """Bytes as the numbers they hold along the last axis, the lowest bits first."""
    if bits == 8:
        return data
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = (data[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(numbers.reshape(*data.shape[:-1], -1))


def _bits(call: Call, default: int) -> int:
    bits = call.attr("bits", default)
    if bits not in BITS:
        raise UnsupportedOp(f"{bits} bits are not supported, only {', '.join(map(str, BITS))}")
    return int(bits)


def _block_size(call: Call, default: int = 0) -> int:
    size = call.attr("block_size", default)
    if size < 16 or size & (size - 1):
        raise InvalidModel(f"the block size {size} is not a power of 2 from 16 on")
    return int(size)


def _constant(call: Call, index: int) -> Array:
    data = call.g.value(call.input(index)).data
    if data is None:
        raise UnsupportedOp(
            f"operand {index} depends on the inputs; only constant weights are supported"
        )
    return data


def _named(call: Call, index: int, data: Array) -> Operand:
    """A constant under the name of the weight that it is made of."""
    graph = call.g.graph
    return graph.add_constant(data, graph.base_name(call.g.value(call.input(index)).name))


BLOCKS: dict[str, Converter] = {
    "GatherBlockQuantized": gather_block_quantized,
    "MatMulNBits": matmul_n_bits,
}
