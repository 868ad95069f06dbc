"""The training loop: it learns, it logs, and a killed run goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsec.errors import InvalidInput

torch = pytest.importorskip("torch", reason="compress needs the extra compress")

from sparsec.models.compress import checkpoint, prune  # noqa: E402
from sparsec.models.compress.data import load_tokenizer  # noqa: E402
from sparsec.models.compress.folders import load_model  # noqa: E402
from sparsec.models.compress.pattern import BlockPattern  # noqa: E402
from sparsec.models.compress.recipe import Distillation  # noqa: E402
from sparsec.models.compress.runlog import RunLog  # noqa: E402
from sparsec.models.compress.sites import encoder_linears  # noqa: E402
from sparsec.models.compress.tasks import find_task  # noqa: E402
from sparsec.models.compress.train import (  # noqa: E402
    Device,
    Source,
    Stage,
    Tightening,
    Trainer,
)

CPU = Device("cpu", bf16=False)
LABELS = Distillation(labels=1.0, logits=0.0, hidden=0.0)


class Killed(Exception):
    """Stands for a kill in the middle of a run."""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(tiny_folder: Path, sst2_files: tuple[Path, Path]) -> Callable[..., Trainer]:
    """Return a function that makes the trainer of a pruning stage in a folder."""
    task, tokenizer = find_task("sst2"), load_tokenizer(tiny_folder)
    train, dev = (task.read(path, tokenizer, 32) for path in sst2_files)

    def trainer(folder: Path, tell: Any = lambda *_: None, **changes: Any) -> Trainer:
        student, _ = load_model(tiny_folder, task, seed=0)
        linears = encoder_linears(student)
        masks = prune.attach(linears, BlockPattern(4, 1))
        pruner = prune.Pruner("snip", "layer", dict.fromkeys(linears, 0.5))
        began = dict.fromkeys(linears, 0.0)
        tightening = Tightening(
            lambda p: pruner.update(linears, masks, began, p), 5, 0.5,
            lambda: pruner.start(masks), lambda: pruner.stop(masks),
        )  # fmt: skip
        fields = {"epochs": 3.0, "learning_rate": 3e-3, "weights": LABELS, "seed": 3, **changes}
        stage = Stage(
            "prune", [Source("train", lambda epoch: train, True)],
            tokens_per_batch=96, tightening=tightening, **fields,
        )  # fmt: skip
        log = RunLog(folder / "log.jsonl")
        return Trainer(
            stage, student, None, task, dev, folder / "stage", log, CPU,
            tell=tell, checkpoint_seconds=0.0,
        )  # fmt: skip

    return trainer


def test_learns_under_a_mask_that_tightens(make: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make(tmp_path, epochs=6.0)
    dev = trainer.run()
    assert dev["accuracy"] > 0.85  # half the sentences of each label
    found = prune.found_masks(encoder_linears(trainer.student), BlockPattern(4, 1))
    assert all(1 - kept.float().mean() == pytest.approx(0.5, abs=0.01) for kept in found.values())
    lines = RunLog(tmp_path / "log.jsonl").lines()
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert lines[-1]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert lines[-1]["dev"].keys() == dev.keys()


@pytest.mark.parametrize("at", [2, 30])  # before and behind the tightening's end
def test_a_killed_run_ends_as_one_that_was_not(
    make: Callable[..., Trainer], tmp_path: Path, at: int
) -> None:
    (tmp_path / "whole").mkdir()
    whole = make(tmp_path / "whole")
    wanted = whole.run()

    def kill(_text: str, step: int, _steps: int) -> None:
        if step > at:
            raise Killed

    (tmp_path / "cut").mkdir()
    with pytest.raises(Killed):
        make(tmp_path / "cut", kill).run()
    again = make(tmp_path / "cut")
    assert again.run() == wanted
    for name, value in whole.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value), name
    logs = [RunLog(tmp_path / name / "log.jsonl").lines() for name in ("whole", "cut")]
    for line in (*logs[0], *logs[1]):
        del line["seconds"]
    assert logs[0] == logs[1]


def test_a_stage_that_is_done_is_not_done_again(
    make: Callable[..., Trainer], tmp_path: Path
) -> None:
    wanted = make(tmp_path, epochs=0.5).run()

    def refuse(*_: Any) -> None:
        raise AssertionError("a step was done")

    assert make(tmp_path, refuse, epochs=0.5).run() == wanted


def test_the_pattern_changes_at_even_moments_of_its_window() -> None:
    tightening = Tightening(lambda p: p, times=4, until=0.5)
    found = {s: p for s in range(20) if (p := tightening.progress(s, 20)) is not None}
    assert list(found.values()) == [0.25, 0.5, 0.75, 1.0]
    assert max(found) < 10
    assert Tightening(lambda p: p, times=9, until=1.0).progress(0, 1) == 1.0


def test_a_checkpoint_that_is_cut_off_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 3})
    assert checkpoint.load(path) == {"step": 3}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InvalidInput, match=r"checkpoint\.pt.*delete it"):
        checkpoint.load(path)


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 3})

    def full(_state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InvalidInput, match="No space left"):
        checkpoint.save(path, {"step": 4})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
