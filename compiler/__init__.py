"""sparsec compiles a transformer encoder in ONNX into one standalone shared library.

`compile_model` and `load` are imported on first use, so that `import sparsec.runtime`
loads neither onnx nor TVM.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "compile_model", "load"]


def __getattr__(name: str) -> Any:
    if name == "compile_model":
        try:
            from sparsec.driver import compile_model
        except ModuleNotFoundError as error:
            from sparsec.errors import MissingPackage

            raise MissingPackage(error.name) from None
        return compile_model
    if name == "load":
        from sparsec.runtime import load

        return load
    raise AttributeError(f"module 'sparsec' has no attribute {name!r}")
