"""The options of a compilation: the only home of defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparsec.errors import InvalidInput
from sparsec.target import Isa, Target

PRECISIONS = ("fp32",)


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """How to compile.

    `shapes` fixes input shapes: per input name the sizes in order, an int for a fixed size, a
    name for one that stays dynamic. `isa` forces a level below the best one of the target.
    """

    target: Target
    isa: Isa | None = None
    precision: str = "fp32"
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    dump_ir: Path | None = None
    report: Path | None = None
    cc: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InvalidInput(
                f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}"
            )
        if self.isa is not None and not self.target.has(self.isa):
            have = ", ".join(i.value for i in self.target.isas)
            raise InvalidInput(
                f"target {self.target.name} does not have {self.isa.value}; it has {have}"
            )


def parse_shape(text: str) -> tuple[str, tuple[int | str, ...]]:
    """`name=1x128` or `name=batchx128` as (name, sizes).

    Raises InvalidInput when the text has another form or a size below 1.
    """
    name, separator, sizes = text.partition("=")
    parts = sizes.split("x")
    if not separator or not name or not all(parts):
        raise InvalidInput(f"--shape {text!r}: wanted NAME=SIZExSIZE, for example input_ids=1x128")
    shape = tuple(int(p) if p.isdigit() else p for p in parts)
    if any(size == 0 for size in shape):
        raise InvalidInput(f"--shape {text!r}: a size must be at least 1")
    return name, shape
