"""run.py BUILD PLAN.json: ``diffstill`` commands in one process, on the other device, or on the CPU (BUILD ``cpu``).

PLAN.json is a list of {words, stop_at}; ``stop_at`` is a training step at which SIGTERM comes. Prints, of each, the
exit code, how often the host read a value of the device while a step of training was taken, and how often, after the
second step, it sent something there and waited.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from device import other_device
from diffstill.cli import main
from diffstill.engine.loop import Trainer
from diffstill.engine.runtime import Runtime


def work_on(device: torch.device) -> None:
    """Makes ``device`` the one that every run takes, whatever it asks for."""
    made = Runtime.__init__

    def there(self: Runtime, asked: str = "auto") -> None:
        made(self, "cpu")
        self.device = device

    Runtime.__init__ = there  # type: ignore[assignment,method-assign]


def done(words: list[str], stop_at: int | None) -> dict[str, int]:
    """Runs a command, which is told to stop while it does its ``stop_at``-th step."""
    whole, taken, read, sent = Trainer.step, 0, 0, 0
    none = types.SimpleNamespace(reads=lambda: 0, sends=lambda: 0)  # the CPU is never waited for
    device = torch.ops.other if hasattr(torch.ops.other, "reads") else none

    def counted(self: Trainer) -> None:
        nonlocal taken, read, sent
        taken += 1
        if taken == stop_at:
            signal.raise_signal(signal.SIGTERM)
        before = device.reads(), device.sends()
        whole(self)
        read += device.reads() - before[0]
        if taken > 2:  # optimizers and running values begin on the host
            sent += device.sends() - before[1]

    Trainer.step = counted  # type: ignore[method-assign]
    try:
        code = main(words)  # first, for it counts
        return {"code": code, "reads": read, "sends": sent}
    finally:
        Trainer.step = whole  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] != "cpu":
        work_on(other_device(Path(sys.argv[1])))
    plan = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    print(json.dumps([done(**one) for one in plan]), flush=True)
    os._exit(0)  # torch's backward thread of a device like this one may outlive the interpreter, and then aborts
