"""How a job tells its progress, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from ..engine.loop import Progress


class Bar(Protocol):
    """One long piece of work."""

    def update(self, done: float, note: str = "") -> None: ...


class Ui(Protocol):
    """What a job needs of its surroundings."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def bar(self, title: str, total: float) -> AbstractContextManager[Bar]: ...


class _NoBar:
    def update(self, done: float, note: str = "") -> None:
        return None


class Silent:
    """Says nothing."""

    def say(self, text: str) -> None:
        return None

    def warn(self, text: str) -> None:
        return None

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        yield _NoBar()


def training_note(progress: Progress) -> str:
    """``1,234 img/s  loss 0.0123`` for a progress bar."""
    losses = "  ".join(
        f"{name} {value:.4f}" if len(progress.values) > 1 else f"loss {value:.4f}"
        for name, value in list(progress.values.items())[:3]
    )
    return f"{progress.images_per_s:,.0f} img/s  {losses}" if progress.values else ""
