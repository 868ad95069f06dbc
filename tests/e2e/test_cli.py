"""The command line: what it writes, what it prints, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsec.cli import main
from sparsec.codegen.toolchain import RUNTIME
from sparsec.driver import LOADER_BEGINS
from sparsec.errors import InvalidInput
from sparsec.files import json_text
from sparsec.models.build import Pruning, build_model
from sparsec.models.tiny import tiny_model, tiny_spec
from sparsec.rates import default_rates
from sparsec.runtime import load
from sparsec.target import Isa, Target
from sparsec.tuning.rates_file import keep_rates

Build = Callable[..., tuple[Path, Path]]


def test_compile_writes_library_loader_report_and_ir(tmp_path: Path) -> None:
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    library, report, ir = tmp_path / "m.so", tmp_path / "r.json", tmp_path / "ir"
    words = ["compile", str(tmp_path / "m.onnx"), "-o", str(library), "-q"]
    assert main([*words, "--report", str(report), "--dump-ir", str(ir)]) == 0
    assert library.exists()
    assert (tmp_path / "m.py").exists()
    written = json.loads(report.read_text())
    assert {layer["op"] for layer in written["layers"]} >= {"attention"}
    expected = {row["op"]: row for row in written["expected"]["layers"]}
    assert expected["attention"]["basis"] == "ports"
    assert expected["embedding"]["basis"] == "bytes"
    assert all(row["expected_us"] > 0 for row in expected.values())
    assert len(list(ir.glob("*.txt"))) > 5


def test_run_reads_and_writes_npz(build: Build, tmp_path: Path) -> None:
    _, library = build("tiny-bert")
    names = ("input_ids", "attention_mask", "token_type_ids")
    np.savez(tmp_path / "in.npz", **dict.fromkeys(names, np.ones((2, 6), np.int64)))
    words = ["run", str(library), "-i", str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npz")]
    assert main(words) == 0
    assert np.load(tmp_path / "out.npz")["last_hidden_state"].shape == (2, 6, 32)


def test_verify_passes_and_fails(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    path, library = build("tiny-bert")
    words = ["verify", str(library), "--onnx", str(path), "--shapes", "1x1,3x33", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert main([*words, "--tolerance", "0"]) == 1


def test_verify_takes_sequences_that_the_model_can(
    build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    path, library = build("tiny-bert")  # 64 positions
    assert main(["verify", str(library), "--onnx", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shapes"] == ["1x1", "1x7", "3x33", "2x64"]


def test_inspect_onnx_and_library(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    path, library = build("tiny-bert")
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "onnx"
    assert {w["shape"] for w in found["weights"]} == {"32x32", "64x32", "32x64"}
    assert main(["inspect", str(library), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "library"
    assert main(["inspect", str(path)]) == 0
    assert "arena" not in capsys.readouterr().out
    assert main(["inspect", str(library)]) == 0
    assert "KB per token" in capsys.readouterr().out


def test_bench(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    _, library = build("tiny-bert")
    words = ["bench", str(library), "--batch", "1", "--seq", "8", "--seconds", "0.05", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    figures = result["engines"]["sparsec"]
    assert 0 < figures["p10_ms"] <= figures["median_ms"] <= figures["p90_ms"]
    assert result["ratio"] is None
    assert result["arena"]["bytes_per_token"] > 0


def test_bench_under_a_latency_limit(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    _, library = build("tiny-bert")
    words = ["bench", str(library), "--seq", "8", "--seconds", "0.05", "--batch", "2", "--json"]
    assert main([*words, "--latency-ms", "1e6", "--instances", "1", "--threads", "auto"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["engines"]["sparsec"]
    assert found["met"] is True
    assert found["best"]["instances"] == 1
    assert found["best"]["threads"] == result["cores"]
    assert found["best"]["batch"] == 2
    assert 0 < found["best"]["p50_ms"] <= found["best"]["p99_ms"]
    assert main([*words, "--latency-ms", "1e-6"]) == 1  # no call is that short
    assert json.loads(capsys.readouterr().out)["engines"]["sparsec"]["met"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--instances", "2"], "for the search of --latency-ms"),
        (["--batch", "auto"], "for the search of --latency-ms"),
        (["--latency-ms", "5", "--no-pin"], "every instance has cores of its own"),
        (["--latency-ms", "5", "--instances", "5000"], "need 5000 cores"),
        (["--latency-ms", "5", "--against", "openvino"], "add --onnx FILE"),
        (["--latency-ms", "5", "--seq", "4096"], "at most"),
    ],
)
def test_bench_refuses(
    words: list[str], message: str, build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    _, library = build("tiny-bert")
    assert main(["bench", str(library), *words]) == 2
    assert message in capsys.readouterr().err


def test_more_than_there_is_memory_for(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    _, library = build("tiny-bert")
    refuses(["bench", str(library), "--batch", "100000000000"], capsys, ["not enough memory"])


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "ten"])
def test_a_latency_limit_is_a_number_above_zero(limit: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "m.so", "--latency-ms", limit])


def one_op(op: str, domain: str = "") -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], "odd", domain=domain)], "g", [x], [y]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    return helper.make_model(graph, opset_imports=opsets)


def dangling() -> onnx.ModelProto:
    model = one_op("Relu")
    model.graph.node[0].input[0] = "nobody"
    return model


def cyclic() -> onnx.ModelProto:
    model = one_op("Relu")
    model.graph.node[0].input[0] = "y"
    return model


def nan_weight() -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    weight = np.eye(4, dtype=np.float32)
    weight[1, 2] = np.nan
    node = helper.make_node("MatMul", ["x", "bad_weight"], ["y"])
    graph = helper.make_graph(
        [node], "g", [x], [y], [numpy_helper.from_array(weight, "bad_weight")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def unsupported_dtype() -> onnx.ModelProto:
    model = one_op("Identity")
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    return model


def no_shape() -> onnx.ModelProto:
    model = one_op("Relu")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    return model


def wrong_shape() -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")], "g", [x], [y], [weight]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


BAD_MODELS = {
    "unknown op": (one_op("Frobnicate", "com.example"), ["Frobnicate", "odd"]),
    "dangling input": (dangling(), ["nobody"]),
    "cycle": (cyclic(), ["odd"]),
    "NaN weight": (nan_weight(), ["bad_weight", "NaN"]),
    "dtype": (unsupported_dtype(), ["string"]),
    "missing shape": (no_shape(), ["x", "shape"]),
    "wrong shape": (wrong_shape(), ["mm"]),
}


def refuses(words: list[str], capsys: pytest.CaptureFixture[str], parts: list[str]) -> None:
    assert main(words) == 2
    message = capsys.readouterr().err
    assert message.count("sparsec: error:") == 1
    assert "Traceback" not in message
    for part in parts:
        assert part.lower() in message.lower(), message


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, parts = BAD_MODELS[case]
    (tmp_path / "bad.onnx").write_bytes(model.SerializeToString())
    words = ["compile", str(tmp_path / "bad.onnx"), "-o", str(tmp_path / "bad.so"), "-q"]
    refuses(words, capsys, parts)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.onnx"]


def test_not_a_protobuf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"this is no model at all" * 10)
    words = ["compile", str(tmp_path / "bad.onnx"), "-o", str(tmp_path / "bad.so"), "-q"]
    refuses(words, capsys, ["bad.onnx"])


def test_truncated_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tiny_model().SerializeToString()
    (tmp_path / "bad.onnx").write_bytes(whole[: len(whole) // 2])
    words = ["compile", str(tmp_path / "bad.onnx"), "-o", str(tmp_path / "bad.so"), "-q"]
    refuses(words, capsys, ["bad.onnx"])


def test_missing_external_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(
        tiny_model(),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    (tmp_path / "m.data").unlink()
    words = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.so"), "-q"]
    refuses(words, capsys, ["m.data"])


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--target", "nonsense"], ["nonsense", "haswell"]),
        (["--shape", "input_ids"], ["input_ids", "1x128"]),
        (["--shape", "nobody=1x2"], ["nobody"]),
    ],
)
def test_bad_options(
    extra: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    words = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.so"), "-q"]
    refuses([*words, *extra], capsys, parts)
    assert not (tmp_path / "m.so").exists()


def test_only_a_loader_is_replaced_by_the_loader(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    words = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.so"), "-q"]
    (tmp_path / "m.py").write_text("print('somebody wrote this')\n")
    refuses(words, capsys, [str(tmp_path / "m.py"), "no loader"])
    assert (tmp_path / "m.py").read_text() == "print('somebody wrote this')\n"
    (tmp_path / "m.py").write_bytes(LOADER_BEGINS + b', an older one."""')
    assert main(words) == 0
    assert (tmp_path / "m.py").read_bytes() == (RUNTIME / "loader.py").read_bytes()


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"input_ids": np.ones((1, 4), np.int64)}, ["attention_mask"]),
        ({"odd": np.ones((1, 4), np.int64)}, ["odd"]),
        ({"input_ids": np.ones((1, 4), np.float32)}, ["input_ids", "float32", "int64"]),
        ({"input_ids": np.ones(4, np.int64)}, ["input_ids"]),
        ({"input_ids": np.ones((1, 5), np.int64)}, ["4", "5"]),
        ({"input_ids": np.full((1, 4), 100, np.int64)}, ["range"]),
        ({"input_ids": np.full((1, 4), -101, np.int64)}, ["range"]),
    ],
    ids=["missing", "unknown", "dtype", "rank", "shape", "id too large", "id too small"],
)
def test_bad_run(
    arrays: dict[str, np.ndarray],
    parts: list[str],
    build: Build,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, library = build("tiny-bert")
    names = ("input_ids", "attention_mask", "token_type_ids")
    good = {name: np.ones((1, 4), np.int64) for name in names}
    given = (
        arrays
        if "input_ids" in arrays and len(parts) == 1 and parts[0] == "attention_mask"
        else {**good, **arrays}
    )
    np.savez(tmp_path / "in.npz", **given)
    words = ["run", str(library), "-i", str(tmp_path / "in.npz"), "-o", str(tmp_path / "o.npz")]
    refuses(words, capsys, parts)
    assert not (tmp_path / "o.npz").exists()


@pytest.mark.parametrize("keep", [10, 3000, 0.5, 0.99])
def test_truncated_library(
    keep: float, build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, library = build("tiny-bert")
    whole = library.read_bytes()
    size = keep if isinstance(keep, int) else int(len(whole) * keep)
    (tmp_path / "cut.so").write_bytes(whole[:size])
    refuses(["inspect", str(tmp_path / "cut.so")], capsys, ["cut.so"])


def test_profile_adds_up_and_writes_a_trace(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, library = build("tiny-bert")
    trace = tmp_path / "trace.json"
    words = ["profile", str(library), "--seq", "9", "--runs", "3"]
    assert main([*words, "--json", "--trace", str(trace)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(row["seconds"] for row in result["ops"]) == pytest.approx(result["seconds"])
    linear = next(row for row in result["ops"] if row["op"] == "linear")
    # Two layers of 32 channels: QKV, output, two FFN products over 9 tokens; the pooler over 1.
    assert linear["macs"] == 2 * 9 * (96 * 32 + 32 * 32 + 2 * 64 * 32) + 32 * 32
    events = json.loads(trace.read_text())["traceEvents"]
    assert len(events) == len(result["steps"])
    assert main(words) == 0
    assert main([*words, "--steps"]) == 0


def test_profile_gives_shares_on_a_calibrated_machine(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    _, library = build("tiny-bert")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["profile", str(library), "--seq", "9", "--runs", "3"]

    def linear() -> dict[str, float | None]:
        assert main([*words, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["ops"]
        return next(row for row in rows if row["op"] == "linear")

    without = linear()
    assert without["of_peak"] is without["of_bandwidth"] is None
    assert main(words) == 0
    assert "run `sparsec calibrate`" in " ".join(capsys.readouterr().out.split())
    rates = replace(default_rates(""), is_measured=True)
    keep_rates(tmp_path / "sparsec", Target.host(), rates)
    row = linear()
    best = "f32.avx512" if Target.host().has(Isa.AVX512) else "f32.avx2"
    assert row["of_peak"] == pytest.approx(row["macs"] / rates.peak(best) / row["seconds"])
    # Weights and biases of two layers and the pooler at least, each read once.
    assert row["bytes"] > 4 * (2 * (96 * 32 + 32 * 32 + 2 * 64 * 32) + 32 * 32)
    assert row["of_bandwidth"] > 0
    assert main(["calibrate", "--json"]) == 0  # it is calibrated: nothing is measured
    assert json.loads(capsys.readouterr().out)["hertz"] == rates.hertz


def test_report_compares_layouts_of_int8_weights(tmp_path: Path) -> None:
    path, report = tmp_path / "m.onnx", tmp_path / "r.json"
    onnx.save(build_model(tiny_spec(), pruning=Pruning(0.8, 4, 1)), path)
    words = ["compile", str(path), "-o", str(tmp_path / "m.so"), "-q", "--report", str(report)]
    words += ["--precision", "int8", "--calibration", "random", "--shape", "input_ids=2x40"]
    assert main(words) == 0
    expected = json.loads(report.read_text())["expected"]
    assert (expected["batch"], expected["seq"]) == (2, 40)
    layers = [row for row in expected["layers"] if row["op"] == "linear_int8"]
    assert layers
    for row in layers:
        times = [c["expected_us"] for c in row["candidates"]]
        assert times == sorted(times)
        assert {"dense", "bsr4x1"} <= {c["layout"] for c in row["candidates"]}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--report", "no/r.json"], "no/r.json: the folder"),
        (["--report", "."], "is a folder; name a file"),
        (["--target", ""], "unknown target ''"),
        (["--threads", "0"], "--threads 0: wanted at least 1"),
        (["--threads", "1025"], "--threads 1025: wanted at least 1, at most 1024"),
        (["--calibration-method", "mse"], "give samples"),
        (["--tokenizer", "t.json"], "--tokenizer goes with --calibration or --calibration-text"),
        (["--shape", "x=1x8", "--shape", "x=1x9"], "--shape x=... is there twice"),
        (["--dump-ir", "m.onnx"], "m.onnx: can not be made a folder"),
    ],
)
def test_options_that_can_not_be_met_are_refused_before_any_work(
    words: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(tiny_model(), "m.onnx")
    refuses(["compile", "m.onnx", "-o", "m.so", *words], capsys, [part])
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_library_in_the_place_of_a_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    (tmp_path / "m.so").mkdir()
    words = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.so")]
    refuses(words, capsys, ["m.so: is a folder; name a file in it"])


def test_products_that_int8_leaves_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    words = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.so")]
    words += ["--precision", "int8", "--calibration", "random", "--keep-fp32", "*layer.0*"]
    assert main(words) == 0
    assert "4 of 9 products in int8: " in " ".join(capsys.readouterr().out.split())


def test_an_index_past_its_table_is_named_by_its_input(build: Build) -> None:
    """Padding is not read, so that nothing in it is wrong."""
    _, library = build("tiny-bert")
    arrays = {n: np.zeros((2, 6), np.int64) for n in ("input_ids", "token_type_ids")}
    arrays["attention_mask"] = np.array([[1] * 6, [1] * 4 + [0] * 2])
    arrays["input_ids"][1, 5] = 1000
    model = load(library)
    model(arrays)
    arrays["token_type_ids"][1, 3] = 2
    message = r"out of range.*; input 'token_type_ids' at \[1, 3\] is 2, its table has 2 rows"
    with pytest.raises(InvalidInput, match=message):
        model(arrays)


def test_an_index_is_found_beside_a_mask_of_another_shape(build: Build) -> None:
    """As ids of positions have, that are the same for all sequences: [1, seq]."""
    _, library = build("tiny-bert")
    model = load(library)
    shapes = {"attention_mask": (2, 6)}
    arrays = [np.zeros(shapes.get(port.name, (1, 6)), np.int64) for port in model.inputs]
    arrays[[port.name for port in model.inputs].index("input_ids")][0, 4] = -101
    assert "'input_ids' at [0, 4] is -101" in model._index_outside(arrays)


def test_nothing_that_is_needed_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model by its report, the library by its trace or results, under another spelling too."""
    monkeypatch.chdir(tmp_path)
    onnx.save(tiny_model(), "m.onnx")
    before = Path("m.onnx").read_bytes()
    compiling = ["compile", "m.onnx", "-o", "m.so", "-q"]
    for report in ("m.onnx", "m.so", "m.py", "../" + tmp_path.name + "/m.onnx"):
        refuses([*compiling, "--report", report], capsys, [f"{report}: would replace m."])
    assert main(compiling) == 0
    made = Path("m.so").read_bytes()
    refuses(["profile", "m.so", "--trace", "m.so"], capsys, ["m.so: would replace m.so"])
    np.savez("in.npz", x=np.zeros(1))
    for output in ("m.so", "in.npz"):
        words = ["run", "m.so", "-i", "in.npz", "-o", output]
        refuses(words, capsys, [f"{output}: would replace {output}"])
    refuses(["tune", "m.onnx", "--log", "m.onnx"], capsys, ["no line of it is a tuning record"])
    assert (Path("m.onnx").read_bytes(), Path("m.so").read_bytes()) == (before, made)


def test_types_and_names_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets are markup to the package that prints tables."""
    folder = tmp_path / "q[/red]"  # two folders, and an end of markup
    folder.mkdir(parents=True)
    onnx.save(tiny_model(), folder / "m.onnx")
    assert main(["compile", str(folder / "m.onnx"), "-o", str(folder / "m.so"), "-q"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(folder / "m.so")]) == 0
    printed = capsys.readouterr().out
    assert "q[/red]/m.so" in printed
    assert "input_ids: int64[batch, seq]" in printed


def test_verify_compares_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", "m.so", "--onnx", "m.onnx"]
    refuses([*words, "--shapes", ""], capsys, ["shape '': wanted BATCHxSEQ"])
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--seed", "-1"])
    assert "wanted 0 or more, got '-1'" in capsys.readouterr().err


def test_numbers_that_json_has_not_are_null() -> None:
    data = {"a": [float("inf"), 1.5, (float("nan"), 2)], "b": {"c": -float("inf")}, "d": "x"}
    assert json.loads(json_text(data)) == {"a": [None, 1.5, [None, 2]], "b": {"c": None}, "d": "x"}


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_hindrance(streams: str, tmp_path: Path) -> None:
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    command = f"{sys.executable} -m sparsec inspect {tmp_path / 'm.onnx'} {streams}"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0


def test_an_interrupt_while_tvm_works_is_one(tmp_path: Path) -> None:
    """TVM makes a RuntimeError of what is raised in a callback of its own."""
    script = """
import os, signal, sys
import tvm
from sparsec.codegen import tir
from sparsec.cli import main
real = tir.tirx.build
def build(*args, **options):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("of TVM") from None
    return real(*args, **options)
tir.tirx.build = build
sys.exit(main(["compile", "m.onnx", "-o", "m.so", "-q"]))
"""
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "sparsec: interrupted\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]
