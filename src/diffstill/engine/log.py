"""``log.jsonl``: one JSON object a line; on resume it is cut back to the checkpoint, so it reads as one run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RunLog:
    """Appends records to a file. Inactive (``path=None``) on processes other than the first."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def write(self, **record: Any) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, images_seen: int) -> None:
        """Drops records that lie beyond ``images_seen``, and a last line that a crash left torn."""
        if self.path is None or not self.path.exists():
            return
        kept = [r for r in read_log(self.path) if r.get("images", 0) <= images_seen]
        beside = self.path.with_suffix(".tmp")
        beside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(beside, self.path)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log; a torn last line is passed over."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
