"""Patterns of node names that stay fp32: shared by the passes that lower precision."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from sparsec.errors import InvalidInput
from sparsec.ir.graph import Node

NAMED = ("linear", "attention", "embedding", "embedding_int8")  # what a pattern may name


def check_patterns(nodes: Sequence[Node], patterns: Sequence[str]) -> None:
    """Raises InvalidInput for a pattern that fits none of the nodes of NAMED."""
    named = [n.name for n in nodes if n.op in NAMED]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            names = ", ".join(named) or "none"
            raise InvalidInput(
                f"no product, attention or embedding is named like {pattern!r}; there are {names}"
            )


def kept(node: Node, patterns: Sequence[str]) -> str | None:
    """Why a node stays fp32 by its name; None when no pattern fits."""
    fitting = (p for p in patterns if fnmatchcase(node.name, p))
    return next((f"its name matches {p!r}" for p in fitting), None)
