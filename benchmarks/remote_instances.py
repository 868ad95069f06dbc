"""Several instances of an engine in workers: a process for each, on CPUs of its own.

As sparsec.tools.peer_instances is for engines of this Python. The calls are timed in the workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from remote import WAIT_PER_TURN_SECONDS, Remote, WorkerFailed, ask_all
from sparse_peers import SparseFile

from sparsec.tools.inputs import Arrays
from sparsec.tools.instances import EngineFailed, Places, Windows

COPY_SECONDS = 0.2  # of the trial that chooses one of the copies

Shapes = tuple[tuple[int, ...], ...]


class RemoteEngine:
    """A sparsec.tools.instances.Engine whose settings are its files.

    `copies`: so many workers for each instance load the file; the fastest counts. The workers of
    the last layout stay until another comes.
    """

    def __init__(self, name: str, files: Sequence[SparseFile], copies: int) -> None:
        self.name = name
        self.settings = tuple(file.variant for file in files)
        self._files = dict(zip(self.settings, files, strict=True))
        self._copies = copies
        self._instances: Instances | None = None

    def windows(self, setting: str, places: Places, arrays: Arrays, seconds: float) -> Windows:
        """See Engine."""
        file = self._files[setting]
        if self._instances is None or not self._instances.are_of(file, places):
            self.close()
            self._instances = Instances(file, places, self._copies)
        try:
            self._instances.load(arrays)
            return self._instances.windows(seconds)
        except WorkerFailed as error:
            self.close()
            raise EngineFailed(str(error)) from None

    def close(self) -> None:
        """End the workers."""
        if self._instances is not None:
            self._instances.close()
            self._instances = None


class Instances:
    """The workers of one file in these places, all with the same inputs."""

    def __init__(self, file: SparseFile, places: Places, copies: int) -> None:
        self._file, self._places = file, places
        self._copies = [[Remote(file.worker, cpus) for cpus in places] for _ in range(copies)]
        self._counting: list[Remote] = []  # the fastest copy of each
        self._shapes: Shapes | None = None

    def are_of(self, file: SparseFile, places: Places) -> bool:
        """Whether these are the workers of that file in those places."""
        return (self._file, self._places) == (file, places)

    def load(self, arrays: Arrays) -> None:
        """Load the file for these inputs, unless it is for such shapes, and choose the copies."""
        shapes = tuple(arrays[name].shape for name in sorted(arrays))
        if shapes == self._shapes:
            return
        with TemporaryDirectory() as folder:
            inputs = Path(folder, "inputs.npz")
            np.savez(inputs, allow_pickle=False, **arrays)
            all_copies = [remote for copy in self._copies for remote in copy]
            about = {"path": str(self._file.path), "inputs": str(inputs), "clock": "wall"}
            ask_all(all_copies, "load", threads=len(self._places[0]), **about)
        self._counting = self._fastest() if len(self._copies) > 1 else self._copies[0]
        self._shapes = shapes

    def _fastest(self) -> list[Remote]:
        """Of the copies in each place, in a short trial of one row of instances after another."""
        rows = [(row, _windows(row, COPY_SECONDS)) for row in self._copies]
        found = []
        for place in range(len(self._places)):
            medians = [median(taken[place]) for _, taken in rows]
            found.append(rows[medians.index(min(medians))][0][place])
        return found

    def windows(self, seconds: float) -> Windows:
        """See Engine; raises WorkerFailed."""
        return _windows(self._counting, seconds)

    def close(self) -> None:
        """End the workers."""
        for remote in (remote for copy in self._copies for remote in copy):
            remote.close()


def _windows(remotes: Sequence[Remote], seconds: float) -> Windows:
    ask_all(remotes, "warm", wait_seconds=WAIT_PER_TURN_SECONDS)
    wait_seconds = seconds + WAIT_PER_TURN_SECONDS
    answers = ask_all(remotes, "window", wait_seconds=wait_seconds, seconds=seconds)
    return [answer["seconds"] for answer in answers]
