"""How a tensor lies in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PANEL_WIDTH = 64  # tokens: four 512-bit registers of fp32, one of int8


@dataclass(frozen=True, slots=True)
class RowMajor:
    """Last axis contiguous, no padding."""

    def __str__(self) -> str:
        return "rows"


@dataclass(frozen=True, slots=True)
class Panels:
    """Token panels: shape `[..., channels]` flattened to tokens x channels.

    `planar` is `[panel][channel][width]`: the tokens of one channel lie side by side.
    `pairs` is `[panel][channel / 2][width][2]`: two channels of a token form a 32-bit lane. It is
    the form of bf16, whose channels are even in number.
    The lanes past the last token of the last panel are zero or finite garbage, never NaN.
    """

    width: int = PANEL_WIDTH
    form: Literal["planar", "pairs"] = "planar"

    def __str__(self) -> str:
        return f"{self.form}{self.width}"


@dataclass(frozen=True, slots=True)
class Bsr:
    """A constant weight `[out, in]` as block sparse rows of `rows x cols` blocks."""

    rows: int
    cols: int

    def __str__(self) -> str:
        return f"bsr{self.rows}x{self.cols}"


Layout = RowMajor | Panels | Bsr
ROW_MAJOR = RowMajor()
