"""The errors a user can meet.

Each message names the place, what was wanted, what came and what to do about it.
"""


class CompilerError(Exception):
    """Base of all errors that are a user's to read."""


class InvalidModel(CompilerError):
    """The ONNX file is not one that can be read: damaged, cyclic, incomplete."""


class UnsupportedOp(CompilerError):
    """The model uses an operator, a form of it, or a dtype that has no lowering."""


class InvalidGraph(CompilerError):
    """Shapes, types or operands of the graph contradict each other."""


class PassFailed(CompilerError):
    """A pass left the graph in a state that the verifier refuses."""


class NoSchedule(CompilerError):
    """No kernel computes this workload on this target."""


class ToolchainFailed(CompilerError):
    """The C compiler or the linker refused its input, or is missing."""


class InvalidInput(CompilerError):
    """An argument of a command or of a run is not what is wanted."""


class AbiMismatch(CompilerError):
    """The shared library speaks another version of the C ABI, or is damaged."""


class MissingPackage(CompilerError):
    """A package of an extra is needed for this and not installed."""

    def __init__(self, package: str | None, extra: str = "compiler") -> None:
        super().__init__(
            f"this needs the package {package}, which is not installed; "
            f"pip install 'sparsec[{extra}]' (running a model.so needs NumPy only)"
        )


class UnsupportedCpu(CompilerError):
    """The CPU lacks an instruction set that the shared library needs."""
