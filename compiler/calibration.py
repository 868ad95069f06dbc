"""Runs sample inputs through the oracle and records the values that are to be quantised.

The graph is the one that `graph_pipeline` leaves: the names of its values are the keys of the
ranges that the quantize pass takes.

Batches are run by several threads, the products of each by one thread of BLAS: how BLAS divides a
product among threads changes its roundings, and the same samples are to give the same library on
any number of cores.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
from threadpoolctl import threadpool_limits

from sparsec.errors import InvalidInput
from sparsec.interpreter import Array, bind, run
from sparsec.ir import dims
from sparsec.ir.dims import Symbol, only_atom
from sparsec.ir.graph import Graph, Value
from sparsec.ir.types import DType
from sparsec.ranges import Channels, Observation

BATCH = 16  # samples that are run at once: bounds memory
MOST_THREADS = 8  # each with a batch of its own

Feed = dict[str, Array]


def calibrate(
    graph: Graph, batches: Iterable[Mapping[str, Array]], names: Sequence[str | Channels]
) -> dict[str, Observation]:
    """What the values `names`, or channels of values, are over all batches, by their text.

    Padding tokens do not count.

    Padding is where an integer input `[batch, seq]` with "mask" in its name is 0, provided that
    it holds zeros and ones alone. Raises InvalidInput when there is no batch, when a batch is no
    input of the graph, and when it makes a value infinite or NaN.
    """
    observed = {str(name): Observation() for name in names}

    def include(name: str, kept: Array) -> None:
        observed[name] = observed[name].including(kept)

    _watch(graph, batches, names, include)
    return observed


def channel_maxima(
    graph: Graph, batches: Iterable[Mapping[str, Array]], names: Sequence[str]
) -> dict[str, Array]:
    """The largest magnitude of each channel of the values `names`, fp32 `[channels]`.

    Tokens count and errors are raised as `calibrate` says.
    """
    maxima: dict[str, Array] = {}

    def include(name: str, kept: Array) -> None:
        most = np.abs(kept).reshape(-1, kept.shape[-1]).max(axis=0, initial=0.0)
        maxima[name] = np.maximum(maxima.get(name, np.float32(0)), most)

    _watch(graph, batches, names, include)
    return maxima


def _watch(
    graph: Graph,
    batches: Iterable[Mapping[str, Array]],
    names: Sequence[str | Channels],
    include: Callable[[str, Array], None],
) -> None:
    """Tells `include` the real tokens of each of `names`, by its text, in every batch.

    Batches come in any order, those of one name one at a time.
    """
    wanted: dict[str, list[str | Channels]] = {}
    for name in names:
        wanted.setdefault(name if isinstance(name, str) else name.value, []).append(name)
    locks = {name: Lock() for name in wanted}

    def watch(batch: Mapping[str, Array]) -> None:
        real = _real_tokens(graph, batch)

        def observe(value: Value, data: Array) -> None:
            for name in wanted.get(value.name, []):
                kept = _kept(_part(data, name), real)
                _require_finite(value.name, kept)
                with locks[value.name]:
                    include(str(name), kept)

        run(graph, batch, observe)

    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        count = sum(1 for _ in pool.map(watch, batches))
    if count == 0:
        raise InvalidInput("there is no calibration sample; at least one is needed")


def load_calibration(path: Path, graph: Graph) -> list[Feed]:
    """The arrays of an .npz, named like the inputs, first axis = samples, in batches.

    Raises InvalidInput, naming the array and what was wanted, for data that do not fit.
    """
    arrays = _read(path)
    scalar = next((v.name for v in graph.inputs if not v.type.rank), None)
    if scalar is not None:
        raise InvalidInput(
            f"{path}: the input {scalar} of the model is one number, which is none per sample; "
            "use --dynamic, which needs no samples"
        )
    wanted = [v.name for v in graph.inputs]
    missing = [n for n in wanted if n not in arrays]
    unknown = [n for n in arrays if n not in wanted]
    if missing or unknown:
        raise InvalidInput(
            f"{path}: the model wants the arrays {wanted}: missing {missing}, unknown {unknown}"
        )
    rows = table_rows(graph)
    for value in graph.inputs:
        _check(path, value, arrays[value.name])
        _check_rows(path, value.name, arrays[value.name], rows.get(value))
    first = wanted[0]
    samples = len(arrays[first])
    for name in wanted:
        if len(arrays[name]) != samples:
            raise InvalidInput(
                f"{path}: array {name} has {len(arrays[name])} samples, {first} has {samples}; "
                "all must have the same number"
            )
    size = batch_size(graph)
    if samples % (size or 1):
        raise InvalidInput(
            f"{path}: {samples} samples; the model runs {size} at once, so give a multiple of it"
        )
    feeds = [
        {name: arrays[name][start : start + (size or BATCH)] for name in wanted}
        for start in range(0, samples, size or BATCH)
    ]
    try:
        for feed in feeds:
            bind(graph, feed)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None
    return feeds


def random_batches(
    graph: Graph, count: int, lengths: Sequence[int], seed: int = 0
) -> Iterator[Feed]:
    """`count` samples of each length in random tokens, in batches: for benchmarks, not accuracy.

    Inputs that index tables are random rows of them, other integers are 1 (masks), floats normal.
    Sizes that the model fixes, and its limits, stand before `lengths`. Attention of few tokens
    has other ranges than that of many: with long samples alone it would saturate.
    """
    rng = np.random.default_rng(seed)
    rows = table_rows(graph)
    size = batch_size(graph)
    batches = {n for v in graph.inputs if v.type.rank for n in dims.symbols(v.type.shape[0])}
    for index, env in enumerate(_sizes(graph, batches, lengths)):
        for start in range(0, count, size or BATCH):
            env |= dict.fromkeys(batches, min(BATCH, count - start))
            feed: Feed = {}
            for value in graph.inputs:
                shape = tuple(dims.evaluate(d, env) for d in value.type.shape)
                feed[value.name] = _random(rng, value, shape, rows.get(value))
            if index > 0 and start == 0 and not _runs(graph, feed):
                break  # as where the model reads the third token; the first length says so
            yield feed


def _runs(graph: Graph, feed: Feed) -> bool:
    try:
        run(graph, feed)
    except InvalidInput:
        return False
    return True


def _sizes(graph: Graph, batches: set[str], lengths: Sequence[int]) -> list[dict[str, int]]:
    """A size per symbol that is none of `batches`, for each length that the limits allow."""
    names = {name for v in graph.inputs for d in v.type.shape[1:] for name in dims.symbols(d)}
    found = [{name: min(length, largest(graph, name)) for name in names} for length in lengths]
    different = [env for i, env in enumerate(found) if env not in found[:i]]
    one = dict.fromkeys(batches, 1)
    allowed = [
        env
        for env in different
        if all(dims.evaluate(x.dim, one | env) <= x.most for x in graph.limits)
    ]
    return allowed or different[:1]  # running it says what is wrong


def _read(path: Path) -> Feed:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is one array without a name")
        with file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidInput(
            f"{path}: cannot be read as arrays by name: {error}; write it with numpy.savez"
        ) from error


def _check(path: Path, value: Value, data: Array) -> None:
    """The rank, dtype and fixed sizes of one array, that it has samples, and no NaN."""
    wanted = value.type
    if data.dtype != wanted.dtype.numpy:
        raise InvalidInput(
            f"{path}: array {value.name} must be {wanted.dtype.numpy}, got {data.dtype}"
        )
    if data.ndim != wanted.rank:
        raise InvalidInput(
            f"{path}: array {value.name} must have {wanted.rank} axes, samples first, "
            f"as the input {wanted}; got shape {list(data.shape)}"
        )
    for axis, (dim, size) in enumerate(zip(wanted.shape, data.shape, strict=True)):
        if axis > 0 and isinstance(dim, int) and size != dim:
            raise InvalidInput(f"{path}: array {value.name} axis {axis} must be {dim}, got {size}")
    if len(data) == 0:
        raise InvalidInput(f"{path}: array {value.name} holds no sample; at least one is needed")
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        raise InvalidInput(f"{path}: array {value.name} holds NaN or infinite values")


def _check_rows(path: Path, name: str, data: Array, rows: int | None) -> None:
    """That each index has a row in its table, of so many rows."""
    if rows is not None and (data.min() < -rows or data.max() >= rows):
        wrong = data.max() if data.max() >= rows else data.min()
        raise InvalidInput(f"{path}: array {name} holds {wrong}, its table has {rows} rows")


def batch_size(graph: Graph) -> int | None:
    """The number of samples that the model's shapes fix; None when it is free."""
    sizes = (v.type.shape[0] for v in graph.inputs if v.type.rank)
    return next((size for size in sizes if isinstance(size, int)), None)


def _real_tokens(graph: Graph, batch: Mapping[str, Array]) -> Array | None:
    """Which tokens of the flattened batch are none of padding; None when nothing says so."""
    for value in graph.inputs:
        mask = np.asarray(batch.get(value.name, 0))
        named = "mask" in value.name and mask.ndim == 2 and mask.dtype.kind in "biu"
        if named and np.isin(mask, (0, 1)).all():
            return np.asarray(mask.reshape(-1) != 0)
    return None


def _kept(data: Array, real: Array | None) -> Array:
    tokens = data.reshape(-1, data.shape[-1]) if data.ndim > 1 and data.size else data
    return tokens[real] if real is not None and len(tokens) == len(real) else tokens


def real_rows(graph: Graph, batch: Mapping[str, Array], data: Array) -> Array:
    """What `data` says of the tokens of a batch that are none of padding: `[tokens, ...]`.

    `data` has the tokens in its first axes; what has not as many comes back as it is.
    """
    real = _real_tokens(graph, batch)
    if real is None or data.ndim < 2 or data.shape[0] * data.shape[1] != len(real):
        return data
    return np.asarray(data.reshape(len(real), -1)[real])


def _part(data: Array, name: str | Channels) -> Array:
    return data if isinstance(name, str) else data[..., name.start : name.stop]


def _require_finite(name: str, data: Array) -> None:
    if not np.isfinite(data).all():
        raise InvalidInput(f"the calibration data make %{name} infinite or NaN")


def table_rows(graph: Graph) -> dict[Value, int]:
    """For each input that indexes constant tables: the rows of the smallest."""
    rows: dict[Value, int] = {}
    for node in graph.nodes:
        for table, ids in _lookups(node.op, node.inputs, node.attrs.get("axis")):
            size = table.type.shape[0]
            source = _origin(ids)
            if table.is_constant and isinstance(size, int) and source in graph.inputs:
                rows[source] = min(size, rows.get(source, size))
    return rows


def _lookups(
    op: str, inputs: Sequence[Value | None], axis: int | None
) -> list[tuple[Value, Value]]:
    values = [v for v in inputs if v is not None]
    if op == "embedding":
        return list(zip(values[1::2], values[::2], strict=True))
    return [(values[0], values[1])] if op == "gather" and axis == 0 else []


def _origin(value: Value) -> Value:
    """The value behind casts and reshapes."""
    while value.producer is not None and value.producer.op in ("cast", "reshape"):
        value = value.producer.input(0)
    return value


def largest(graph: Graph, name: str) -> int:
    """The largest value that the graph's limits leave to a symbol."""
    limits = [x.most for x in graph.limits if only_atom(x.dim) == Symbol(name)]
    return min(limits, default=np.iinfo(np.int64).max)


def _random(
    rng: np.random.Generator, value: Value, shape: tuple[int, ...], rows: int | None
) -> Array:
    dtype = value.type.dtype
    if rows is not None:
        return rng.integers(0, rows, shape).astype(dtype.numpy)
    if dtype.is_float:
        return rng.standard_normal(shape).astype(dtype.numpy)
    return np.ones(shape, np.bool_ if dtype is DType.BOOL else dtype.numpy)
