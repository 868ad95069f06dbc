"""What a library says about itself: the JSON that is part of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparsec import __version__
from sparsec.codegen.pack_weights import WeightBlob, stored
from sparsec.codegen.program import KernelCall, Part, Port, Program
from sparsec.ir.dims import Dim, Symbol, evaluate, only_atom, symbols

EXAMPLE_TOKENS = 128


def describe_program(
    program: Program, blob: WeightBlob, *, isa: str, metadata: Mapping[str, Any]
) -> str:
    """Stable JSON text; `metadata` (passes, versions, target) is added at the top level."""
    description = {
        "name": program.name,
        "sparsec": __version__,
        "isa": isa,
        "symbols": list(program.symbols),
        "inputs": [_port(p) for p in program.inputs],
        "outputs": [_port(p) for p in program.outputs],
        "limits": _limits(program),
        "steps": [_step(program, c) for c in program.calls],
        **({"chains": describe_chains(program)} if program.chains else {}),
        "arena": describe_arena(program),
        "weights": {
            "count": len(program.weights),
            "bytes": blob.nbytes,
            "blake2b_128": blob.digest,
        },
    }
    items = {**description, **metadata}.items()
    return (
        "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in items) + "\n}"
    )


def describe_arena(program: Program) -> dict[str, Any]:
    """Its slots, and its size in bytes for one thread and an example: one sequence of
    EXAMPLE_TOKENS, or of as many as it can have."""
    shapes = [port.type.shape for port in program.inputs]
    first = {name for shape in shapes for dim in shape[:1] for name in symbols(dim)}
    most = _limits(program)
    env = {
        name: 1 if name in first else min(EXAMPLE_TOKENS, most.get(name, EXAMPLE_TOKENS))
        for name in program.symbols
    }
    axes = [evaluate(dim, env) for dim in shapes[0][:2]] if shapes else []
    total = program.arena_bytes(env)
    return {
        "slot_bytes": [_dim(s) for s in program.slots],
        "example": "x".join(str(size) for size in axes),
        "bytes": total,
        "bytes_per_token": round(total / max(1, math.prod(axes))),
    }


def _limits(program: Program) -> dict[str, int]:
    """The largest value of each symbol that has one by itself."""
    found: dict[str, int] = {}
    for limit in program.limits:
        atom = only_atom(limit.dim)
        if isinstance(atom, Symbol):
            found[atom.name] = min(limit.most, found.get(atom.name, limit.most))
    return found


def describe_chains(program: Program) -> list[dict[str, int]]:
    """The steps `first` to `last` of each, which a worker may do for some panels at a time."""
    return [
        {"first": c.first, "last": c.last, "panels_at_a_time": c.block} for c in program.chains
    ]


def with_targets(parts: Sequence[Part]) -> list[Part]:
    """Each part tells of all of them."""
    targets = [{"target": part.target, "isa": part.level.value} for part in parts]
    return [replace(part, metadata={**part.metadata, "targets": targets}) for part in parts]


def describe_weights(parts: Sequence[Part], blobs: Sequence[WeightBlob]) -> dict[str, Any]:
    """The bytes of the constants: all, those that every target reads, and those of each."""
    every = [stored(p.program.weights, b) for p, b in zip(parts, blobs, strict=True)]
    shared = set.intersection(*(set(sizes) for sizes in every))
    return {
        "bytes": blobs[0].nbytes,
        "shared_bytes": sum(every[0][offset] for offset in shared),
        "target_bytes": {
            part.target: sum(sizes.values()) for part, sizes in zip(parts, every, strict=True)
        },
    }


def _lines(value: Any) -> str:
    """JSON with one line per record of a list."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f" {json.dumps(record)}" for record in value) + "\n]"
    return json.dumps(value)


def _port(port: Port) -> dict[str, Any]:
    return {
        "name": port.name,
        "dtype": port.type.dtype.value,
        "shape": [_dim(d) for d in port.type.shape],
    }


def _step(program: Program, call: KernelCall) -> dict[str, Any]:
    """Sizes are the most that they can be: those of a batch without padding.

    `tokens` are above `above` and, unless null, at most `most` where this call is made.
    """
    return {
        "kernel": call.kernel.name,
        "isa": call.kernel.isa,
        "op": call.op,
        "node": call.node,
        "comment": call.comment,
        "schedule": call.schedule,
        "tokens": _dim(program.bounded(call.tokens)),
        "above": call.bucket.above,
        "most": call.bucket.most,
        "macs": _dim(program.bounded(call.macs)),
        "bytes": _dim(program.bounded(call.bytes)),
        "items": _dim(program.bounded(call.items)),
        "grain": _dim(program.bounded(call.grain)),
        "scratch_bytes": _dim(program.bounded(call.scratch_bytes)),
    }


def _dim(dim: Dim) -> int | str:
    return dim if isinstance(dim, int) else str(dim)
