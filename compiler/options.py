"""The options of a compilation: the only home of defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparsec.errors import InvalidInput
from sparsec.ranges import METHODS
from sparsec.target import Isa, Target

PRECISIONS = ("fp32", "int8")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Where the ranges of int8 activations come from, and how they are chosen.

    One of: `data`, an npz with an array per input; `text` with `tokenizer`; `random` tokens, which
    are good for nothing but measuring speed.
    """

    data: Path | None = None
    text: Path | None = None
    tokenizer: Path | None = None
    random: bool = False
    method: str = "minmax"

    def __post_init__(self) -> None:
        if sum((self.data is not None, self.text is not None, self.random)) != 1:
            raise InvalidInput(
                "int8 needs the ranges of the activations: give one of --calibration FILE.npz, "
                "--calibration-text FILE with --tokenizer FILE, or --calibration random "
                "(for benchmarks: the answers will be poor); or --dynamic, which finds them when "
                "the model runs"
            )
        if self.text is not None and self.tokenizer is None:
            raise InvalidInput("--calibration-text needs the model's --tokenizer tokenizer.json")
        if self.method not in METHODS:
            raise InvalidInput(
                f"calibration method {self.method!r} is not one of {', '.join(METHODS)}"
            )


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """How to compile.

    `shapes` fixes input shapes: per input name the sizes in order, an int for a fixed size, a
    name for one that stays dynamic. `isa` forces a level below the best one of the target.
    """

    target: Target
    isa: Isa | None = None
    precision: str | None = None  # int8 for a quantised model, else fp32
    calibration: Calibration | None = None
    dynamic: bool = False  # a scale per token, found when the model runs
    keep_fp32: tuple[str, ...] = ()
    max_error: float | None = None  # of the outputs, relative: layers fall back to fp32 for it
    all_roundings: bool = False  # of a quantised model
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    dump_ir: Path | None = None
    report: Path | None = None
    cc: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in (None, *PRECISIONS):
            raise InvalidInput(
                f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}"
            )
        if self.precision != "int8" and self.calibration is not None:
            raise InvalidInput("calibration goes with --precision int8")
        if self.precision != "int8" and self.dynamic:
            raise InvalidInput("--dynamic goes with --precision int8")
        if self.dynamic and self.calibration is not None:
            raise InvalidInput(
                "--dynamic finds the ranges of the activations when the model runs: leave out "
                "either it or the calibration"
            )
        if self.max_error is not None and self.calibration is None:
            raise InvalidInput("--max-error is measured on calibration data: give --calibration")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise InvalidInput(
                f"--max-error {self.max_error:g}: a relative error between 0 and 1 is wanted"
            )
        if self.precision == "fp32" and self.all_roundings:
            raise InvalidInput("--all-roundings goes with --precision int8")
        if self.precision == "fp32" and self.keep_fp32:
            raise InvalidInput("--keep-fp32 goes with --precision int8")
        if self.isa is not None and not self.target.has(self.isa):
            have = ", ".join(i.value for i in self.target.isas)
            raise InvalidInput(
                f"target {self.target.name} does not have {self.isa.value}; it has {have}"
            )

    def is_int8(self, quantized: bool) -> bool:
        """Whether to compile a model in int8 that is `quantized` itself or not.

        Raises InvalidInput when the ranges of the activations are missing.
        """
        given = quantized or self.dynamic
        if self.precision == "int8" and self.calibration is None and not given:
            Calibration()  # says what is missing
        if self.precision is None and self.keep_fp32 and not quantized:
            raise InvalidInput("--keep-fp32 goes with --precision int8")
        return self.precision == "int8" or (self.precision is None and quantized)


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
