"""fp32 vectors to bytes in the order of the lanes: scale, round half to even, clip, pack.

    clip(rint(x * inverse) + zero_point), NaN gives the least byte

Two rounds of saturating packs work within 128-bit parts, so that the bytes of part `l` of vector
`i` come out as 32-bit lane `4 l + i`: one permutation of 32-bit lanes puts them in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen.isa.polynomials import at_most
from sparsec.codegen.isa.vector import VectorIsa, keep, shuffle, splat

BYTE_TYPES = ("uint8", "int8")
_ENOUGH = 32767.0  # above every byte, and in range of the conversion to integers
_CURRENT_ROUNDING = 4  # half to even: nothing changes MXCSR in kernels
_TO_INT = {8: "llvm.x86.avx.cvt.ps2dq.256", 16: "llvm.x86.avx512.mask.cvtps2dq.512"}
_PACK_32 = {8: "llvm.x86.avx2.packssdw", 16: "llvm.x86.avx512.packssdw.512"}
_PACK_16 = {
    (8, "uint8"): "llvm.x86.avx2.packuswb",
    (8, "int8"): "llvm.x86.avx2.packsswb",
    (16, "uint8"): "llvm.x86.avx512.packuswb.512",
    (16, "int8"): "llvm.x86.avx512.packsswb.512",
}


@dataclass(frozen=True, slots=True)
class Packer:
    """The scale and zero point of a kernel, in vectors. `inverse` is fp32, 1 / scale."""

    vector: VectorIsa
    dtype: str
    inverse: Any
    zero_point: Any

    @staticmethod
    def of(v: VectorIsa, dtype: str, inverse: Any, zero_point: Any) -> Packer:
        """From a float and an int64 parameter of a kernel."""
        zeros = T.broadcast(T.cast(zero_point, "int16"), 2 * v.lanes)
        return Packer(v, dtype, keep(splat(inverse, v.lanes)), keep(zeros))

    def bytes_of(self, values: list[Any]) -> Any:
        """1, 2 or 4 vectors of floats as one vector of bytes."""
        return self.bytes_of_steps([keep(x * self.inverse) for x in values])

    def bytes_of_steps(self, values: list[Any]) -> Any:
        """The same of floats that are divided by the scale already."""
        count, lanes = len(values), self.vector.lanes
        whole = [self._integers(x) for x in values] * (4 // count)
        packed = keep(self._sixteen(whole[0], whole[1]))
        other = packed if count < 4 else keep(self._sixteen(whole[2], whole[3]))
        name = _PACK_16[lanes, self.dtype]
        mixed = T.call_llvm_pure_intrin(f"{self.dtype}x{4 * lanes}", name, packed, other)
        words = keep(T.reinterpret(f"int32x{lanes}", mixed))
        order = [4 * part + i for i in range(count) for part in range(lanes // 4)]
        if count == 4:
            ordered = keep(shuffle(words, words, order))
        else:
            ordered = keep(tirx.Shuffle([words], [tirx.const(i, "int32") for i in order]))
        return keep(T.reinterpret(f"{self.dtype}x{count * lanes}", ordered))

    def _integers(self, x: Any) -> Any:
        """Rounded, and not above _ENOUGH: the conversion makes all that overflows negative."""
        v = self.vector
        scaled = at_most(v, x, _ENOUGH)
        masked: tuple[Any, ...] = ()
        if v.lanes == 16:
            every, rounding = tirx.const(-1, "int16"), tirx.const(_CURRENT_ROUNDING, "int32")
            masked = (T.broadcast(T.int32(0), v.lanes), every, rounding)
        type = f"int32x{v.lanes}"
        return keep(T.call_llvm_pure_intrin(type, _TO_INT[v.lanes], scaled, *masked))

    def _sixteen(self, a: Any, b: Any) -> Any:
        """Two vectors of int32 as int16 plus the zero point; what saturates is no byte anyway."""
        lanes = self.vector.lanes
        type = f"int16x{2 * lanes}"
        packed = keep(T.call_llvm_pure_intrin(type, _PACK_32[lanes], a, b))
        return T.call_llvm_pure_intrin(
            type, f"llvm.sadd.sat.v{2 * lanes}i16", packed, self.zero_point
        )
