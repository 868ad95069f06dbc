"""Which code makes a kernel: a fingerprint that changes when that code does, and only then.

It covers the family's module and what that imports of kernels, of instruction sets, and of what
calls LLVM, as syntax trees without docstrings: comments, formatting and other families leave it
alone.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from sparsec.codegen.kernels import FAMILIES

# The isa package itself too: most families find their vectors in its lists.
_COVERED = re.compile(r"sparsec\.codegen\.(kernels\..*|isa(\..*)?|tir)$")
# The cost model says how long a kernel takes, and makes none.
_COST_MODEL = re.compile(r".*(_cost|\.costs|\.counts|\.work)$")
_DIGITS = 12
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def revision(op: str) -> str | None:
    """The fingerprint of the family that computes `op`; None when there is no such family."""
    family = FAMILIES.get(op)
    return None if family is None else module_revision(type(family).__module__)


@functools.cache
def module_revision(module: str) -> str:
    """The fingerprint of a module and of the covered modules below it."""
    digest = hashlib.sha256()
    for name in sorted(_reached(module)):
        digest.update(f"{name}\n{fingerprint(_source(name))}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def fingerprint(source: str) -> str:
    """The code of a module as text, without what does not run."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def _reached(module: str) -> set[str]:
    found, open = set[str](), [module]
    while open:
        name = open.pop()
        if name not in found:
            found.add(name)
            open += _imports(name)
    return found


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_source(module))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (node.module, *(f"{node.module}.{a.name}" for a in node.names)):
                covered = _COVERED.match(name) and not _COST_MODEL.match(name)
                if covered and _is_module(name):
                    yield name


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # `name` is an object in a module
        return False


@functools.cache
def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin).read_text(encoding="utf-8")
