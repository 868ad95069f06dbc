"""Element types, quantisation parameters and tensor types."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from sparsec.ir.dims import Dim, ceildiv, product
from sparsec.ir.layouts import ROW_MAJOR, Bsr, Layout, Panels, RowMajor


class DType(enum.Enum):
    """An element type; the value is the name that NumPy and TVM share."""

    BOOL = "bool"
    I8 = "int8"
    U8 = "uint8"
    I16 = "int16"
    U16 = "uint16"
    I32 = "int32"
    U32 = "uint32"
    I64 = "int64"
    U64 = "uint64"
    F16 = "float16"
    F32 = "float32"
    F64 = "float64"
    BF16 = "bfloat16"

    @property
    def numpy(self) -> np.dtype[Any]:
        # NumPy has no bfloat16 of its own.
        name: Any = ml_dtypes.bfloat16 if self is DType.BF16 else self.value
        dtype: np.dtype[Any] = np.dtype(name)
        return dtype

    @property
    def bytes(self) -> int:
        return self.numpy.itemsize

    @property
    def is_float(self) -> bool:
        """Whether ops compute in it: bf16 is a form of storage that only its own ops read."""
        return self in (DType.F16, DType.F32, DType.F64)

    @property
    def short(self) -> str:
        return self.name.lower()

    def __str__(self) -> str:
        return self.short

    @staticmethod
    def of(dtype: np.dtype[Any]) -> DType:
        """The DType of a NumPy dtype; ValueError when there is none."""
        return DType(dtype.name)


@dataclass(frozen=True, slots=True)
class QuantParams:
    """Affine quantisation `real = (stored - zero_point) * scale`, per tensor or along `axis`."""

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None

    def __str__(self) -> str:
        if self.axis is not None:
            return f"q(axis {self.axis})"
        return f"q({self.scale[0]:.6g}, {self.zero_point[0]})"


@dataclass(frozen=True, slots=True)
class TensorType:
    """What is known of a tensor before the model runs. `shape` is logical, whatever the layout."""

    dtype: DType
    shape: tuple[Dim, ...]
    layout: Layout = ROW_MAJOR
    quant: QuantParams | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def elements(self) -> Dim:
        return product(self.shape)

    @property
    def tokens(self) -> Dim:
        """All but the last axis, flattened."""
        return product(self.shape[:-1])

    @property
    def channels(self) -> int:
        """The last axis, which must be known."""
        last = self.shape[-1]
        assert isinstance(last, int), self
        return last

    @property
    def nbytes(self) -> Dim:
        """Size in memory in the type's layout. A Bsr size depends on the data and is not here."""
        match self.layout:
            case RowMajor():
                return self.elements * self.dtype.bytes
            case Panels(width=width):
                return ceildiv(self.tokens, width) * self.panel_bytes
            case Bsr():
                raise AssertionError("a BSR weight is a constant; ask the packed data")

    @property
    def panel_bytes(self) -> int:
        """The size of one panel; 0 for a tensor that is not in panels."""
        if not isinstance(self.layout, Panels):
            return 0
        return self.layout.width * self.channels * self.dtype.bytes

    def with_shape(self, shape: tuple[Dim, ...]) -> TensorType:
        return replace(self, shape=shape)

    def with_dtype(self, dtype: DType) -> TensorType:
        return replace(self, dtype=dtype)

    def with_layout(self, layout: Layout) -> TensorType:
        return replace(self, layout=layout)

    def __str__(self) -> str:
        dims = ", ".join(str(d) for d in self.shape)
        suffix = "" if self.layout == ROW_MAJOR else f" {self.layout}"
        quant = "" if self.quant is None else f" {self.quant}"
        return f"{self.dtype}[{dims}]{suffix}{quant}"
