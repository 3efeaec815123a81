"""Rules that show only in a training: what stays, what is saved, and that it goes on as if never interrupted."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.compiled import has_compiler
from ..engine.log import read_log
from ..engine.loop import Trainer
from ..engine.state import load_latest
from ..methods import METHODS
from ..models.adapters import unwrap
from .bench import BATCH, STEPS, Bench, Killed
from .report import Broken, NotApplicable

PROCESSES = 2
APART = 0.02
"""Part of its way by which a role's weights may end elsewhere: rounding, which Adam makes large in small gradients."""


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="diffstill-check-") as folder:
        yield Path(folder)


def losses_of(folder: Path) -> list[dict[str, Any]]:
    """The log's records of losses and their parts."""
    return [record for record in read_log(folder / "log.jsonl") if "loss" in record]


def teacher_unchanged(bench: Bench) -> str:
    """The teacher is bit-identical after training, in eval mode throughout, and in no optimizer."""
    with scratch() as folder:
        trainer = bench.trainer(folder)
        if trainer.teacher is None:
            raise NotApplicable("the method asks nothing of a teacher")
        network = unwrap(trainer.teacher.network)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        optimizers = trainer.arms[0].optimizers.values()
        trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in trained for p in network.parameters()):
            raise Broken("a parameter of the teacher is in the optimizer")
        modes: list[bool] = []

        def note_mode(module: nn.Module, args: object) -> None:
            modes.append(module.training)

        handle = network.register_forward_pre_hook(note_mode)
        trainer.run()
        handle.remove()
    if not modes:
        raise Broken(f"teacher_needs {sorted(trainer.arms[0].method.teacher_needs)}, but it was never called")
    if any(modes):
        raise Broken("the teacher ran in train mode")
    for name, value in network.state_dict().items():
        if not torch.equal(value, before[name]):
            raise Broken(f"{name} of the teacher has changed")
    return f"{len(modes)} forwards in eval mode"


def resume(bench: Bench, dropout: float = 0.0) -> str:
    """Killed after a checkpoint and started again, a training ends bit-identical to the uninterrupted one."""
    half = STEPS // 2
    with scratch() as folder:
        # Log points every 2 steps and a checkpoint at 3: half-finished averages have to survive, too.
        every: dict[str, Any] = {"dropout": dropout, "checkpoint_every": half * BATCH, "log_every": 2}
        whole = bench.trainer(folder / "whole", **every)
        whole.run()
        try:
            bench.trainer(folder / "cut", die_at=half + 1, **every).run()
            raise Broken("the training did not report its progress")
        except Killed:
            pass
        left, _ = load_latest(folder / "cut" / "checkpoints")
        if left is None or left.images_seen != half * BATCH:
            raise Broken("no checkpoint was left in the middle")
        again = bench.trainer(folder / "cut", **every)
        again.run()
        _same_tensors(whole.arms[0].tensors(), again.arms[0].tensors())
        first, second = losses_of(folder / "whole"), losses_of(folder / "cut")
    if first != second:
        raise Broken(f"the logs differ: {_first_difference(first, second)}")
    drops = any(isinstance(m, nn.Dropout) for m in whole.arms[0].method.roles["student"].modules())
    if dropout and not drops:
        raise NotApplicable("the student has no dropout")
    return f"{len(whole.arms[0].tensors())} tensors and {len(first)} log records bit-identical"


def _same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    if a.keys() != b.keys():
        raise Broken(f"only one of the two runs has {sorted(a.keys() ^ b.keys())[:3]}")
    for name in a:
        if not torch.equal(a[name], b[name]):
            worst = float((a[name].double() - b[name].double()).abs().max())
            raise Broken(f"{name} differs by up to {worst:.3g} after resuming")


def _first_difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> str:
    for first, second in zip(a, b, strict=False):
        if first != second:
            return f"{first} and {second}"
    return f"{len(a)} and {len(b)} records"


def ema(bench: Bench) -> str:
    """What is evaluated, and what is saved as the model, is the average of the weights and not the last ones."""
    with scratch() as folder:
        trainer = bench.trainer(folder)
        trainer.run()
        arm = trainer.arms[0]
        saved, _ = load_latest(folder / "checkpoints")
    if saved is None:
        raise Broken("no checkpoint was saved at the end")
    tensors = saved.tensors[arm.name]
    student, raw = arm.student.network, unwrap(arm.method.roles["student"])
    if student.training or any(p.requires_grad for p in student.parameters()):
        raise Broken("the student to be evaluated is in train mode or asks for gradients")
    for name, value in student.state_dict().items():
        if not torch.equal(value.cpu(), tensors[f"ema/student/{name}"]):
            raise Broken(f"{name}: evaluated and saved weights differ")
        if not torch.equal(raw.state_dict()[name].cpu(), tensors[f"role/student/{name}"]):
            raise Broken(f"{name}: trained and saved weights differ")
    pairs = zip(student.parameters(), raw.parameters(), strict=True)
    if all(torch.equal(mean, last) for mean, last in pairs):
        raise Broken("the average equals the last weights")
    return f"after {arm.ema['student'].updates} updates"


def two_processes(bench: Bench) -> str:
    """Two processes that share the batch take the same steps as one, of every role."""
    where = locate(bench)
    with scratch() as folder:
        trainer = bench.trainer(folder / "one")
        start = _roles(trainer.arms[0].tensors())
        trainer.run()
        _launch(where, bench.options.model_dump(mode="json"), folder / "many")
        one, many = losses_of(folder / "one"), losses_of(folder / "many")
        ends = [load_latest(folder / name / "checkpoints")[0] for name in ("one", "many")]
    _same_path(start, *(_roles(end.tensors[trainer.arms[0].name]) for end in ends if end is not None))
    if len(one) != len(many):
        raise Broken(f"{len(one)} log records with one process, {len(many)} with {PROCESSES}")
    worst = max(abs(a["loss"] - b["loss"]) / max(1.0, abs(a["loss"])) for a, b in zip(one, many, strict=True))
    if not worst <= 1e-4:
        raise Broken(f"losses of one and {PROCESSES} processes differ by {worst:.2g} (relative)")
    return f"{STEPS} steps, losses within {worst:.1g}"


def _roles(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Role -> all of its weights, one after the other."""
    names: dict[str, list[str]] = {}
    for name in sorted(tensors):
        if name.startswith("role/"):
            names.setdefault(name.split("/")[1], []).append(name)
    return {role: torch.cat([tensors[name].double().flatten() for name in held]) for role, held in names.items()}


def _same_path(start: dict[str, Tensor], one: dict[str, Tensor], many: dict[str, Tensor]) -> None:
    """Ends where the other ended, to a small part of the way that it went: losses alone hide a role that each process
    trains by itself."""
    for role, begin in start.items():
        way = float((one[role] - begin).norm())
        apart = float((many[role] - one[role]).norm())
        if apart > APART * way:
            raise Broken(
                f"{role}: the weights of one and {PROCESSES} processes are {apart / way:.2g} of their way apart"
            )


def locate(bench: Bench) -> str:
    """How another process finds the method: a name, or ``file.py:Class``."""
    if bench.own_networks:
        raise NotApplicable("tried with the networks of the check only, and these are your own")
    method = bench.method_class
    if method.__module__.startswith("diffstill.") and METHODS.get(method.name) is method:
        return method.name
    file = getattr(sys.modules.get(method.__module__), "__file__", None)
    if file is None or "<locals>" in method.__qualname__:
        raise NotApplicable("the class does not stand at the top level of a file")
    return f"{file}:{method.__qualname__}"


def _launch(target: str, options: dict[str, Any], folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffstill.checks.worker", target, json.dumps(options), str(folder)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **shared,
                "WORLD_SIZE": str(PROCESSES),
                "LOCAL_WORLD_SIZE": str(PROCESSES),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        errors = [child.communicate(timeout=300)[1] for child in children]
    except subprocess.TimeoutExpired:
        raise Broken(f"{PROCESSES} processes did not end within 300 s") from None
    finally:
        for child in children:
            child.kill()
    for child, error in zip(children, errors, strict=True):
        if child.returncode:
            last = (error.strip().splitlines() or ["no message"])[-1]
            raise Broken(f"a process of {PROCESSES} ended with code {child.returncode}: {last}")


def compiled(bench: Bench) -> str:
    """torch.compile changes nothing beyond rounding, or the engine sees that it does and goes without."""
    if not bench.method_class.compiles:
        raise NotApplicable("the method asks not to be compiled")
    if not has_compiler(torch.device("cpu")):
        raise NotApplicable("torch.compile needs a C++ compiler here, and there is none")
    with scratch() as folder:
        runs: list[Trainer] = []
        for way in (False, True):
            trainer = bench.trainer(folder / str(way), steps=2, compile=way)
            trainer.run()
            runs.append(trainer)
        eager, fused = (losses_of(folder / str(way)) for way in (False, True))
    worst = max(abs(a["loss"] - b["loss"]) / max(1.0, abs(a["loss"])) for a, b in zip(eager, fused, strict=True))
    if not worst <= 1e-3:
        raise Broken(f"losses differ by {worst:.2g} (relative)")
    told = "; ".join(runs[1].warnings)
    return f"note: {told}" if told else f"losses within {worst:.1g}"
