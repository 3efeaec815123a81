"""Running the command line in children that can be killed, without paying for the imports each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# A clean process imports everything and computes nothing; it forks a child a command. (Forking the test process
# itself would copy thread pools that have run, and such children hang.)
NURSERY = """
import json, os, sys
import torch
torch.set_num_threads(1)
import diffstill.jobs.arena, diffstill.jobs.evaluate
from diffstill.cli import main
for line in sys.stdin:
    command, errors = json.loads(line)
    child = os.fork()
    if child == 0:
        handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = main(command)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Starts ``diffstill COMMAND`` in a child, one at a time."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def start(self, command: Sequence[str], errors: Path) -> int:
        """The pid of a child that runs the command, with all it prints in ``errors``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([list(command), str(errors)]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """Exit code of the child, or minus the signal that ended it."""
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Waits for ``condition()``; fails loudly where it never comes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
