"""What differs between fp32 vector instruction sets: the hooks that kernels are written over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.target import Isa


@dataclass(frozen=True, slots=True)
class VectorIsa:
    """An instruction set of `lanes` floats.

    `scale(p, n)` is p * 2**n for an integral float vector n in [-150, 150]; the result overflows
    to infinity and underflows to zero. `scale_normal` is the same where 2**n is a normal float.
    """

    isa: Isa
    lanes: int
    features: tuple[str, ...]
    scale: Callable[[Any, Any], Any]
    scale_normal: Callable[[Any, Any], Any]

    @property
    def name(self) -> str:
        return self.isa.value

    def __repr__(self) -> str:
        return f"VectorIsa({self.name})"


def keep(value: Any) -> Any:
    """`value`, computed here and once.

    It rests in a stack slot, which LLVM turns into a register. A TIR binding would do the same,
    but TVM's analyser expands bindings, at a cost that is exponential in their depth.
    """
    element, _, lanes = str(value.ty.dtype).partition("x")
    count = int(lanes or 1)
    slot = tir.registers(element, count)
    at = ramp(0, count) if lanes else 0
    T.buffer_store(slot, value, [at])
    return slot[at]


def splat(value: Any, lanes: int) -> Any:
    """A float or a scalar expression in all lanes."""
    return T.broadcast(T.float32(value) if isinstance(value, float | int) else value, lanes)


def ramp(start: Any, lanes: int) -> Any:
    """The index of `lanes` neighbours from `start`."""
    return T.ramp(start, 1, lanes)


def prefetch(buffer: Any, index: Any, *, level: int = 1) -> None:
    """Bring the line of an element into cache `level`, 1 to 3. It may lie outside the buffer."""
    for_reading, locality, data = (tirx.const(n, "int32") for n in (0, 4 - level, 1))
    place = T.address_of(buffer[index])
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", place, for_reading, locality, data))


def alone(index: Any) -> Any:
    """An int64, out of sight of LLVM's vectoriser.

    It computes the addresses of neighbouring loads in one vector where it can, and then takes them
    out one by one through the port that unpacks need.
    """
    nothing = tirx.reinterpret("handle", tirx.const(0, "uint64"))
    args = (index, nothing, nothing, T.int32(0))
    return T.call_llvm_pure_intrin("int64", "llvm.annotation.i64.p0", *args)


def power_of_two(n: Any, lanes: int) -> Any:
    """2**n from the bits of the exponent, n an integral float in [-126, 127]."""
    bias, shift = T.broadcast(T.int32(127), lanes), T.broadcast(T.int32(1 << 23), lanes)
    return T.reinterpret(f"float32x{lanes}", (T.cast(n, f"int32x{lanes}") + bias) * shift)


def shuffle(a: Any, b: Any, indices: list[int]) -> Any:
    """The lanes `indices` of the concatenation of two vectors."""
    return shuffle_of([a, b], indices)


def shuffle_of(vectors: list[Any], indices: list[int]) -> Any:
    """The lanes `indices` of the concatenation of vectors."""
    return tirx.Shuffle(vectors, [tirx.const(i, "int32") for i in indices])


def transpose(rows: list[Any]) -> list[Any]:
    """The transpose of a square of vectors, as kept values: log2(lanes) rounds of shuffles."""
    lanes, rows = len(rows), list(rows)
    step = 1
    while step < lanes:
        low = [i if not i & step else lanes + i - step for i in range(lanes)]
        high = [i + step if not i & step else lanes + i for i in range(lanes)]
        for i in range(lanes):
            if not i & step:
                a, b = rows[i], rows[i + step]
                rows[i] = keep(shuffle(a, b, low))
                rows[i + step] = keep(shuffle(a, b, high))
        step *= 2
    return rows
