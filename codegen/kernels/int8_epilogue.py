"""From int32 sums to the result: scale, bias, activation, residual, and u8 where asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.isa import pieces
from sparsec.codegen.isa.coarse import COARSE
from sparsec.codegen.isa.int8 import Int8Isa, add_saturating
from sparsec.codegen.isa.polynomials import ACTIVATIONS, at_most
from sparsec.codegen.isa.vector import keep, ramp, splat
from sparsec.codegen.program import Kind, Parameter

ENOUGH = 32767.0  # above every u8, and far inside int32
# How the activation is computed: to the bits of fp32, or, for u8, as isa/coarse.py or
# isa/pieces.py has it. For u8 without one, results may be steps from the start.
ActivationForm = Literal["exact", "coarse", "pieces", "steps"]
SCALED = ("pieces", "steps")  # multiplier and bias have the scale of the result in them


@dataclass(frozen=True, slots=True)
class Epilogue:
    """y = activation(sum * multiplier + bias) + residual, one rounding for `* +`.

    The result is fp32, or u8: clip(rint(y * inverse_scale) + zero_point). For u8 the activation
    may be `coarse` or in `pieces`, and `is_bounded` says that no y * inverse_scale is outside
    int32. With `pieces`, of AVX-512 and without residual, `multiplier` and `bias` are those of
    units, which are rounded before the activation. With `steps`, without activation and residual,
    they are those of y * inverse_scale. With scales `by_token` a sum is multiplied by its token's
    scale first. `in_place`: the fp32 result is written over the residual.
    """

    activation: str = "none"
    has_residual: bool = False
    to_u8: bool = False
    form: ActivationForm = "exact"
    is_bounded: bool = False
    by_token: bool = False
    in_place: bool = False

    @property
    def suffix(self) -> str:
        flags = {
            self.activation: self.activation != "none",
            self.form: self.form != "exact",
            "residual": self.has_residual,
            "over": self.in_place,
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
        names += ["residual"] * (self.has_residual and not self.in_place)
        table = [Parameter("pieces", dtype="int16")] if self.form == "pieces" else []
        y = Parameter("y", dtype="uint8" if self.to_u8 else "float32")
        return (*(Parameter(n) for n in names), *table, y)

    @property
    def numbers(self) -> tuple[Parameter, ...]:
        if not self.to_u8:
            return ()
        scale = [] if self.form in SCALED else [Parameter("inverse_scale", Kind.FLOAT)]
        return (*scale, Parameter("zero_point", Kind.INT))

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
        places = [ramp(start + i * isa.lanes, isa.lanes) for i in range(isa.tiles)]
        values = self._scaled(s, isa, sums, row)
        if self.form == "pieces":
            self._store_u8(s, isa, values, start, lambda x: pieces.emit(s["pieces"], x))
            return
        if self.form == "steps":
            self._store_u8(s, isa, values, start)
            return
        activation = (COARSE if self.form == "coarse" else ACTIVATIONS)[self.activation]
        values = [keep(activation(isa.vector, x)) for x in values]
        if self.to_u8:
            self._store_u8(s, isa, self._in_steps(s, isa, values, places), start)
            return
        residual = "y" if self.in_place else "residual"
        for place, value in zip(places, isa.to_tokens(values), strict=True):
            total = value + s[residual][place] if self.has_residual else value
            T.buffer_store(s["y"], total, [place])

    def _scaled(self, s: tir.KernelScope, isa: Int8Isa, sums: list[Any], row: Any) -> list[Any]:
        """sum * multiplier + bias"""
        multiplier, bias = (keep(splat(s[n][row], isa.lanes)) for n in ("multiplier", "bias"))
        return [keep(part * multiplier + bias) for part in sums]

    def _in_steps(
        self, s: tir.KernelScope, isa: Int8Isa, values: list[Any], places: list[Any]
    ) -> list[Any]:
        if self.has_residual:
            residual = isa.to_tiles([keep(s["residual"][place]) for place in places])
            values = [keep(v + r) for v, r in zip(values, residual, strict=True)]
        inverse = keep(splat(s["inverse_scale"], isa.lanes))
        return [keep(v * inverse) for v in values]

    def _store_u8(
        self,
        s: tir.KernelScope,
        isa: Int8Isa,
        values: list[Any],
        start: Any,
        function: Callable[[Any], Any] = lambda x: x,
    ) -> None:
        """Rounded values through a `function` of int16, plus the zero point."""
        # What is too large for int32 would become the least int32.
        fitting = values if self.is_bounded else [at_most(isa.vector, v, ENOUGH) for v in values]
        steps = [keep(isa.to_integer(v)) for v in fitting]
        zero = T.broadcast(T.cast(s["zero_point"], "int16"), 2 * isa.lanes)
        packed = isa.pack(steps, lambda x: add_saturating(function(x), zero))
        T.buffer_store(s["y"], packed, [ramp(start, isa.chunk)])
