"""The only file that knows how TVM turns a function into an object file with plain C symbols.

Kernels are built with TVM's IR builder from ordinary Python, so a kernel family is a loop nest
with functions as hooks:

    def body(k: KernelScope) -> None:
        with loop(k.begin, k.end) as item:  # of kernels/panels.py; see docs/kernels.md for why
            ...
    tir.kernel_function("name", parameters, body)

Pointers become flat buffers without bounds. Accumulators come from `registers`: a small stack
buffer that LLVM keeps in vector registers when every index into it is a constant.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import tvm
from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from sparsec.codegen.program import Kind, Parameter

VERSION = str(tvm.__version__)  # of the code generator
UNBOUNDED = 1 << 40  # elements; buffers behind pointers have no extent of their own
MAX_EXITS = 16  # statements of a kernel that leave it, its end among them
_STATUS = "sparsec_status"
BF16_DOT = "sparsec_bf16_dot"
BF16_PAIRS = "sparsec_bf16_pairs"
EXPAND = "sparsec_expand"
_EMPTY_REGISTERS = "sparsec_empty_registers"
_UNSPLIT = "sparsec_unsplit"
# TVM has no vectors of LLVM's type bfloat: these take and give int32 vectors of pairs.
_BF16 = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define <16 x float> @{BF16_DOT}(<16 x float> %sum, <16 x i32> %x, <16 x i32> %w) alwaysinline {{
  %a = bitcast <16 x i32> %x to <32 x bfloat>
  %b = bitcast <16 x i32> %w to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %sum, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %r
}}
define <32 x i16> @{BF16_PAIRS}(<16 x float> %low, <16 x float> %high) alwaysinline {{
  %p = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(
      <16 x float> %high, <16 x float> %low)
  %r = bitcast <32 x bfloat> %p to <32 x i16>
  ret <32 x i16> %r
}}
"""
# TVM has no vectors of bits that an integer can become. What is expanded stays in a register: from
# memory the same instruction is many times slower on some CPUs.
_EXPAND = f"""
declare <64 x i8> @llvm.x86.avx512.mask.expand.v64i8(<64 x i8>, <64 x i8>, <64 x i1>)
define <16 x i32> @{EXPAND}(i64 %mask, <64 x i8> %values) alwaysinline {{
  %bits = bitcast i64 %mask to <64 x i1>
  %whole = call <64 x i8> asm "", "=v,0"(<64 x i8> %values)
  %bytes = call <64 x i8> @llvm.x86.avx512.mask.expand.v64i8(
      <64 x i8> %whole, <64 x i8> zeroinitializer, <64 x i1> %bits)
  %words = bitcast <64 x i8> %bytes to <16 x i32>
  ret <16 x i32> %words
}}
"""
_CLOBBERED = ",".join(f"~{{xmm{i}}}" for i in range(32))
_BARRIER = f"""
define i32 @{_EMPTY_REGISTERS}() alwaysinline {{
  call void asm sideeffect "", "{_CLOBBERED}"()
  ret i32 0
}}
"""
_WHOLE_VECTOR = f"""
define <16 x i32> @{_UNSPLIT}(<16 x i32> %x) alwaysinline {{
  %r = call <16 x i32> asm "", "=v,0"(<16 x i32> %x)
  ret <16 x i32> %r
}}
"""


@dataclass(frozen=True, slots=True)
class KernelScope:
    """What the body of a kernel can name: its parameters, `scratch` bytes, and its item range."""

    params: Mapping[str, Any]
    scratch: Any
    begin: Any
    end: Any

    def __getitem__(self, name: str) -> Any:
        return self.params[name]


def kernel_function(
    name: str,
    parameters: Sequence[Parameter],
    body: Callable[[KernelScope], None],
    *,
    scratch: str | None = None,
) -> Any:
    """The PrimFunc of a kernel: see `program.Kernel` for its C signature.

    `scratch` is the element type under which the body sees its scratch memory. The body returns
    nothing and falls off its end for status 0; `fail` leaves it early.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "global_symbol": name, "calling_conv": 1})
        T.func_ret(tvm.ir.PrimType("int32"))
        args = {p.name: _argument(p) for p in parameters}
        scratch_arg = T.arg("scratch", T.handle(scratch)) if scratch else None
        begin, end = T.arg("begin", T.int64()), T.arg("end", T.int64())
        with T.attr("default", "device_id", 0), T.attr("default", "device_type", 1):
            bound = {p.name: _bind(p, args[p.name]) for p in parameters}
            memory = _flat(scratch, scratch_arg) if scratch else None
            body(KernelScope(bound, memory, begin, end))
            fail(0)
    return builder.get()


def fail(status: int) -> None:
    """Return `status` from the kernel."""
    T.add_to_parent(leave(status))


def leave(status: int) -> Any:
    """The statement that returns `status` from the function.

    TVM can return 0 alone, but it returns the result of a call of a C function when that is not
    0. The function called here, one of `_status_helpers`, returns its third argument.
    """
    if status == 0:
        return tirx.Return(tirx.const(0, "int32"))
    null = tirx.reinterpret("handle", tirx.const(0, "uint64"))
    return tirx.Evaluate(tirx.call_cpacked_lowered(_STATUS, null, 0, status))


def empty_registers() -> None:
    """No vector lives in a register here; for AVX-512.

    LLVM keeps constants of one loop in registers throughout the loops around it, and then has
    too few for the sums of another. Between the two, this makes it load the constants again.
    """
    T.evaluate(T.call_extern("int32", _EMPTY_REGISTERS))


def unsplit(vector: Any) -> Any:
    """16 words, as one register; for AVX-512.

    Where only parts of a vector are used, LLVM computes each of them by itself. Not past this.
    """
    return T.call_pure_extern("int32x16", _UNSPLIT, vector)


def registers(dtype: str, lanes: int) -> Any:
    """A stack buffer of `lanes` elements, under 1 KB: above, TVM would call an allocator."""
    assert lanes * tvm.DataType(dtype).bits < 8 * 1024, (dtype, lanes)
    return T.alloc_buffer((lanes,), dtype, scope="global")


def build_object(functions: Sequence[Any], features: Sequence[str]) -> bytes:
    """One ELF object with all `functions`, for LLVM features such as `+avx512f`.

    `functions` come from `kernel_function` or from `te_lowering.te_function`. The same functions
    give the same bytes.
    """
    named = {f.attrs["global_symbol"]: f for f in functions}
    assert len(named) == len(functions), "two kernels have one name"
    module = tvm.IRModule({**named, "helpers": _helpers(MAX_EXITS * len(named))})
    target = tvm.target.Target(
        {
            "kind": "llvm",
            "mtriple": "x86_64-unknown-linux-gnu",
            "mcpu": "x86-64",
            "mattr": list(features),
            "cl-opt": ["-vectorize-slp:bool=0"],
        }
    )
    with tempfile.TemporaryDirectory() as folder, _interruptible():
        path = Path(folder) / "kernels.o"
        tirx.build(module, target=target).write_to_file(str(path))
        data = path.read_bytes()
    assert _STATUS.encode() not in data, "kernels have more than MAX_EXITS exits"
    return data


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A KeyboardInterrupt inside comes out as one: TVM makes a RuntimeError of it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    interrupted = []

    def handler(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    except RuntimeError:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _helpers(exits: int) -> Any:
    """A function that stays out of the object but brings LLVM IR: what kernels call by name.

    LLVM gives every call of _STATUS after the first a callee of its own, named `.1`, `.2` and so
    on. All are inlined and leave no symbol.
    """
    names = [_STATUS, *(f'"{_STATUS}.{i}"' for i in range(1, exits))]
    signature = "(ptr %self, ptr %args, i32 %status, ptr %result)"
    status = [f"define i32 @{n}{signature} {{ ret i32 %status }}" for n in names]
    code = "\n".join([*status, _BF16, _EXPAND, _BARRIER, _WHOLE_VECTOR])
    nothing = tirx.Return(tirx.const(0, "int32"))
    body = tirx.AttrStmt(
        ir.StringImm("default"), "pragma_import_llvm", ir.StringImm(code), nothing
    )
    return tirx.PrimFunc([], body, ret_type=ir.PrimType("int32"))


def _argument(parameter: Parameter) -> Any:
    match parameter.kind:
        case Kind.POINTER:
            return T.arg(parameter.name, T.handle(parameter.dtype))
        case Kind.INT:
            return T.arg(parameter.name, T.int64())
        case Kind.FLOAT:
            return T.arg(parameter.name, T.float32())


def _bind(parameter: Parameter, argument: Any) -> Any:
    return _flat(parameter.dtype, argument) if parameter.kind is Kind.POINTER else argument


def _flat(dtype: str, pointer: Any) -> Any:
    return T.decl_buffer((UNBOUNDED,), dtype, data=pointer)
