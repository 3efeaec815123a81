"""The run folder: its identity, its files, and the rule that one folder belongs to one recipe."""

from __future__ import annotations

import errno
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..disk import write_text
from ..errors import InputError, RunFailed
from ..recipe import differences, without_places
from ..report.receipt import Receipt
from ..yaml_text import read_yaml, write_yaml

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

MADE = ("log.jsonl", "checkpoints", "model", "teacher", "stages", "models", "samples", "pictures", "evaluations",
        "receipt.json", "report.html", "arena.json", "recipe.yaml", "inputs.json")  # fmt: skip
"""What runs write into their folder, the marks of a run last: an emptying that is stopped can be repeated."""
PASSES = re.compile(r"seed-\d+(-seconds)?")
"""The folders of an arena's passes."""
UNFINISHED = re.compile(r"log\.tmp|\.lock|\.(?P<of>.+)\.(writing|replaced|\d+\.tmp)")
"""What a run that was killed leaves of a file or folder, beside it."""


def _made(name: str) -> bool:
    """Whether a run writes a file or folder of this name, whole or not yet."""
    half = UNFINISHED.fullmatch(name)
    return name in MADE or PASSES.fullmatch(name) is not None or (half is not None and half["of"] in (None, *MADE))


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
    others = sorted(entry.name for entry in path.iterdir() if not _made(entry.name))
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


class Home(ABC):
    """A folder that one recipe owns: refused where it holds something else, nothing written before ``claim``.

    Args:
        recipe: as resolved.
        fresh: throw away what an earlier run left here.
        write: False on all processes but the first, which alone looks at the folder.

    Raises:
        InputError: a folder of another recipe, or with other files.
    """

    marks: ClassVar[tuple[str, ...]]
    """What a folder of this kind has in any case."""

    def __init__(self, path: Path, recipe: Mapping[str, Any], *, fresh: bool, write: bool) -> None:
        self.path, self._recipe, self._fresh, self._write = path, recipe, fresh, write
        if not write:
            return
        if path.exists() and not path.is_dir():
            raise InputError("out", str(path), "give a folder", problem="is a file")
        if all((path / mark).exists() for mark in self.marks):
            if fresh:
                check_fresh(path, recipe)
            else:
                self._check_owner()
        elif path.exists() and any(entry.name != ".lock" for entry in path.iterdir()):
            raise InputError("out", str(path), "choose an empty or new folder", problem="holds files that are no run")

    def claim(self) -> None:
        """Makes the folder this recipe's; with ``fresh``, empties it first.

        Raises:
            InputError: another process is at work in it.
            RunFailed: it cannot be written to.
        """
        if not self._write:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path)
            if self._fresh:
                empty(self.path)
            text = write_yaml(dict(self._recipe))
            write_text(self.path / "recipe.yaml", text)
            self._write_marks()
        except OSError as error:
            raise RunFailed(f"cannot write to {self.path}: {error}") from error

    @abstractmethod
    def _check_owner(self) -> None:
        """Refuses a folder of another recipe."""

    @abstractmethod
    def _write_marks(self) -> None:
        """Writes the marks that ``claim`` does not."""

    def _held(self, name: str) -> dict[str, Any]:
        try:
            text = (self.path / name).read_text(encoding="utf-8")
            held = json.loads(text) if name.endswith(".json") else read_yaml(text)
        except (OSError, yaml.YAMLError, ValueError) as error:
            raise InputError("out", str(self.path), "use --fresh", problem=f"has a broken {name} ({error})") from None
        return held if isinstance(held, dict) else {}

    def _is_another(self, run: str) -> InputError:
        mend = "use another --out, or --fresh to start over"
        return InputError("out", str(self.path), mend, problem=f"holds {run}")


class RunFolder(Home):
    """``recipe.yaml``, ``inputs.json``, ``log.jsonl``, ``checkpoints/``, ``model/``, ``receipt.json``, ``report.html``.

    Args:
        inputs: what the recipe only names: the fingerprint of the data, the teacher's recipe or hash (``inputs.json``).
            Where these lie, or how their path is spelt, makes no other run.

    Raises:
        InputError: where the folder holds a run of another recipe or other inputs (what differs is named), or other
            files.
    """

    marks = ("recipe.yaml", "inputs.json")

    def __init__(
        self,
        path: Path,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, Any],
        *,
        fresh: bool = False,
        write: bool = True,
    ) -> None:
        self._inputs = json.loads(json.dumps(inputs))
        super().__init__(path, recipe, fresh=fresh, write=write)

    def _check_owner(self) -> None:
        held = self._held("recipe.yaml")
        self._same(without_places(held), without_places(self._recipe), "a different recipe")
        self._same(self._held("inputs.json"), self._inputs, "other data or another teacher")

    def _same(self, held: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
        changed = differences(held, wanted)
        if changed:
            shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
            raise self._is_another(f"a run of {what} ({shown})")

    def _write_marks(self) -> None:
        write_text(self.path / "inputs.json", json.dumps(self._inputs, indent=1) + "\n")

    @property
    def finished(self) -> bool:
        """Whether an earlier call did it all (and is not to be thrown away)."""
        return self.receipt.exists() and not self._fresh and Receipt.load(self.receipt).kind != "eval"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def receipt(self) -> Path:
        return self.path / "receipt.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"
