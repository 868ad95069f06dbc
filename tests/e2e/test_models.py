"""onnx -> model.so gives the reference's numbers for any batch and sequence length."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsec
from sparsec.errors import InvalidInput
from sparsec.frontend.onnx_import import import_model
from sparsec.interpreter import run
from sparsec.target import Isa
from sparsec.tools.inputs import random_inputs
from sparsec.tools.peers import reference_runner
from sparsec.tools.verify import compare, without_padding

Build = Callable[..., tuple[Path, Path]]

# fp32 on both sides: sums of up to 1024 products of values of order 1, through up to four layers
# that layer norm brings back to order 1, stay within 1e-5; 1e-4 is the product's promise.
TOLERANCE = 1e-4
SHAPES = [(1, 1), (1, 7), (3, 33), (2, 63), (5, 16)]


def check(library: Path, path: Path, shapes: list[tuple[int, int]], threads: int) -> None:
    model = sparsec.load(library, threads=threads)
    _, reference = reference_runner(path, 1)
    for batch, seq in shapes:
        arrays = random_inputs(model, batch, seq, seed=batch * seq, padding=True)
        wanted = without_padding(model, arrays, reference(arrays))
        for name, figures in compare(model(arrays), wanted).items():
            assert figures["max_abs_error"] < TOLERANCE, (batch, seq, name, figures)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("head", ["none", "classify", "qa"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_tiny_models(build: Build, family: str, head: str, threads: int) -> None:
    path, library = build(f"tiny-{family}", head)
    check(library, path, SHAPES, threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_bert_mini(build: Build, threads: int) -> None:
    path, library = build("bert-mini")
    check(library, path, [(1, 1), (1, 7), (3, 33), (2, 128), (5, 200), (1, 512)], threads)


@pytest.mark.isa("avx512")
def test_avx2_kernels_give_the_same_numbers(build: Build, tmp_path: Path) -> None:
    path, _ = build("tiny-bert")
    library = tmp_path / "avx2.so"
    sparsec.compile_model(path, library, isa=Isa.AVX2)
    assert sparsec.load(library).description["isa"] == "avx2"
    check(library, path, SHAPES, 1)


def test_core_ops_are_not_generic(build: Build) -> None:
    _, library = build("bert-mini")
    layers = sparsec.load(library).description["layers"]
    core = [x for x in layers if x["op"] in {"linear", "attention", "layer_norm", "embedding"}]
    assert sum(x["op"] == "attention" for x in core) == 4
    assert sum(x["op"] == "linear" for x in core) == 4 * 4 + 1  # QKV is merged; and the pooler
    assert not any(x["generic"] for x in core)


def test_fixed_shapes(tmp_path: Path, build: Build) -> None:
    path, _ = build("tiny-bert")
    library = tmp_path / "fixed.so"
    shapes = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (2, 7))
    sparsec.compile_model(path, library, shapes=shapes)
    model = sparsec.load(library)
    assert model.inputs[0].shape == (2, 7)
    check(library, path, [(2, 7)], 1)


def test_threads_do_not_change_bits(build: Build) -> None:
    _, library = build("bert-mini")
    one, two = sparsec.load(library, threads=1), sparsec.load(library, threads=2)
    arrays = random_inputs(one, 3, 33, seed=1, padding=True)
    for name, wanted in one(arrays).items():
        np.testing.assert_array_equal(two(arrays)[name], wanted)


def test_eight_python_threads_on_one_model(build: Build) -> None:
    _, library = build("tiny-bert")
    model = sparsec.load(library, threads=1)
    cases = [random_inputs(model, 1 + i % 3, 5 + i, seed=i, padding=True) for i in range(8)]
    wanted = [model(case) for case in cases]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            got = model(cases[index])
            if any(not np.array_equal(got[n], a) for n, a in wanted[index].items()):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_output_that_is_an_input_or_a_constant(tmp_path: Path) -> None:
    make = onnx.helper
    x = make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3])
    outputs = [
        make.make_tensor_value_info("same", onnx.TensorProto.FLOAT, ["n", 3]),
        make.make_tensor_value_info("fixed", onnx.TensorProto.FLOAT, [2]),
        make.make_tensor_value_info("twice", onnx.TensorProto.FLOAT, ["n", 3]),
        make.make_tensor_value_info("again", onnx.TensorProto.FLOAT, ["n", 3]),
    ]
    constant = onnx.numpy_helper.from_array(np.array([1, 2], np.float32), "c")
    nodes = [
        make.make_node("Identity", ["x"], ["same"]),
        make.make_node("Identity", ["c"], ["fixed"]),
        make.make_node("Add", ["x", "x"], ["twice"]),
        make.make_node("Identity", ["twice"], ["again"]),
    ]
    graph = make.make_graph(nodes, "copies", [x], outputs, [constant])
    path = tmp_path / "copies.onnx"
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)]), path)
    sparsec.compile_model(path, tmp_path / "copies.so")
    given = np.arange(12, dtype=np.float32).reshape(4, 3)
    got = sparsec.load(tmp_path / "copies.so")({"x": given})
    np.testing.assert_array_equal(got["same"], given)
    np.testing.assert_array_equal(got["fixed"], [1, 2])
    np.testing.assert_array_equal(got["twice"], given * 2)
    np.testing.assert_array_equal(got["again"], given * 2)


def test_a_sequence_longer_than_the_position_table_is_refused(build: Build) -> None:
    _, library = build("tiny-bert")  # 64 positions
    model = sparsec.load(library)
    model(random_inputs(model, 1, 64, seed=0, padding=False))
    with pytest.raises(InvalidInput, match=r"seq is 65 .* at most 64.*embeddings"):
        model(random_inputs(model, 1, 65, seed=0, padding=False))


def test_an_output_of_more_bytes_than_there_are_numbers_for_is_refused(tmp_path: Path) -> None:
    """2**66 elements: counted in 64 bits they are none."""
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 1, 1] x, float[1, m, 1] y, '
        "float[1, 1, p] z) => (float[n, m, p] w) { xy = Add (x, y) w = Add (xy, z) }"
    )
    onnx.save(proto, tmp_path / "m.onnx")
    sparsec.compile_model(tmp_path / "m.onnx", tmp_path / "m.so")
    model, ones = sparsec.load(tmp_path / "m.so"), np.ones(1 << 22, np.float32)
    x, y, z = ones.reshape(-1, 1, 1), ones.reshape(1, -1, 1), ones.reshape(1, 1, -1)
    assert model({"x": x[:2], "y": y[:, :3], "z": z[:, :, :5]})["w"].shape == (2, 3, 5)
    with pytest.raises(InvalidInput, match="too large"):
        model({"x": x, "y": y, "z": z})


@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 4), (4, 4)])
def test_an_image_smaller_than_the_kernel_is_refused(
    stride: int, kernel: int, tmp_path: Path
) -> None:
    """By the oracle too: a quotient of a negative number is not the same in C and in Python."""
    ones = ",".join(["1"] * (6 * kernel))
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[b, 2, s] x) => (float[b, 3, t] y) '
        f"<float[3, 2, {kernel}] w = {{{ones}}}> {{ y = Conv <strides = [{stride}]> (x, w) }}"
    )
    onnx.save(proto, tmp_path / "m.onnx")
    sparsec.compile_model(tmp_path / "m.onnx", tmp_path / "m.so")
    model, graph = sparsec.load(tmp_path / "m.so"), import_model(proto)
    enough = np.ones((2, 2, kernel), np.float32)
    np.testing.assert_array_equal(model({"x": enough})["y"], np.full((2, 3, 1), 2.0 * kernel))
    for answer in (model, partial(run, graph)):
        with pytest.raises(InvalidInput, match=r"kernel of .* is larger than its padded input"):
            answer({"x": enough[:, :, 1:]})


def test_python_goes_on_while_a_model_runs(build: Build) -> None:
    """The interpreter lock is released. The best of some tries: the machine has other work."""
    _, library = build("bert-mini")
    model = sparsec.load(library, threads=1)
    arrays = random_inputs(model, 4, 256, seed=0, padding=False)
    model(arrays)
    shares = []
    for _ in range(8):
        worker = threading.Thread(target=model, args=(arrays,))
        times = [time.perf_counter()]
        worker.start()
        while worker.is_alive():
            times.append(time.perf_counter())
        shares.append(max(np.diff(times)) / (times[-1] - times[0]))
    assert min(shares) < 0.5  # with the lock held one step would last as long as the call
