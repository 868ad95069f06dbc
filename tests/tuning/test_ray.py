"""A Ray cluster of two nodes on this machine, one of which dies in the middle."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from sparsec.cli import main
from sparsec.models.build import Pruning, build_model
from sparsec.models.tiny import tiny_spec
from sparsec.target import Target
from sparsec.tuning.log import TuningLog
from sparsec.tuning.record import Machine, Outcome
from sparsec.tuning.tuner import TRIALS_OF_CONFIRMED

ray = pytest.importorskip("ray", reason="Ray (the extra `scale`) is not installed")
STORE_BYTES = 80 << 20
PATIENCE_SECONDS = 300.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """For the temporary files of all nodes. Its path is short: Ray has its sockets there."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as made:
        yield Path(made)


@pytest.fixture
def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("TMPDIR", str(folder))
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        made.second = made.add_node(**node)
        yield made
    finally:
        made.shutdown()


def test_two_nodes_of_which_one_dies(
    cluster: Any, folder: Path, tmp_path: Path, host: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    model, log = tmp_path / "model.onnx", tmp_path / "t.jsonl"
    onnx.save(build_model(tiny_spec(layers=1), pruning=Pruning(0.8, 4, 1), seed=3), model)

    def kill_after_some_records() -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if log.exists() and log.read_bytes().count(b"\n") >= 2:
                cluster.remove_node(cluster.second, allow_graceful=False)
                return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_after_some_records)
    killer.start()
    status = main(["tune", str(model), "--log", str(log), "--precision", "int8", "--tokens",
                   "8,32", "--layers", "ffn|dense|linear", "--ray", cluster.address])  # fmt: skip
    killer.join()
    out = capsys.readouterr().out
    assert status == 0, out
    here = Machine.of(host)
    assert f"2 nodes: 2 with {here.cpu}" in out
    assert out.count("was lost") == 1
    assert "is left" not in out
    left = list(folder.glob("sparsec-tune-*"))
    assert len(left) <= 1, left  # that of the node that died

    found = TuningLog.read(log)
    assert not found.broken
    assert {(r.machine, r.outcome) for r in found.records} == {(here, Outcome.OK)}
    trials = Counter((r.workload, r.tokens, r.schedule) for r in found.records)
    assert max(trials.values()) == TRIALS_OF_CONFIRMED
    assert {tokens for _, tokens, _ in trials} == {8, 32}


def test_an_address_without_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(build_model(tiny_spec(layers=1)), model)
    command = ["tune", str(model), "--log", str(tmp_path / "t"), "-q", "--ray", "nonsense"]
    assert main(command) == 2
    assert "--ray nonsense: no cluster answers there" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model.onnx"]
