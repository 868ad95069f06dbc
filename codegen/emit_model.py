"""Program -> model.c: a readable call sequence over the runtime's context.

The text depends on nothing but the Program, the weight offsets and the metadata: the same input
gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sparsec import __version__
from sparsec.codegen.c_text import C_TYPES, c_float, c_names, c_string, comment_text, magnitude
from sparsec.codegen.describe import describe_program
from sparsec.codegen.model_text import HEAD, TAIL, TARGETS
from sparsec.codegen.pack_weights import SYMBOL, WeightBlob
from sparsec.codegen.program import (
    Arg,
    BufferRef,
    Kernel,
    KernelCall,
    Kind,
    Parameter,
    Part,
    Port,
    Program,
    Region,
)
from sparsec.errors import InvalidGraph
from sparsec.ir import dims
from sparsec.ir.dims import Dim, Expr, Symbol

MAX_RANK = 8  # SPARSEC_MAX_RANK

# Names that functions of model.c use themselves.
_TAKEN = ("f", "s", "scratch", "begin", "end", "values", "weight", "place", "input",
          "output")  # fmt: skip


def emit_model(part: Part, blob: WeightBlob, targets: int = 1) -> str:
    """The text of model.c, of a library for so many targets; `blob` has the part's offsets.

    Raises InvalidGraph when an input shape can not bind the symbols.
    """
    program = part.program
    _check_bindings(program)
    kernels = {c.kernel.name: c.kernel for c in program.calls}
    names = _Symbols(program, kernels)
    sections = [
        HEAD.format(
            name=comment_text(program.name),
            version=__version__,
            isa=part.isa.value,
            weights=len(program.weights),
            nbytes=blob.nbytes,
            symbol=SYMBOL,
        ),
        "\n".join(_declaration(kernels[name]) for name in sorted(kernels)) + "\n",
        *(_step(i, call, blob, names) for i, call in enumerate(program.calls)),
        *_own_tables(program.calls),
        _step_table(program.calls),
        _chain_tables(program),
        _limit_table(program),
        _magnitude(program, names),
        _sizes(program, names),
        _found(program, names),
        _ports("input", program.inputs, program.symbols),
        _ports("output", program.outputs, program.symbols),
        _array("const char *const symbol_names", [c_string(s) for s in program.symbols]),
        _description(describe_program(program, blob, isa=part.isa.value, metadata=part.metadata)),
        _tail(part, blob, targets),
    ]
    return "\n".join(s for s in sections if s.strip())


def emit_targets(parts: Sequence[Part]) -> str:
    """The text of targets.c: the tables of all parts, in this order."""
    tables = [_table(part) for part in parts]
    return TARGETS.format(
        tables=", ".join(tables),
        addresses=", ".join(f"&{table}" for table in tables),
        count=len(tables),
    )


def _table(part: Part) -> str:
    return f"sparsec_model_{part.level.value}"


class _Symbols:
    """C variables for the program's symbols."""

    def __init__(self, program: Program, kernels: Iterable[str]):
        self.names = program.all_symbols
        self.variables = dict(
            zip(self.names, c_names(self.names, (*_TAKEN, *kernels)), strict=True)
        )

    def text(self, dim: Dim) -> str:
        renamed = {old: dims.symbol(new) for old, new in self.variables.items()}
        return dims.c_text(dims.substitute(dim, renamed))

    def declare(self, values: Iterable[Dim], source: str, type: str = "int64_t") -> str:
        """Local variables for the symbols that `values` depend on."""
        used = {name for value in values for name in dims.symbols(value)}
        return "".join(
            f"  const {type} {self.variables[name]} = {source}[{index}];\n"
            for index, name in enumerate(self.names)
            if name in used
        )


def _check_bindings(program: Program) -> None:
    shapes = [d for port in program.inputs for d in port.type.shape]
    bound = {name for d in shapes if (name := _symbol_of(d)) is not None}
    unbound = [s for s in program.symbols if s not in bound]
    if unbound:
        raise InvalidGraph(
            f"{program.name}: no input has an axis of size {unbound[0]}; "
            "its value could not be known when the model runs"
        )
    for port in (*program.inputs, *program.outputs):
        if port.type.rank > MAX_RANK:
            raise InvalidGraph(f"{port.name}: rank {port.type.rank} is above {MAX_RANK}")


def _symbol_of(dim: Dim) -> str | None:
    match dim:
        case Expr(terms=(((Symbol(name),), 1),)):
            return name
    return None


def _declaration(kernel: Kernel) -> str:
    parts = [f"{_c_type(p)}{_parameter_name(p)}" for p in kernel.parameters]
    if kernel.has_scratch:
        parts.append("void *scratch")
    parts += ["int64_t begin", "int64_t end"]
    text = f"int32_t {kernel.name}("
    width = len(text)
    for part in parts:
        separator = "" if text.endswith("(") else ", "
        if width + len(separator + part) > 96:
            separator, width = ",\n    ", 4
        text += separator + part
        width += len(separator + part)
    return f"{text});"


def _parameter_name(parameter: Parameter) -> str:
    return c_names([parameter.name], ())[0]


def _c_type(parameter: Parameter) -> str:
    if parameter.kind is Kind.POINTER:
        return f"{C_TYPES[parameter.dtype]} *"
    return f"{parameter.kind.value} "


def _step(index: int, call: KernelCall, blob: WeightBlob, names: _Symbols) -> str:
    kernel = call.kernel
    pairs = list(zip(kernel.parameters, call.args, strict=True))
    sizes = [a for p, a in pairs if p.kind is Kind.INT and isinstance(a, (int, Expr))]
    args = [f"{_argument(p, a, blob, names)} /* {_meaning(p, a)} */" for p, a in pairs]
    args += (["scratch"] if kernel.has_scratch else []) + ["begin, end"]
    return (
        f"/* step {index}: {comment_text(call.comment)} */\n"
        f"static int32_t step_{index}(const sparsec_frame *f, void *scratch, "
        "int64_t begin, int64_t end) {\n"
        + names.declare(sizes, "f->symbols")
        + f"  return {kernel.name}(\n      "
        + ",\n      ".join(args)
        + ");\n}\n"
    )


def _argument(parameter: Parameter, arg: Arg, blob: WeightBlob, names: _Symbols) -> str:
    match parameter.kind, arg:
        case Kind.POINTER, None:
            return "NULL"
        case Kind.POINTER, BufferRef(region=Region.WEIGHTS, index=index):
            return f"weight({blob.offsets[index]})"
        case Kind.POINTER, BufferRef(region=Region.ARENA, index=index):
            return f"place(f, {index})"
        case Kind.POINTER, BufferRef(region=region, index=index):
            return f"{region.value}(f, {index})"
        case Kind.INT, int() | Expr():
            return names.text(arg)
        case Kind.FLOAT, int() | float():
            return c_float(arg)
    raise AssertionError(f"{parameter} can not take {arg!r}")


def _meaning(parameter: Parameter, arg: Arg) -> str:
    if isinstance(arg, BufferRef):
        return comment_text(f"{parameter.name}: {arg.name}, {arg.type}")
    return comment_text(parameter.name)


def _own_tables(calls: Sequence[KernelCall]) -> Iterator[str]:
    for i, call in enumerate(calls):
        rows = [f"{{{own.place}, {own.panel_bytes}}}" for own in call.own]
        if rows:
            yield _array(f"const sparsec_own own_{i}", rows)


def _step_table(calls: Sequence[KernelCall]) -> str:
    rows = []
    for i, call in enumerate(calls):
        own = f"own_{i}, {len(call.own)}" if call.own else "NULL, 0"
        text = c_string(comment_text(call.comment))
        rows.append(f"{{step_{i}, {text}, {call.per_panel}, {own}}}")
    return _array("const sparsec_step steps", rows)


def _chain_tables(program: Program) -> str:
    chains = [f"{{{c.first}, {c.last}, {c.block}}}" for c in program.chains]
    places = [f"{{{slot}, {chained}}}" for slot, chained in program.slots_of_places]
    return (
        _array("const sparsec_chain chains", chains)
        + _array("const sparsec_place places", places)
        + _array("const int64_t own_slots", [str(size) for size in program.own_slots])
    )


def _limit_table(program: Program) -> str:
    rows = [
        f"{{{limit.most}, {c_string(str(limit.dim))}, {c_string(limit.reason)}}}"
        for limit in program.limits
    ]
    return _array("const sparsec_limit limits", rows)


def _magnitude(program: Program, names: _Symbols) -> str:
    ports = (*program.inputs, *program.outputs)
    values: list[Dim] = [d for port in ports for d in (*port.type.shape, port.type.nbytes)]
    values += [*program.slots, *program.chained_slots]
    values += [*(limit.dim for limit in program.limits), *(c.panels for c in program.chains)]
    for call in program.calls:
        values += [call.items, call.grain, call.scratch_bytes, call.tokens]
        values += [a for a in call.args if isinstance(a, (int, Expr))]
    bound = magnitude(program.bounded(v) for v in values)
    return (
        "/* No size that is computed from the symbols is larger than this. */\n"
        "static double magnitude(const double *values) {\n"
        + names.declare([bound], "values", "double")
        + f"  return {names.text(bound)};\n}}\n"
    )


def _sizes(program: Program, names: _Symbols) -> str:
    ports = (*program.inputs, *program.outputs)
    port_dims = [d for port in ports for d in port.type.shape]
    late = {f.symbol for f in program.found}
    calls = [[program.bounded(d) for d in (c.items, c.grain, c.scratch_bytes, c.tokens)]
             for c in program.calls]  # fmt: skip
    panels = [program.bounded(chain.panels) for chain in program.chains]
    values = [*port_dims, *program.slots, *program.chained_slots, *panels]
    values += [d for call in calls for d in call]
    values += [limit.dim for limit in program.limits]
    lines: list[str] = []
    position = 0
    for port in ports:
        lines.append(f"  /* {comment_text(f'{port.name}: {port.type}')} */")
        for dim in port.type.shape:
            lines.append(f"  s->dims[{position}] = {names.text(dim)};")
            position += 1
    lines.append("")
    for i, slot in enumerate(program.slots):
        lines.append(f"  s->slot_bytes[{i}] = {names.text(slot)};")
    for i, slot in enumerate(program.chained_slots):
        lines.append(f"  s->chained_slot_bytes[{i}] = {names.text(slot)};")
    for i, count in enumerate(panels):
        lines.append(f"  s->panels[{i}] = {names.text(count)};")
    lines.append("")
    for i, call in enumerate(program.calls):
        items, grain, scratch_bytes, tokens = calls[i]
        # A step may find fewer tokens, and so another bucket: then memory is there for any.
        chosen = "1" if dims.symbols(call.tokens) & late else _in_bucket(call, tokens, names)
        lines.append(f"  s->items[{i}] = {_if(_in_bucket(call, tokens, names), items, names)};")
        lines.append(f"  s->grain[{i}] = {names.text(grain)};")
        lines.append(f"  s->scratch_bytes[{i}] = {_if(chosen, scratch_bytes, names)};")
    for i, limit in enumerate(program.limits):
        lines.append(f"  s->limits[{i}] = {names.text(limit.dim)};")
    return (
        "static void sizes(const int64_t *values, const sparsec_sizes *s) {\n"
        + names.declare(values, "values")
        + "\n".join(lines).rstrip()
        + "\n}\n"
    )


def _in_bucket(call: KernelCall, tokens: Dim, names: _Symbols) -> str:
    """In C, whether the number of tokens is in the call's bucket; "1" where it always is."""
    bucket, text = call.bucket, names.text(tokens)
    tests = [f"{text} > {bucket.above}"] if bucket.above else []
    tests += [] if bucket.most is None else [f"{text} <= {bucket.most}"]
    return " && ".join(tests) or "1"


def _if(condition: str, value: Dim, names: _Symbols) -> str:
    """The value in C, but 0 where the condition does not hold."""
    text = names.text(value)
    return text if condition == "1" or text == "0" else f"{condition} ? {text} : 0"


def _found(program: Program, names: _Symbols) -> str:
    """What depends on the sizes that steps find: the work of later steps."""
    every = list(program.all_symbols)
    rows = [f"{{{f.call}, {every.index(f.symbol)}, {f.place.index}}}" for f in program.found]
    late = {f.symbol for f in program.found}
    values: list[Dim] = []
    lines = ""
    for i, call in enumerate(program.calls):
        if dims.symbols(call.items) & late or dims.symbols(call.tokens) & late:
            values += [call.items, call.grain, call.tokens]
            items = _if(_in_bucket(call, call.tokens, names), call.items, names)
            lines += f"  s->items[{i}] = {items};\n  s->grain[{i}] = {names.text(call.grain)};\n"
    for i, chain in enumerate(program.chains):
        if dims.symbols(chain.panels) & late:
            values.append(chain.panels)
            lines += f"  s->panels[{i}] = {names.text(chain.panels)};\n"
    return (
        _array("const sparsec_found found", rows)
        + "\n/* The work that depends on sizes found by steps. */\n"
        + "static void rework(const int64_t *values, const sparsec_sizes *s) {\n"
        + names.declare(values, "values")
        + (lines or "  (void)values;\n  (void)s;\n")
        + "}\n"
    )


def _ports(what: str, ports: Sequence[Port], symbols: Sequence[str]) -> str:
    text = ""
    rows: list[str] = []
    for index, port in enumerate(ports):
        dims_name = f"{what}_{index}_dims"
        dtype = f"SPARSEC_{port.type.dtype.name}"
        rows.append(f"{{{c_string(port.name)}, {dtype}, {port.type.rank}, {dims_name}}}")
        axes = [_axis(d, symbols) for d in port.type.shape]
        text += _array(f"const sparsec_dim_v1 {dims_name}", axes)
    return text + _array(f"const sparsec_tensor_v1 {what}s", rows)


def _axis(dim: Dim, symbols: Sequence[str]) -> str:
    name = _symbol_of(dim)
    symbol = -1 if name is None else list(symbols).index(name)
    size = dim if isinstance(dim, int) else -1
    return f"{{{size}, {symbol}, 0, {c_string(str(dim))}}}"


def _array(declaration: str, rows: Sequence[str]) -> str:
    """A static array; C has no empty ones, so an empty table has one element of zeros."""
    nothing = "NULL" if "*" in declaration else "0" if "int64_t" in declaration else "{0}"
    body = "".join(f"    {row},\n" for row in rows or [nothing])
    return f"static {declaration}[] = {{\n{body}}};\n"


def _description(text: str) -> str:
    lines = text.splitlines(keepends=True)
    literals = "\n".join(f"    {c_string(line)}" for line in lines)
    return f"static const char description[] =\n{literals};\n"


def _tail(part: Part, blob: WeightBlob, targets: int) -> str:
    program = part.program
    ports = (*program.inputs, *program.outputs)
    return TAIL.format(
        table=_table(part),
        name=c_string(program.name),
        isa=c_string(part.isa.value),
        target=c_string(part.target),
        level=c_string(part.level.value),
        targets=targets,
        inputs=len(program.inputs),
        outputs=len(program.outputs),
        symbols=len(program.symbols),
        weights=SYMBOL,
        nbytes=blob.nbytes,
        dims=sum(p.type.rank for p in ports),
        places=len(program.slots_of_places),
        slots=len(program.slots),
        chained_slots=len(program.chained_slots),
        chains=len(program.chains),
        steps=len(program.calls),
        limits=len(program.limits),
        found=len(program.found),
    )
