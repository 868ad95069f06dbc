"""From int32 sums to the result: scale, bias, activation, residual, and u8 where asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa.coarse import COARSE
from sparsec.codegen.isa.int8 import Int8Isa
from sparsec.codegen.isa.polynomials import ACTIVATIONS, at_most
from sparsec.codegen.isa.vector import keep, ramp, splat
from sparsec.codegen.program import Kind, Parameter

ENOUGH = 32767.0  # above every u8, and far inside int32


@dataclass(frozen=True, slots=True)
class Epilogue:
    """y = activation(sum * multiplier + bias) + residual, one rounding for `* +`.

    The result is fp32, or u8: clip(rint(y * inverse_scale) + zero_point). For u8 the activation
    may be a `coarse` one, and `is_bounded` says that no y * inverse_scale is outside int32. With
    scales `by_token` a sum is multiplied by its token's scale first.
    """

    activation: str = "none"
    has_residual: bool = False
    to_u8: bool = False
    coarse: bool = False
    is_bounded: bool = False
    by_token: bool = False

    @property
    def suffix(self) -> str:
        flags = {
            self.activation: self.activation != "none",
            "coarse": self.coarse,
            "residual": self.has_residual,
            "bounded": self.is_bounded,
            "bytoken": self.by_token,
        }
        return "".join(f"_{name}" for name, there in flags.items() if there)

    @property
    def result(self) -> str:
        return "u8" if self.to_u8 else "f32"

    @property
    def pointers(self) -> tuple[Parameter, ...]:
        names = ["multiplier", "bias", *["token_scale"] * self.by_token]
        names += ["residual"] * self.has_residual
        y = Parameter("y", dtype="uint8" if self.to_u8 else "float32")
        return (*(Parameter(n) for n in names), y)

    @property
    def numbers(self) -> tuple[Parameter, ...]:
        if not self.to_u8:
            return ()
        return (Parameter("inverse_scale", Kind.FLOAT), Parameter("zero_point", Kind.INT))

    def sums(
        self, s: tir.KernelScope, isa: Int8Isa, token: Any
    ) -> Callable[[list[Any]], list[Any]]:
        """int32 sums of the chunk at `token` to fp32; scales are read once for all rows."""
        n, scales = isa.lanes, list[Any]()
        if self.by_token:
            places = [ramp(token + i * n, n) for i in range(isa.tiles)]
            scales = isa.to_tiles([keep(s["token_scale"][place]) for place in places])

        def convert(parts: list[Any]) -> list[Any]:
            floats = [keep(T.cast(part, f"float32x{n}")) for part in parts]
            return [keep(x * y) for x, y in zip(floats, scales, strict=True)] if scales else floats

        return convert

    def emit(
        self, s: tir.KernelScope, isa: Int8Isa, sums: list[Any], row: Any, start: Any
    ) -> None:
        """One row of a chunk: `sums` are its tiles, `start` is the row's first element in y."""
        n = isa.lanes
        multiplier, bias = (keep(splat(s[name][row], n)) for name in ("multiplier", "bias"))
        activation = (COARSE if self.coarse else ACTIVATIONS)[self.activation]
        values = [keep(activation(isa.vector, keep(part * multiplier + bias))) for part in sums]
        places = [ramp(start + i * n, n) for i in range(isa.tiles)]
        if self.to_u8:
            self._store_u8(s, isa, values, start, places)
            return
        for place, value in zip(places, isa.to_tokens(values), strict=True):
            total = value + s["residual"][place] if self.has_residual else value
            T.buffer_store(s["y"], total, [place])

    def _store_u8(
        self, s: tir.KernelScope, isa: Int8Isa, values: list[Any], start: Any, places: list[Any]
    ) -> None:
        n = isa.lanes
        if self.has_residual:
            residual = isa.to_tiles([keep(s["residual"][place]) for place in places])
            values = [keep(v + r) for v, r in zip(values, residual, strict=True)]
        inverse = keep(splat(s["inverse_scale"], n))
        steps = []
        for value in values:
            scaled = keep(value * inverse)
            # What is too large for int32 would become the least int32.
            scaled = scaled if self.is_bounded else at_most(isa.vector, scaled, ENOUGH)
            steps.append(keep(isa.to_integer(scaled)))
        T.buffer_store(s["y"], isa.pack(steps, s["zero_point"]), [ramp(start, isa.chunk)])
