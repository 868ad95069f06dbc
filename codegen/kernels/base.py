"""What a kernel family is: from an op to the kernel calls that compute it."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from sparsec.codegen import tir
from sparsec.codegen.isa import vector_isas
from sparsec.codegen.isa.vector import VectorIsa
from sparsec.codegen.program import Arg, BufferRef, Kernel, KernelCall, Parameter
from sparsec.ir.graph import Node, Value
from sparsec.ir.op_spec import Array
from sparsec.ir.schedule import Schedule, Workload
from sparsec.target import Target


class TirKernel:
    """A kernel that is its parameters: a subclass has a name, the parameters of its function, and
    its body, which finds them in a KernelScope."""

    __slots__ = ()
    scratch: ClassVar[str | None] = None  # the element type of its scratch memory
    vector: VectorIsa  # where a subclass does not say `isa` itself

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        raise NotImplementedError

    @property
    def has_scratch(self) -> bool:
        return self.scratch is not None

    @property
    def isa(self) -> str:
        return self.vector.name

    def build(self) -> Any:
        return tir.kernel_function(self.name, self.parameters, self._body, scratch=self.scratch)

    def _body(self, s: tir.KernelScope) -> None:
        raise NotImplementedError


class Binder(Protocol):
    """Gives a family the memory of the values it works on."""

    def ref(self, value: Value) -> BufferRef:
        """Where `value` lies: arena, weight blob (constants as they are), input or output."""

    def weight(self, name: str, data: Array) -> BufferRef:
        """Adds a constant in a kernel's own form to the weight blob."""

    def optional(self, value: Value | None) -> Arg:
        """`ref`, or a null pointer for an absent operand."""


def same_memory(a: BufferRef, b: BufferRef) -> bool:
    """Whether two values lie in the same place: the one is to be written over the other."""
    return (a.region, a.index) == (b.region, b.index)


def vector_schedules(family: str, target: Target) -> list[Schedule]:
    """One on each level of fp32 vectors that the target has, the widest first."""
    return [Schedule(family, v.name) for v in vector_isas(target)]


class KernelFamily(Protocol):
    """A family of kernels for one op (or a table of ops)."""

    @property
    def ops(self) -> tuple[str, ...]:
        """The IR ops that it computes."""

    def workload(self, node: Node) -> Workload:
        """What the node asks for."""

    def schedules(self, workload: Workload, target: Target) -> list[Schedule]:
        """All valid schedules, the heuristic's choice first; empty when it can not be computed."""

    def lower(self, node: Node, schedule: Schedule, binder: Binder) -> list[KernelCall]:
        """The calls that compute the node."""

    def variants(self) -> list[Kernel]:
        """Every kernel that a schedule can ask for: what the kernel tests run over."""
