"""Running the command line in a child that can be killed: forked, so that torch is imported once."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from diffstill.cli import main


def start(command: Sequence[str], errors: Path) -> int:
    """Forks a child that runs ``diffstill COMMAND`` with its output in ``errors``; returns its pid."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        code = main(command)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def until(condition: object, seconds: float = 120.0) -> None:
    """Waits for ``condition()``; fails loudly where it never comes."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
