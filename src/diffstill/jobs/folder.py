"""The run folder: its identity, its files, and the rule that one folder belongs to one recipe."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..disk import write_text
from ..errors import InputError, RunFailed
from ..recipe import differences
from ..report.receipt import Receipt

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

MADE = ("log.jsonl", "checkpoints", "model", "teacher", "stages", "models", "samples", "pictures", "evaluations",
        "receipt.json", "report.html", "arena.json", "recipe.yaml", "inputs.json")  # fmt: skip
"""What runs write into their folder, the marks of a run last: an emptying that is stopped can be repeated."""
SEEDS = "seed-"
"""What the folders of an arena's passes begin with."""


def _leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value)
    elif isinstance(tree, str):
        yield tree


def check_fresh(path: Path, recipe: Mapping[str, Any]) -> None:
    """``--fresh`` throws away what a run made, and nothing else.

    Raises:
        InputError: a folder with other files, or with something that the recipe itself reads.
    """
    others = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name not in MADE and not entry.name.startswith((SEEDS, ".")) and not entry.name.endswith(".tmp")
    )
    if others:
        mend = "move them, or use another --out"
        problem = f"holds files that no run made ({', '.join(others[:4])}), and --fresh would lose them"
        raise InputError("out", str(path), mend, problem=problem)
    home = path.resolve()
    for text in _leaves(recipe):
        for name in (text, text.partition(":")[2]):
            try:
                inside = bool(name) and Path(name).exists() and Path(name).resolve().is_relative_to(home)
            except (OSError, ValueError):
                continue
            if inside:
                problem = f"holds {name}, which the recipe reads, and --fresh would lose it"
                raise InputError("out", str(path), "use another --out", problem=problem)


def empty(path: Path) -> None:
    """Removes what a run made; the folder itself stays, which may be a link or the one that we are in."""
    entries = sorted(path.iterdir(), key=lambda entry: MADE.index(entry.name) if entry.name in MADE else -1)
    for entry in entries:
        if entry.name == ".lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


class Lock:
    """What keeps a second process out of a run folder; gone with this one, however it ends. Where the file system has
    no locks there is none."""

    def __init__(self, path: Path) -> None:
        self._file = (path / ".lock").open("a")
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                mend = "wait for it, stop it, or use another --out"
                raise InputError("out", str(path), mend, problem="is in use by another process") from None


class RunFolder:
    """``recipe.yaml``, ``log.jsonl``, ``checkpoints/``, ``model/``, ``receipt.json``, ``report.html``.

    Args:
        fresh: throw away what an earlier run left here.
        write: False on all processes but the first, which alone looks at the folder.
        inputs: what the recipe only names: the fingerprint of the data, the teacher's recipe or hash (``inputs.json``).

    Raises:
        InputError: where the folder holds a run of another recipe or other inputs (what differs is named), or other
            files. Nothing is written before ``claim``.
    """

    def __init__(
        self,
        path: Path,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, Any],
        *,
        fresh: bool = False,
        write: bool = True,
    ) -> None:
        self.path, self._fresh, self._write = path, fresh, write
        self._texts = {
            "recipe.yaml": yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True),
            "inputs.json": json.dumps(inputs, indent=1) + "\n",
        }
        if not write:
            return
        file = path / "recipe.yaml"
        if path.exists() and not path.is_dir():
            raise InputError("out", str(path), "give a folder", problem="is a file")
        if file.exists() and (path / "inputs.json").exists():
            if fresh:
                check_fresh(path, recipe)
            else:
                self._same(file, recipe, "a different recipe")
                self._same(path / "inputs.json", inputs, "other data or another teacher")
        elif path.exists() and any(entry.name != ".lock" for entry in path.iterdir()):
            raise InputError("out", str(path), "choose an empty or new folder", problem="holds files that are no run")

    @property
    def finished(self) -> bool:
        """Whether an earlier call did it all (and is not to be thrown away)."""
        return self.receipt.exists() and not self._fresh and Receipt.load(self.receipt).kind != "eval"

    def claim(self) -> None:
        """Makes the folder this run's; with ``fresh``, empties it first (only a folder that is known to be a run)."""
        if not self._write:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path)
            if self._fresh:
                empty(self.path)
            for name, text in self._texts.items():
                if not (self.path / name).exists():
                    write_text(self.path / name, text)
        except OSError as error:
            raise RunFailed(f"cannot write to {self.path}: {error}") from error

    def _same(self, file: Path, wanted: Mapping[str, Any], what: str) -> None:
        try:
            text = file.read_text(encoding="utf-8")
            old = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        except (OSError, yaml.YAMLError, ValueError) as error:
            raise InputError(
                "out", str(self.path), "use --fresh", problem=f"has a broken {file.name} ({error})"
            ) from None
        changed = differences(old if isinstance(old, dict) else {}, json.loads(json.dumps(wanted)))
        if changed:
            shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
            raise InputError(
                "out",
                str(self.path),
                "use another --out, or --fresh to start over",
                problem=f"holds a run of {what} ({shown})",
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
