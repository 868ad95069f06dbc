"""ONNX tensors and dtypes as NumPy arrays and DTypes.

Half precision, fp16 and bf16, is a form of storage: the numbers of a file in it are read as fp32
and computed with as such. Only inputs and outputs of the model in fp16 stay what they are.

NaN in a tensor is always refused. An infinity is refused unless the tensor looks like a mask: it
has at most 16 elements, or all its finite values are the same (a causal mask of 0 and -inf).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from sparsec.errors import InvalidModel, UnsupportedOp
from sparsec.ir.types import DType

Array = np.ndarray[Any, Any]

_SMALL = 16

DTYPES: dict[int, DType] = {
    TensorProto.BOOL: DType.BOOL,
    TensorProto.INT8: DType.I8,
    TensorProto.UINT8: DType.U8,
    TensorProto.INT16: DType.I16,
    TensorProto.UINT16: DType.U16,
    TensorProto.INT32: DType.I32,
    TensorProto.UINT32: DType.U32,
    TensorProto.INT64: DType.I64,
    TensorProto.UINT64: DType.U64,
    TensorProto.FLOAT: DType.F32,
    TensorProto.DOUBLE: DType.F64,
}
_HALVES: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
NIBBLES = (TensorProto.INT4, TensorProto.UINT4)
ONNX_TYPES = {dtype: number for number, dtype in DTYPES.items()}


def dtype_of(number: int, place: str) -> DType:
    """What values of an ONNX element type are computed in; UnsupportedOp, naming `place`, when
    there is nothing."""
    dtype = DType.F32 if number in _HALVES else DTYPES.get(number)
    if dtype is not None:
        return dtype
    known = number in TensorProto.DataType.values()
    name = TensorProto.DataType.Name(number) if known else f"number {number}"
    raise UnsupportedOp(
        f"{place} has the element type {name}, which has no lowering; "
        "export the model in float32 (supported: "
        + ", ".join(["float16", "bfloat16", *(d.value for d in DTYPES.values())])
        + ")"
    )


def port_dtype(number: int, place: str) -> DType:
    """The DType of an input or output of the model: fp16 stays, bf16, which NumPy has not, is
    fp32. Raises as `dtype_of` does."""
    return DType.F16 if number == TensorProto.FLOAT16 else dtype_of(number, place)


def array_of(tensor: TensorProto, folder: Path | None, place: str) -> Array:
    """The data of a tensor, read from its external file when it has one."""
    wide = dtype_of(tensor.data_type, place).numpy
    dtype = _HALVES.get(tensor.data_type, wide)
    if tensor.HasField("segment"):
        raise UnsupportedOp(f"{place} is stored in segments; save the model without them")
    if tensor.data_location == TensorProto.EXTERNAL:
        data = _external(tensor, dtype, folder, place)
    elif tensor.HasField("raw_data"):
        data = _raw(tensor.raw_data, tensor, dtype, place)
    else:
        data = _typed(tensor, place)
    data = data.astype(wide, copy=False)
    _check_finite(data, place)
    return data


def nibbles_of(tensor: TensorProto, folder: Path | None, place: str) -> Array:
    """Integers of 4 bits widened to i8; two lie in a byte, the lower one first."""
    count = math.prod(tensor.dims)
    packed = TensorProto()
    packed.CopyFrom(tensor)
    packed.data_type = TensorProto.UINT8
    packed.dims[:] = [(count + 1) // 2]
    data = array_of(packed, folder, place)
    halves = np.stack([data & 15, data >> 4], axis=-1).reshape(-1)[:count].astype(np.int8)
    if tensor.data_type == TensorProto.INT4:
        halves = (halves ^ 8) - 8  # of two's complement
    return np.asarray(halves.reshape(tuple(tensor.dims)), np.int8)


def _raw(raw: bytes | Array, tensor: TensorProto, dtype: np.dtype[Any], place: str) -> Array:
    shape = tuple(tensor.dims)
    wanted = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or len(raw) != wanted:
        raise InvalidModel(
            f"{place} has the shape {list(shape)} of {dtype}, {wanted} bytes, but its data has "
            f"{len(raw)} bytes; the file is damaged"
        )
    return np.frombuffer(raw, dtype.newbyteorder("<")).reshape(shape)


def _typed(tensor: TensorProto, place: str) -> Array:
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError) as error:
        raise InvalidModel(f"{place} has data that does not fit its shape: {error}") from error


def _external(tensor: TensorProto, dtype: np.dtype[Any], folder: Path | None, place: str) -> Array:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise InvalidModel(
            f"{place} is in the external file {location!r}; give the path of the .onnx file "
            "instead of the loaded model, so that the file can be found"
        )
    path = folder / location
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise InvalidModel(f"{place} names the external file {location!r} outside its folder")
    if not path.is_file():
        raise InvalidModel(
            f"{place} is in the external file {path}, which does not exist; "
            "keep it beside the .onnx file"
        )
    offset = _number(entries.get("offset", "0"), place)
    wanted = math.prod(tensor.dims) * dtype.itemsize
    length = _number(entries.get("length", str(wanted)), place)
    size = path.stat().st_size
    if offset + length > size:
        raise InvalidModel(
            f"{place} needs bytes {offset} to {offset + length} of {path}, "
            f"which has only {size}; the file is truncated"
        )
    if length == 0:
        return _raw(b"", tensor, dtype, place)
    return _raw(np.memmap(path, np.uint8, "r", offset, (length,)), tensor, dtype, place)


def _number(item: str, place: str) -> int:
    if not item.isdecimal():
        raise InvalidModel(f"{place} has a bad position {item!r} in its external file")
    return int(item)


def _check_finite(data: Array, place: str) -> None:
    if data.dtype.kind != "f" or data.size == 0:
        return
    low, high = data.min(), data.max()  # both are NaN when an element is
    if np.isfinite(low) and np.isfinite(high):
        return
    if np.isnan(low):
        count = int(np.isnan(data).sum())
        raise InvalidModel(
            f"{place} has {count} NaN of {data.size} elements; "
            "the weights are damaged: export the model again"
        )
    finite = data[np.isfinite(data)]
    if data.size <= _SMALL or finite.size == 0 or finite.min() == finite.max():
        return
    count = data.size - finite.size
    raise InvalidModel(
        f"{place} has {count} infinite of {data.size} elements and is not a mask; "
        "the weights are damaged: export the model again"
    )


def attribute(item: onnx.AttributeProto) -> Any:
    """The value of an attribute; text as str."""
    data = onnx.helper.get_attribute_value(item)
    if isinstance(data, bytes):
        return data.decode("utf-8", "replace")
    if isinstance(data, list) and data and isinstance(data[0], bytes):
        return [d.decode("utf-8", "replace") for d in data]
    return data
