"""The flat and final form of a model: kernel calls over buffers. No graph is left."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sparsec.ir.dims import Dim, evaluate, substitute
from sparsec.ir.graph import Limit
from sparsec.ir.memory_plan import total_bytes
from sparsec.ir.schedule import EVERY, Bucket
from sparsec.ir.types import TensorType
from sparsec.target import Isa


class Kind(enum.Enum):
    """What a kernel parameter is in C."""

    POINTER = "pointer"
    INT = "int64_t"
    FLOAT = "float"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a kernel function; `dtype` is the element type behind a pointer."""

    name: str
    kind: Kind = Kind.POINTER
    dtype: str = "float32"


class Kernel(Protocol):
    """A generator of one C function.

    `int32_t name(parameters..., [void *scratch,] int64_t begin, int64_t end)` works on the items
    `[begin, end)` and returns 0 or a status of `sparsec.h`. `scratch` is there when `has_scratch`:
    memory of the calling worker alone. Pointers are 64-byte aligned, model inputs and outputs
    excepted.
    """

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> tuple[Parameter, ...]: ...

    @property
    def has_scratch(self) -> bool: ...

    @property
    def isa(self) -> str: ...

    def build(self) -> Any:
        """The TIR PrimFunc, of that name and signature."""


class Region(enum.Enum):
    """Which memory a buffer is in."""

    ARENA = "arena"
    WEIGHTS = "weights"
    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class BufferRef:
    """A buffer: `index` is the place in the arena, the weight, the model input or output."""

    region: Region
    index: int
    type: TensorType
    name: str


Arg = BufferRef | Dim | float | None  # None is a null pointer


@dataclass(frozen=True, slots=True)
class Own:
    """A buffer of which a worker in a chain has a part for itself: its place, and the size of a
    panel."""

    place: int
    panel_bytes: int


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One call: `items` work items that may run in any order and on any worker.

    `macs` is the number of multiply-accumulates that count as useful: of a sparse weight those of
    its non-zero blocks. `bytes` is what it has to move at least: all of its operands, weights
    and results once; of a look-up the rows that it copies. A run whose `tokens` are not in
    `bucket` leaves the call out: it is one of several ways to compute the node. `op`, `node` and
    `schedule` say where the call comes from; lowering fills in these, the bytes, the bucket and
    `own`. `per_panel` of the items compute one panel, those of a panel after those of another; 0:
    not so.
    """

    kernel: Kernel
    args: tuple[Arg, ...]
    items: Dim
    comment: str
    scratch_bytes: Dim = 0
    grain: Dim = 1  # least number of items worth a worker of its own
    macs: Dim = 0
    bytes: Dim = 0
    op: str = ""
    node: str = ""
    schedule: str = ""
    tokens: Dim = 0
    bucket: Bucket = EVERY
    per_panel: int = 0
    own: tuple[Own, ...] = ()


@dataclass(frozen=True, slots=True)
class CallChain:
    """Calls `first` to `last`, which a worker may make for `block` of the `panels` at a time."""

    first: int
    last: int
    panels: Dim
    block: int


@dataclass(frozen=True, slots=True)
class Port:
    """A model input or output."""

    name: str
    type: TensorType


@dataclass(frozen=True, slots=True)
class Weight:
    """One constant in the form that its kernel reads."""

    name: str
    data: np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Found:
    """A symbol whose value call `call` finds: the int64 in `place`.

    It is at most `most`.
    """

    symbol: str
    most: Dim
    call: int
    place: BufferRef


@dataclass(frozen=True, slots=True)
class Program:
    """All that is emitted: `slots` are the byte sizes of the arena's slots.

    A run that makes use of chains has `chained_slots` instead, and `places` has the slot of each
    place and its chained slot. Without chains the places are the slots. A chained slot that holds
    what workers have for themselves is for as many panels as they have at a time: `own_slots` is
    the size for one of them, 0 for the other slots.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    symbols: tuple[str, ...]  # bound from the input shapes, in this order
    weights: tuple[Weight, ...]
    slots: tuple[Dim, ...]
    calls: tuple[KernelCall, ...]
    chains: tuple[CallChain, ...] = ()
    chained_slots: tuple[Dim, ...] = ()
    own_slots: tuple[int, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    limits: tuple[Limit, ...] = ()  # checked when the symbols are bound
    found: tuple[Found, ...] = ()  # in the order of their calls

    @property
    def slots_of_places(self) -> tuple[tuple[int, int], ...]:
        """`places`, without chains too."""
        return self.places if self.chains else tuple((i, i) for i in range(len(self.slots)))

    @property
    def all_symbols(self) -> tuple[str, ...]:
        """The symbols of the input shapes, then those that are found when the model runs."""
        return (*self.symbols, *(f.symbol for f in self.found))

    def bounded(self, size: Dim) -> Dim:
        """`size`, or its most: in the symbols of the input shapes alone. No size falls when a
        symbol grows."""
        return substitute(size, {f.symbol: f.most for f in self.found})

    def arena_bytes(self, env: Mapping[str, int]) -> int:
        """What the arena takes for one thread when the symbols have the values in `env`."""
        scratch = max(
            (evaluate(self.bounded(call.scratch_bytes), env) for call in self.calls), default=0
        )
        return total_bytes((*self.slots, scratch), env)


@dataclass(frozen=True, slots=True)
class Part:
    """What a library has for one target: `isa` is the highest level that a kernel uses, `level`
    the best one of the target. `metadata` is what the library says about it besides its ports and
    kernel calls.
    """

    program: Program
    target: str
    level: Isa
    isa: Isa
    metadata: Mapping[str, Any]
