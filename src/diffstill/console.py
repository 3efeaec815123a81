"""What a person sees while a job runs: rich progress bars on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .jobs.ui import Bar, Silent, Ui

PLAIN_EVERY = 15.0
"""Seconds between progress lines where standard error is no terminal."""


class RichUi:
    """Bars with the time that is left, on standard error; standard output stays for results."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("left"), TimeRemainingColumn(compact=True), TextColumn("took"), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"), console=self.console,
        )  # fmt: skip
        with progress:
            task = progress.add_task(title, total=total, note="")

            class Shown:
                def update(self, done: float, note: str = "") -> None:
                    progress.update(task, completed=done, note=note)

            yield Shown()


class PlainUi:
    """For logs: a line at the start, every few seconds and at the end."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        began = time.monotonic()
        say = self.say

        class Told:
            before: tuple[float, float] | None = None
            """Time and progress at the line before: the rate since then tells what is left, as a bar does."""

            def update(self, done: float, note: str = "") -> None:
                now = time.monotonic()
                if self.before is None:
                    self.before = began, done
                since, then = self.before
                if now - since >= PLAIN_EVERY and done < total:
                    self.before = now, done
                    hope = f"no progress in {now - since:.0f} s"
                    if done > then:
                        hope = f"about {(total - done) * (now - since) / (done - then):.0f} s left"
                    say(f"{title}: {100 * done / total:.0f}%, {hope}  {note}".rstrip())

        say(f"{title} ...")
        yield Told()
        say(f"{title}: done in {time.monotonic() - began:.0f} s")


def make_ui(quiet: bool, speaks: bool) -> Ui:
    if quiet or not speaks:
        return Silent()
    return RichUi() if sys.stderr.isatty() else PlainUi()


def doctor_text(found: dict[str, Any]) -> str:
    """``examine()`` for a person."""
    cores, threads = (f"{found[what]} {what if found[what] != 1 else what[:-1]}" for what in ("cores", "threads"))
    lines = [
        f"diffstill {found['diffstill']} on Python {found['python']}, {found['platform']}",
        f"device: {found['device']}, {cores}, {threads}, "
        f"native bf16: {'yes' if found['bf16'] else 'no'}, {found['free_disk_gib']} GiB free on this disk",
    ]
    for name, number in found["packages"].items():
        lines.append(f"  {'ok     ' if number else 'MISSING'} {name} {number or ''}".rstrip())
    for name, entry in found["extras"].items():
        state = entry["version"] or f"not installed (extra [{entry['extra']}])"
        lines.append(f"  extra   {name}: {state}; for {entry['for']}")
    lines += [f"note: {note}" for note in found["notes"]]
    lines.append("all that is needed is there" if found["ok"] else "something that is needed is missing")
    return "\n".join(lines)
