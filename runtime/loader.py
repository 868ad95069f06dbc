"""Load and run a compiled model: one file that needs Python 3.11 and NumPy, nothing else.

    load = runpy.run_path("model.py")["load"]  # this file lies beside model.so as model.py
    with load("model.so") as model:
        outputs = model({"input_ids": ids, "attention_mask": mask})

In the folder of model.so, `import model` would take the library for a Python extension module;
copied to another folder, or under another name, this file is imported like any other.

Inputs and outputs are dicts of arrays. A Model may be called from many threads at the same time;
the interpreter lock is released while it computes. `python model.py` prints what the library
beside it says about itself, on a CPU that can not run it too.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from zlib import crc32

import numpy as np

ABI_VERSION = 1
Array = np.ndarray[Any, Any]


class ModelError(Exception):
    """Base of the errors below."""


class InvalidInput(ModelError, ValueError):
    """An argument is not what the model wants."""


class AbiMismatch(ModelError):
    """The file is no compiled model, is damaged, or speaks another version of the C ABI."""


class UnsupportedCpu(ModelError):
    """The CPU lacks an instruction set that the model needs."""


class RunFailed(ModelError):
    """Out of memory, no thread could be started, or the like."""


@dataclass(frozen=True, slots=True)
class ErrorTypes:
    """The exceptions to raise, for a program that has its own."""

    invalid_input: type[Exception] = InvalidInput
    abi_mismatch: type[Exception] = AbiMismatch
    unsupported_cpu: type[Exception] = UnsupportedCpu
    run_failed: type[Exception] = RunFailed


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output; an axis that depends on the inputs is a text such as "batch"."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(d) for d in self.shape)}]"


# The structs of sparsec.h, field by field.


def _fields(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names.split())


_I64, _I32, _U32, _U64 = ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint64
_Text, _Pointer, _to, _function = (
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.POINTER,
    ctypes.CFUNCTYPE,
)


class DimStruct(ctypes.Structure):
    _fields_ = (("size", _I64), ("symbol", _I32), ("reserved", _U32), ("text", _Text))


class TensorStruct(ctypes.Structure):
    _fields_ = (("name", _Text), ("dtype", _U32), ("rank", _U32), ("dims", _to(DimStruct)))


class OptionsStruct(ctypes.Structure):
    _fields_ = (
        *_fields(_U32, "struct_bytes threads pin cpu_count"),
        ("cpus", _to(_I32)),
        *_fields(_U32, "spin_us no_spin"),
        *_fields(_Pointer, "parallel_for parallel_user"),
        ("reserved", _U64 * 4),
    )


class ModelStruct(ctypes.Structure):
    _fields_ = (
        *_fields(_U32, "struct_bytes abi_version"),
        *_fields(_Text, "name description required_isa"),
        *_fields(_U32, "input_count output_count symbol_count step_count"),
        *_fields(_to(TensorStruct), "inputs outputs"),
        ("symbols", _to(_Text)),
        ("weights", _Pointer),
        ("weights_bytes", _U64),
        ("missing_feature", _function(_Text)),
        ("status_text", _function(_Text, _I32)),
        ("context_create", _function(_I32, _to(OptionsStruct), _to(_Pointer))),
        ("context_destroy", _function(None, _Pointer)),
        ("prepare", _function(_I32, _Pointer, _to(_to(_I64)))),
        ("output_shape", _function(_I32, _Pointer, _U32, _to(_I64))),
        ("run", _function(_I32, _Pointer, _to(_Pointer), _to(_Pointer))),
        ("run_timed", _function(_I32, _Pointer, _to(_Pointer), _to(_Pointer), _to(_U64))),
        ("last_error", _function(_Text, _Pointer)),
        ("arena_bytes", _function(_U64, _Pointer)),
        ("thread_count", _function(_U32, _Pointer)),
        *_fields(_Text, "target target_isa"),
        ("targets", _Pointer),
        *_fields(_U32, "target_count reserved"),
    )


_FIRST_BYTES = ModelStruct.target.offset  # of the table in the first libraries

# sparsec_dtype and sparsec_status
_DTYPE_NAMES = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64"
_DTYPES = {code: np.dtype(name) for code, name in enumerate(_DTYPE_NAMES.split(), start=1)}
_INPUT_STATUSES = (1, 2, 3, 4)  # the caller's arguments are to blame
_INDEX_OUT_OF_RANGE, _UNSUPPORTED_CPU = 1, 6
_THREAD_FAILED = 9
_PIN_NONE, _PIN_CORES, _PIN_LIST = 0, 1, 2
_MAX_THREADS = 1024
_MAX_IDLE_CONTEXTS = 64
# By device and inode, the times and sizes of the files that were loaded. It is the state of
# dlopen: what that has mapped stays so for the process.
_mapped: dict[tuple[int, int], tuple[int, int]] = {}

Shapes = tuple[tuple[int, ...], ...]
_Table = tuple[str, str, ModelStruct]  # the name of a target, its level, its code


class _ContextHandle:
    """A context, used by one thread at a time, and the shapes that it is prepared for."""

    __slots__ = ("handle", "outputs", "shapes")

    def __init__(self, handle: ctypes.c_void_p):
        self.handle = handle
        self.shapes: Shapes | None = None
        self.outputs: Shapes = ()


class Model:
    """A loaded model. Call it with a dict of arrays; `close` frees its memory and threads."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 0,
        pin: bool | Sequence[int] = False,
        isa: str | None = None,
        errors: ErrorTypes | None = None,
        check_cpu: bool = True,
    ):
        """`threads`: 0 is one per core; `pin`: workers stay on their core, or on these CPUs.

        A library for several targets computes by the best one that this machine has, or by that
        whose instruction-set level is `isa`. Without `check_cpu` a model for another CPU can be
        described; running it is refused.
        """
        self.path = Path(path)
        self._errors = errors or ErrorTypes()
        self._closed = False
        self._lock = threading.Lock()
        self._idle: list[_ContextHandle] = []
        self._options = self._make_options(threads, pin)
        self._library = self._open()
        best = self._query()
        self._tables = _tables(best)
        self._model = best if isa is None else self._table_for(isa)
        self.name = _text(self._model.name)
        self.inputs = _ports(self._model.inputs, self._model.input_count)
        self.outputs = _ports(self._model.outputs, self._model.output_count)
        if check_cpu:
            self._check_cpu()
        _models.add(self)

    @property
    def targets(self) -> dict[str, str]:
        """What the library has code for, best first: names of machines and their levels."""
        return {target: level for target, level, _ in self._tables}

    @property
    def target(self) -> str:
        """The one of `targets` whose code this model runs."""
        here = ctypes.addressof(self._model)
        return next(name for name, _, table in self._tables if ctypes.addressof(table) == here)

    @property
    def description(self) -> dict[str, Any]:
        """What the library says about itself: ports, kernel calls, memory, versions."""
        description: dict[str, Any] = json.loads(_text(self._model.description))
        return description

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The outputs by name, as new arrays."""
        arrays = self._check_inputs(inputs)
        context = self._take_context()
        try:
            return self._run(context, arrays)
        finally:
            self._give_back(context)

    def run(self, **inputs: Any) -> dict[str, Array]:
        """The same with inputs as keyword arguments."""
        return self(inputs)

    def run_timed(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Array], Array]:
        """The outputs, and the seconds of each of the description's "steps"."""
        arrays = self._check_inputs(inputs)
        step_ns = np.zeros(max(1, self._model.step_count), np.uint64)
        context = self._take_context()
        try:
            outputs = self._run(context, arrays, step_ns)
        finally:
            self._give_back(context)
        return outputs, step_ns[: self._model.step_count] / 1e9

    def verify_weights(self) -> bool:
        """Whether the weights are the ones that were compiled in; reads all of them."""
        from hashlib import blake2b  # it loads OpenSSL: 4 MB, needed here only

        size = int(self._model.weights_bytes)
        data = (ctypes.c_ubyte * size).from_address(self._model.weights) if size else b""
        wanted = self.description["weights"]["blake2b_128"]
        return bool(blake2b(data, digest_size=16).hexdigest() == wanted)

    def close(self) -> None:
        """Ends the threads and frees the working memory of all idle contexts."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for context in idle:
            self._model.context_destroy(context.handle)

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_model"):
            self.close()

    def __repr__(self) -> str:
        ports = [", ".join(str(p) for p in side) for side in (self.inputs, self.outputs)]
        return f"<Model {self.name}: ({ports[0]}) -> ({ports[1]})>"

    # loading

    def _make_options(self, threads: int, pin: bool | Sequence[int]) -> OptionsStruct:
        cpus = [] if isinstance(pin, bool) else [int(cpu) for cpu in pin]
        if not 0 <= threads <= _MAX_THREADS:
            wanted = f"0 (one per core) to {_MAX_THREADS}"
            raise self._errors.invalid_input(f"threads: wanted {wanted}, got {threads}")
        if cpus and len(cpus) < threads:
            raise self._errors.invalid_input(
                f"pin: wanted a CPU for each of {threads} threads, got {len(cpus)}"
            )
        options = OptionsStruct(struct_bytes=ctypes.sizeof(OptionsStruct))
        options.threads = threads or len(cpus)
        options.pin = _PIN_LIST if cpus else _PIN_CORES if pin is True else _PIN_NONE
        options.cpu_count = len(cpus)
        self._cpus = (ctypes.c_int32 * len(cpus))(*cpus)  # options point at it
        options.cpus = ctypes.cast(self._cpus, ctypes.POINTER(ctypes.c_int32))
        return options

    def _open(self) -> ctypes.CDLL:
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                problem = _elf_problem(file.read(64), file, status.st_size)
        except OSError as error:
            raise self._errors.abi_mismatch(f"{self.path}: {error.strerror}") from None
        if problem:
            raise self._errors.abi_mismatch(f"{self.path}: {problem}")
        identity, contents = (status.st_dev, status.st_ino), (status.st_mtime_ns, status.st_size)
        if _mapped.get(identity, contents) != contents:
            raise self._errors.abi_mismatch(
                f"{self.path}: was overwritten after this process had loaded it, which may crash; "
                "write a new file and rename it to this name, and restart this process"
            )
        spelling = _unique_spelling(self.path, status)
        try:
            library = ctypes.CDLL(spelling)
        except OSError as error:
            why = str(error).replace(spelling, str(self.path))
            raise self._errors.abi_mismatch(f"{self.path} can not be loaded: {why}") from None
        _mapped[identity] = contents
        return library

    def _query(self) -> ModelStruct:
        query = getattr(self._library, "sparsec_query", None)
        if query is None:
            raise self._errors.abi_mismatch(
                f"{self.path} is no compiled model: it has no symbol sparsec_query"
            )
        query.argtypes = [ctypes.c_uint32]
        query.restype = ctypes.POINTER(ModelStruct)
        found = query(ABI_VERSION)
        if not found or found.contents.abi_version != ABI_VERSION:
            raise self._errors.abi_mismatch(
                f"{self.path} does not speak version {ABI_VERSION} of the model ABI; "
                "use the model.py that was written beside it"
            )
        if found.contents.struct_bytes < _FIRST_BYTES:
            raise self._errors.abi_mismatch(
                f"{self.path}: wanted a model table of {_FIRST_BYTES} bytes or more, "
                f"got {found.contents.struct_bytes}"
            )
        model: ModelStruct = found.contents
        return model

    def _table_for(self, isa: str) -> ModelStruct:
        found = [table for _, level, table in self._tables if level == isa]
        if not found:
            have = ", ".join(f"{level} ({target})" for target, level, _ in self._tables)
            raise self._errors.invalid_input(f"isa {isa!r}: {self.path} has code for {have}")
        return found[0]

    def _check_cpu(self) -> None:
        missing = self._model.missing_feature()
        if missing is not None:
            raise self._errors.unsupported_cpu(
                f"{self.path} is compiled for {_text(self._model.required_isa)}; this machine "
                f"lacks {_text(missing)}; compile the model for another target"
            )

    # running

    def _check_inputs(self, inputs: Mapping[str, Any]) -> list[Array]:
        if not isinstance(inputs, Mapping):
            raise self._errors.invalid_input(
                f"inputs: wanted a dict of arrays by name, got {type(inputs).__name__}"
            )
        wanted = [port.name for port in self.inputs]
        if set(inputs) != set(wanted):
            raise self._errors.invalid_input(
                f"inputs: wanted {', '.join(wanted) or 'none'}; "
                f"got {', '.join(sorted(str(name) for name in inputs)) or 'none'}"
            )
        return [self._check_array(port, inputs[port.name]) for port in self.inputs]

    def _check_array(self, port: Port, value: Any) -> Array:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise self._errors.invalid_input(f"input {port.name!r}: {error}") from None
        if array.ndim != len(port.shape):
            raise self._errors.invalid_input(
                f"input {port.name!r}: wanted rank {len(port.shape)} "
                f"[{', '.join(str(d) for d in port.shape)}], got shape {array.shape}"
            )
        if array.dtype != port.dtype:
            array = self._convert(port, array)
        if not array.flags.c_contiguous or not array.flags.aligned:
            array = np.array(array, order="C")
        return array

    def _convert(self, port: Port, array: Array) -> Array:
        """Other integers become integers and other floats floats when no value changes much:
        integers must fit; a float may be rounded to a narrower one but not become infinite."""
        kinds = array.dtype.kind + port.dtype.kind
        floats = kinds == "ff"
        if not floats and not set(kinds) <= set("iub"):
            raise self._errors.invalid_input(
                f"input {port.name!r}: wanted {port.dtype}, got {array.dtype}"
            )
        with np.errstate(over="ignore"):
            converted = array.astype(port.dtype)
        fits = np.isfinite(converted) == np.isfinite(array) if floats else converted == array
        if not np.all(fits):
            raise self._errors.invalid_input(
                f"input {port.name!r}: wanted {port.dtype}, got {array.dtype} "
                "with values that do not fit"
            )
        return converted

    def _take_context(self) -> _ContextHandle:
        with self._lock:
            if self._closed:
                raise self._errors.invalid_input(f"{self.path}: the model is closed")
            if self._idle:
                return self._idle.pop()
        handle = ctypes.c_void_p()
        options = ctypes.byref(self._options)
        self._check(self._model.context_create(options, ctypes.byref(handle)), None)
        return _ContextHandle(handle)

    def _renew(self) -> None:
        """In the child of a fork the threads of the contexts are missing, and so is one that
        may have held the lock."""
        self._lock = threading.Lock()
        idle, self._idle = self._idle, []
        for context in idle:
            self._model.context_destroy(context.handle)

    def _give_back(self, context: _ContextHandle) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _MAX_IDLE_CONTEXTS:
                self._idle.append(context)
                return
        self._model.context_destroy(context.handle)

    def _run(
        self, context: _ContextHandle, arrays: list[Array], step_ns: Array | None = None
    ) -> dict[str, Array]:
        shapes = tuple(array.shape for array in arrays)
        if context.shapes != shapes:
            self._prepare(context, shapes)
        outputs = [
            np.empty(shape, port.dtype)
            for port, shape in zip(self.outputs, context.outputs, strict=True)
        ]
        places = (context.handle, _addresses(arrays), _addresses(outputs))
        if step_ns is None:
            status = self._model.run(*places)
        else:
            times = step_ns.ctypes.data_as(ctypes.POINTER(ctypes.c_uint64))
            status = self._model.run_timed(*places, times)
        outside = self._index_outside(arrays) if status == _INDEX_OUT_OF_RANGE else ""
        self._check(status, context, outside)
        return {port.name: array for port, array in zip(self.outputs, outputs, strict=True)}

    def _prepare(self, context: _ContextHandle, shapes: Shapes) -> None:
        context.shapes = None
        rows = [(ctypes.c_int64 * max(1, len(s)))(*s) for s in shapes]
        pointers = (ctypes.POINTER(ctypes.c_int64) * max(1, len(rows)))(
            *(ctypes.cast(row, ctypes.POINTER(ctypes.c_int64)) for row in rows)
        )
        self._check(self._model.prepare(context.handle, pointers), context)
        context.outputs = tuple(
            self._output_shape(context, index, len(port.shape))
            for index, port in enumerate(self.outputs)
        )
        context.shapes = shapes

    def _output_shape(self, context: _ContextHandle, index: int, rank: int) -> tuple[int, ...]:
        shape = (ctypes.c_int64 * max(1, rank))()
        self._check(self._model.output_shape(context.handle, index, shape), context)
        return tuple(shape[:rank])

    def _index_outside(self, arrays: list[Array]) -> str:
        """Which input holds the index that a table has no row for, if one does."""
        named = {port.name: array for port, array in zip(self.inputs, arrays, strict=True)}
        padding = self.description.get("padding", {})
        mask = named[padding["mask"]] if padding.get("dropped") else None
        for name, rows in self.description.get("input_ranges", {}).items():
            ids = named[name]
            outside = (ids < -rows) | (ids >= rows)
            if mask is not None and mask.shape == ids.shape:
                outside &= mask != 0  # what is at padding is not read
            places = np.argwhere(outside)
            if len(places):
                at = places[0].tolist()
                return f"; input {name!r} at {at} is {ids[tuple(at)]}, its table has {rows} rows"
        return ""

    def _check(self, status: int, context: _ContextHandle | None, more: str = "") -> None:
        if status == 0:
            return
        text = _text(self._model.status_text(status))
        detail = _text(self._model.last_error(context.handle)) if context else ""
        message = f"{self.name}: {detail or text}{more}"
        if status == _UNSUPPORTED_CPU:
            raise self._errors.unsupported_cpu(message)
        if status == _THREAD_FAILED and len(self._cpus):
            message += f"; the CPUs wanted are {list(self._cpus)}"
        if status in _INPUT_STATUSES:
            raise self._errors.invalid_input(message)
        raise self._errors.run_failed(message)


def load(
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    pin: bool | Sequence[int] = False,
    isa: str | None = None,
) -> Model:
    """Loads a compiled model; see Model for the options."""
    return Model(path, threads=threads, pin=pin, isa=isa)


def _tables(model: ModelStruct) -> list[_Table]:
    """Those of all targets in the library, best first."""
    if model.struct_bytes < ctypes.sizeof(ModelStruct):  # one of before there were several
        isa = _text(model.required_isa)
        return [(isa, isa, model)]
    pointers = ctypes.cast(model.targets, _to(_to(ModelStruct)))
    tables = [pointers[index].contents for index in range(model.target_count)]
    return [(_text(table.target), _text(table.target_isa), table) for table in tables]


def _text(raw: bytes) -> str:
    return raw.decode()


def _ports(tensors: Any, count: int) -> tuple[Port, ...]:
    return tuple(
        Port(
            _text(tensor.name),
            _DTYPES[tensor.dtype],
            tuple(
                dim.size if dim.size >= 0 else _text(dim.text)
                for dim in tensor.dims[: tensor.rank]
            ),
        )
        for tensor in tensors[:count]
    )


def _addresses(arrays: list[Array]) -> Any:
    return (ctypes.c_void_p * max(1, len(arrays)))(*(array.ctypes.data for array in arrays))


def _elf_problem(header: bytes, file: Any, size: int) -> str | None:
    """Why the file is no whole x86-64 library: dlopen would crash on one that is cut off."""
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return "not a shared library of 64-bit Linux"
    kind, machine = struct.unpack_from("<HH", header, 16)
    if (kind, machine) != (3, 62):
        return "not a shared library for x86-64"
    programs_at, sections_at = struct.unpack_from("<QQ", header, 32)
    program_bytes, programs, section_bytes, sections = struct.unpack_from("<HHHH", header, 54)
    end = max(programs_at + programs * program_bytes, sections_at + sections * section_bytes)
    if end <= size and program_bytes == 56:
        file.seek(programs_at)
        table = file.read(programs * 56)
        for index in range(programs):
            offset, _, _, in_file = struct.unpack_from("<QQQQ", table, index * 56 + 8)
            end = max(end, offset + in_file)
    if end > size:
        return f"truncated: it has {size} bytes and needs at least {end}"
    return None


def _unique_spelling(path: Path, status: os.stat_result) -> str:
    """The absolute path, with "." folders and doubled slashes that depend on the file's identity.

    dlopen gives back a library that it has loaded under the same text, even when the file was
    replaced since then: a model that is compiled again would run in its old form.
    """
    identity = f"{status.st_dev} {status.st_ino} {status.st_mtime_ns} {status.st_size}"
    bits = crc32(identity.encode())
    filler = "".join("./" if bits >> i & 1 else "/" for i in range(32))
    path = path.absolute()
    return f"{path.parent}/{filler}{path.name}"


_models: weakref.WeakSet[Model] = weakref.WeakSet()


def _renew_all() -> None:
    for model in list(_models):
        model._renew()


os.register_at_fork(after_in_child=_renew_all)


if __name__ == "__main__":
    _path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".so")
    with Model(_path, check_cpu=False) as _model:
        print(json.dumps(_model.description, indent=2))
