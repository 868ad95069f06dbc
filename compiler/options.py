"""The options of a compilation: the only home of defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparsec.errors import InvalidInput
from sparsec.ranges import METHODS
from sparsec.target import Isa, Target

MOST_THREADS = 1024  # of a context: the runtime's limit
PRECISIONS = ("fp32", "bf16", "int8")
NO_RANGES = (
    "int8 needs the ranges of the activations: give one of --calibration FILE.npz, "
    "--calibration-text FILE with --tokenizer FILE, or --calibration random (for benchmarks: the "
    "answers will be poor); or --dynamic, which finds them when the model runs"
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Where the ranges of int8 activations come from, and how they are chosen.

    One of: `data`, an npz with an array per input; `text` with `tokenizer`; `random` tokens, which
    are good for nothing but measuring speed.
    """

    data: Path | None = None  # a str becomes one
    text: Path | None = None
    tokenizer: Path | None = None
    random: bool = False
    method: str = "minmax"

    def __post_init__(self) -> None:
        for name in ("data", "text", "tokenizer"):
            path = getattr(self, name)
            object.__setattr__(self, name, None if path is None else Path(path))
        if sum((self.data is not None, self.text is not None, self.random)) != 1:
            raise InvalidInput(NO_RANGES)
        if self.text is not None and self.tokenizer is None:
            raise InvalidInput("--calibration-text needs the model's --tokenizer tokenizer.json")
        if self.tokenizer is not None and self.text is None:
            raise InvalidInput("--tokenizer goes with --calibration-text: give that, or neither")
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
    rest: str = "fp32"  # precision of the products that int8 leaves
    attention: str | None = None  # by default that of the products
    calibration: Calibration | None = None
    dynamic: bool = False  # a scale per token, found when the model runs
    keep_fp32: tuple[str, ...] = ()
    balance: float | None = None  # of int8 inputs with weights: how much weights take over, 0..1
    max_error: float | None = None  # of the outputs, relative: layers fall back to fp32 for it
    all_roundings: bool = False  # of a quantised model
    threads: int = 1  # that the model is to run with: which records and costs count
    keep_padding: bool = False  # compute padding even where it can not matter
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    log: Path | Literal["none"] | None = None  # a tuning log; None: that of the package
    dump_ir: Path | None = None
    report: Path | None = None
    cc: str | None = None
    rates: Path | None = None  # folder of what `sparsec calibrate` measured

    def __post_init__(self) -> None:
        if self.precision not in (None, *PRECISIONS):
            raise InvalidInput(
                f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}"
            )
        if not isinstance(self.calibration, Calibration | None):
            raise InvalidInput(
                f"calibration {self.calibration!r}: wanted sparsec.options.Calibration(data=...)"
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
        if not 1 <= self.threads <= MOST_THREADS:
            raise InvalidInput(
                f"--threads {self.threads}: wanted at least 1, at most {MOST_THREADS}"
            )
        self._check_balance()
        self._check_max_error()
        if self.precision in ("fp32", "bf16") and self.all_roundings:
            raise InvalidInput("--all-roundings goes with --precision int8")
        if self.precision == "fp32" and self.keep_fp32:
            raise InvalidInput("--keep-fp32 goes with --precision int8 or bf16")
        self._check_mixture()
        if self.isa is not None and not self.target.has(self.isa):
            have = ", ".join(i.value for i in self.target.isas)
            raise InvalidInput(
                f"target {self.target.name} does not have {self.isa.value}; it has {have}"
            )

    def _check_balance(self) -> None:
        if self.balance is None:
            return
        if self.calibration is None:
            raise InvalidInput("--balance is found on calibration data: give --calibration")
        if not 0 <= self.balance <= 1:
            raise InvalidInput(f"--balance {self.balance:g}: wanted 0 to 1, for example 0.5")

    def _check_max_error(self) -> None:
        if self.max_error is None:
            return
        if self.calibration is None:
            raise InvalidInput("--max-error is measured on calibration data: give --calibration")
        if not 0 < self.max_error < 1:
            raise InvalidInput(
                f"--max-error {self.max_error:g}: a relative error between 0 and 1 is wanted"
            )
        if self.uses_bf16:
            raise InvalidInput(
                "--max-error is measured with fp32 for what int8 leaves: leave out either it or "
                "--rest bf16 and --attention bf16"
            )

    def _check_mixture(self, quantized: bool = True) -> None:
        """Whether `rest` and `attention` fit the precision, of a model that is `quantized`."""
        int8 = self.precision == "int8" or (self.precision is None and quantized)
        if self.rest not in ("fp32", "bf16"):
            raise InvalidInput(f"--rest {self.rest!r} is not one of fp32, bf16")
        if self.attention not in (None, *PRECISIONS):
            raise InvalidInput(
                f"--attention {self.attention!r} is not one of {', '.join(PRECISIONS)}"
            )
        if self.rest != "fp32" and not int8:
            raise InvalidInput("--rest goes with --precision int8: it is for what int8 leaves")
        if self.attention == "int8" and not int8:
            raise InvalidInput("--attention int8 goes with --precision int8")
        if self.attention == "int8" and self.dynamic and not quantized:
            raise InvalidInput(
                "--attention int8 needs the ranges of queries, keys and values: give calibration "
                "instead of --dynamic, or leave attention to fp32 or bf16"
            )
        if self.uses_bf16 and not self._target_has_bf16:
            raise InvalidInput(
                f"bf16 needs avx512bf16, which {self._machine} does not have; "
                "compile in fp32 or int8, or for another target (znver4, sapphirerapids)"
            )

    @property
    def uses_bf16(self) -> bool:
        """Whether anything is asked for in bf16."""
        return "bf16" in (self.precision, self.rest, self.attention)

    @property
    def _target_has_bf16(self) -> bool:
        return self.target.limited(self.isa).has(Isa.AVX512_BF16)

    @property
    def _machine(self) -> str:
        limit = "" if self.isa is None else f" limited to {self.isa.value}"
        return f"the target {self.target.name}{limit}"

    def is_int8(self, quantized: bool) -> bool:
        """Whether to compile a model in int8 that is `quantized` itself or not.

        Raises InvalidInput when the ranges of the activations are missing.
        """
        given = quantized or self.dynamic
        if self.precision == "int8" and self.calibration is None and not given:
            raise InvalidInput(NO_RANGES)
        if self.precision is None and self.keep_fp32 and not quantized:
            raise InvalidInput("--keep-fp32 goes with --precision int8 or bf16")
        self._check_mixture(quantized)
        return self.precision == "int8" or (self.precision is None and quantized)


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int | str, ...]]:
    """The shapes of texts of parse_shape, by name. Raises InvalidInput for a name given twice."""
    found: dict[str, tuple[int | str, ...]] = {}
    for name, shape in map(parse_shape, texts):
        if name in found:
            raise InvalidInput(f"--shape {name}=... is there twice; give each input one shape")
        found[name] = shape
    return found


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
