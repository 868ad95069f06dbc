"""The run log: a JSON line for every few steps, cut back to the checkpoint when a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsec.files import replacing


class RunLog:
    """Appends to `path`; a line holds at least "stage" and "step"."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, line: dict[str, Any]) -> None:
        """Add one line; a line that was cut off by a kill is dropped by `rewind`."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Forget what `stage` logged after `step`: it will happen again."""
        kept = [line for line in self.lines() if line["stage"] != stage or line["step"] <= step]
        with replacing(self._path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def lines(self) -> list[dict[str, Any]]:
        """Return every whole line."""
        if not self._path.exists():
            return []
        found = []
        for text in self._path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue  # the last line of a run that was killed
        return found
