"""The run folder: its identity, its files, and the rule that one folder belongs to one recipe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, RunFailed
from ..recipe import differences


class RunFolder:
    """``recipe.yaml``, ``log.jsonl``, ``checkpoints/``, ``model/``, ``receipt.json``, ``report.html``.

    Args:
        fresh: throw away what an earlier run left here.
        write: False on all processes but the first, which alone looks at the folder.

    Raises:
        InputError: where the folder holds a run of another recipe (the differing keys are named), or other files.
    """

    def __init__(self, path: Path, recipe: Mapping[str, Any], *, fresh: bool = False, write: bool = True) -> None:
        self.path = path
        if not write:
            return
        file = path / "recipe.yaml"
        if path.exists() and not path.is_dir():
            raise InputError("out", str(path), "give a folder", problem="is a file")
        if fresh and file.exists():
            # Only a folder that is known to be a run is ever emptied.
            shutil.rmtree(path)
        if file.exists():
            self._same(file, recipe)
        elif path.exists() and any(path.iterdir()):
            raise InputError("out", str(path), "choose an empty or new folder", problem="holds files that are no run")
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                beside = path / ".recipe.yaml"
                beside.write_text(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True), "utf-8")
                os.replace(beside, file)
        except OSError as error:
            raise RunFailed(f"cannot write to {path}: {error}") from error

    def _same(self, file: Path, recipe: Mapping[str, Any]) -> None:
        try:
            old = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(
                "out", str(self.path), "use --fresh", problem=f"has a broken recipe.yaml ({error})"
            ) from None
        changed = differences(old if isinstance(old, dict) else {}, recipe)
        if changed:
            shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
            raise InputError(
                "out",
                str(self.path),
                "use another --out, or --fresh to start over",
                problem=f"holds a run of a different recipe ({shown})",
            )

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def receipt(self) -> Path:
        return self.path / "receipt.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"
