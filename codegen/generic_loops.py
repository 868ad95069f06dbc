"""Ops written as loops: they carry a value from step to step, or copy in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparsec.codegen import tir
from sparsec.codegen.generic_base import (
    Application,
    Plan,
    convert,
    flat,
    grain,
    int64,
    size_name,
    storage,
    tvm_bits,
    unflat,
    wide,
)
from sparsec.codegen.generic_elementwise import broadcast_runs, differs, elementwise, equals
from sparsec.codegen.program import Kind, Parameter
from sparsec.ir.dims import Dim, product


def parameters(app: Application) -> tuple[Parameter, ...]:
    """Operands, result, then the value of every symbol."""
    operands: Sequence[Parameter] = [
        Parameter(f"x{n}", Kind.POINTER, storage(t.dtype)) for n, t in enumerate(app.operands)
    ]
    result = Parameter("y", Kind.POINTER, storage(app.result.dtype))
    sizes = [Parameter(size_name(s), Kind.INT, "int64") for s in app.sizes]
    return (*operands, result, *sizes)


def loop_plan(
    app: Application,
    items: Dim,
    each: Sequence[Dim],
    body: Callable[[Application, tir.KernelScope], None],
) -> Plan:
    """`body` gets the op with its symbols bound to the parameters of the function."""

    def bound(k: tir.KernelScope) -> None:
        body(replace(app, sizes={name: k[size_name(name)] for name in app.sizes}), k)

    def build(name: str) -> Any:
        return tir.kernel_function(name, parameters(app), bound)

    return Plan(items, grain(each), build)


def _concat(app: Application) -> Plan:
    """For each index of the axes before: one copy after the other."""
    axis, shape = app.attrs["axis"], app.result.shape
    parts = [product(t.shape[axis:]) for t in app.operands]
    total = product(shape[axis:])

    def body(app: Application, k: tir.KernelScope) -> None:
        with T.serial(k.begin, k.end) as item:
            offset: Any = item * app.size(total)
            for n, part in enumerate(parts):
                length = app.size(part)
                with T.serial(int64(0), length) as i:
                    T.buffer_store(k["y"], k[f"x{n}"][item * length + i], [offset + i])
                offset = offset + length

    return loop_plan(app, product(shape[:axis]), (total,), body)


def _cumsum(app: Application) -> Plan:
    """Each step along the axis adds to the one before, which is read back from the result."""
    (x_type,), axis = app.operands, app.attrs["axis"]
    shape, size = x_type.shape, x_type.shape[axis]
    inner = product(shape[axis + 1 :])
    exclusive, reverse = app.attrs["exclusive"], app.attrs["reverse"]
    memory, dtype = storage(x_type.dtype), wide(x_type.dtype)

    def body(app: Application, k: tir.KernelScope) -> None:
        steps, width = app.size(size), app.size(inner)

        def offset(item: Any, step: Any, i: Any) -> Any:
            place = steps - int64(1) - step if reverse else step
            return (item * steps + place) * width + i

        def read(name: str, at: Any) -> Any:
            return convert(k[name][at], dtype)

        with T.serial(k.begin, k.end) as item:
            with T.serial(int64(0), tirx.min(steps, int64(1))), T.serial(int64(0), width) as i:
                at = offset(item, int64(0), i)
                first = tirx.const(0, memory) if exclusive else k["x0"][at]
                T.buffer_store(k["y"], first, [at])
            with T.serial(int64(1), steps) as step, T.serial(int64(0), width) as i:
                at, before = offset(item, step, i), offset(item, step - int64(1), i)
                added = read("x0", before if exclusive else at)
                T.buffer_store(k["y"], convert(read("y", before) + added, memory), [at])

    return loop_plan(app, product(shape[:axis]), (size, inner), body)


def _power(app: Application) -> Plan:
    """Integers by repeated squaring; a negative power truncates to 0, 1 or -1."""
    if app.result.dtype.is_float:
        return elementwise(app)
    runs = broadcast_runs(app.result.shape, [t.shape for t in app.operands])
    dims = [product(app.result.shape[a] for a in axes) for axes, _ in runs]

    def body(app: Application, k: tir.KernelScope) -> None:
        sizes = app.shape(dims)
        with T.serial(k.begin, k.end) as item:
            index = unflat(item, sizes)
            at = []
            for n in (0, 1):
                own = [r for r, (_, full) in enumerate(runs) if full[n]]
                at.append(flat([index[r] for r in own], [sizes[r] for r in own]))
            result = _integer_power(k["x0"][at[0]], k["x1"][at[1]], storage(app.result.dtype))
            T.buffer_store(k["y"], result, [item])

    return loop_plan(app, product(dims), (), body)


def _integer_power(base: Any, exponent: Any, dtype: str) -> Any:
    signed = dtype.startswith("int")
    one, minus, zero = (tirx.const(v, dtype) for v in (1, -1 if signed else 0, 0))
    state = tir.registers(dtype, 3)  # result, base ** 2 ** step, the exponent's bits still to do
    for place, value in enumerate((one, base, exponent)):
        T.buffer_store(state, value, [place])
    with T.serial(0, tvm_bits(dtype) - signed):
        odd = differs(state[2] & one, 0)
        T.buffer_store(state, tirx.Select(odd, state[0] * state[1], state[0]), [0])
        T.buffer_store(state, state[1] * state[1], [1])
        T.buffer_store(state, state[2] >> one, [2])
    if not signed:
        return state[0]
    sign = tirx.Select(differs(exponent & one, 0), minus, one)
    inverse = tirx.Select(equals(base, 1), one, tirx.Select(equals(base, -1), sign, zero))
    return tirx.Select(exponent < 0, inverse, state[0])


LOOPS: dict[str, Callable[[Application], Plan]] = {
    "concat": _concat,
    "cumsum": _cumsum,
    "pow": _power,
}
