"""Progress where standard error is no terminal."""

from __future__ import annotations

import pytest

from diffstill import console


def test_square_brackets_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    ui = console.RichUi()
    ui.say("wrote runs/[a]/x and [/b]")
    ui.warn("class [red]")
    told = " ".join(capsys.readouterr().err.split())
    assert told == "wrote runs/[a]/x and [/b] warning: class [red]"


def test_what_is_left_follows_the_recent_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.PlainUi().bar("train", 100) as bar:
        for at, done in ((0.0, 0.0), (20.0, 40.0), (30.0, 41.0), (40.0, 50.0), (60.0, 50.0), (80.0, 100.0)):
            clock[0] = at
            bar.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "train ...",
        "train: 40%, about 30 s left",  # 40 in 20 s: 60 more in 30
        "train: 50%, about 100 s left",  # 10 in 20 s since that line, not 50 in 40
        "train: 50%, no progress in 20 s",
        "train: done in 80 s",
    ]
