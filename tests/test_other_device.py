"""Every method where tensors are on a device that is not the CPU, without a GPU: the same weights, or a refusal.

tests/device builds the device; it refuses tensors and generators of different devices in one operation, as a GPU does,
and counts how often the host waits for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils import cpp_extension

from diffstill.report.receipt import Receipt

HERE = Path(__file__).parent / "device"
FAST = [
    "training.images=256", "training.batch_size=32", "training.warmup_images=0", "training.log_every=1",
    "training.checkpoint_every=96", "data.limit=200",
    "training.precision=fp32", "training.teacher_precision=fp32",
    "evaluation.samples=40", "evaluation.steps=4", "evaluation.pairs=40",
]  # fmt: skip
NET = ["network.block_out_channels=[8, 16]", "network.norm_num_groups=4"]
MIXTURES = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from device import other_device
there = other_device(Path(sys.argv[1]))
own = torch.Generator(there).manual_seed(5)
x, y = torch.randn(2, 3, 8, 8, generator=own, device=there), torch.randn(2, 3, 8, 8)
assert torch.equal(x.cpu(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)))
net = torch.nn.Conv2d(3, 4, 3)
attempts = {
    "add": lambda: x + y, "cat": lambda: torch.cat([x, y]), "where": lambda: torch.where(x > 0, x, y),
    "matmul": lambda: x @ y, "convolution": lambda: net(x), "weights": lambda: net.to(there)(y),
    "loss": lambda: torch.nn.functional.mse_loss(x, y), "numpy": lambda: x.numpy(),
    "index": lambda: y[torch.tensor([0], device=there)], "linear": lambda: torch.nn.functional.linear(x, y[0, 0]),
    "cpu generator": lambda: torch.randn(2, generator=torch.Generator(), device=there),
    "other generator": lambda: torch.randn(2, generator=own),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit(f"{name} was not refused")


def reads(act):
    before = torch.ops.other.reads()
    act()
    return torch.ops.other.reads() - before


waits = [lambda: x.sum().item(), lambda: x.cpu(), lambda: x[x > 0], lambda: bool((x > 0).any())]
assert [reads(act) for act in waits] == [1, 1, 1, 1]
goes_on = [lambda: x + x, lambda: net(x).sum(), lambda: y.to(there), lambda: torch.randn(2, device=there)]
assert [reads(act) for act in goes_on] == [0, 0, 0, 0]
sent = torch.ops.other.sends()
goes_on[0](), goes_on[1]()
assert torch.ops.other.sends() == sent
y.to(there, non_blocking=True)
assert torch.ops.other.sends() == sent
y.to(there)
assert torch.ops.other.sends() == sent + 1
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built device."""
    try:
        cpp_extension.verify_ninja_availability()
        cpp_extension.get_compiler_abi_compatibility_and_version(cpp_extension.get_cxx_compiler())
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no C++ compiler: {error}")
    return tmp_path_factory.mktemp("other-device")


def child(*words: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DIFFSTILL_DEBUG": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def plan(root: Path, subject: list[str]) -> list[dict[str, Any]]:
    """Every method, two of them stopped and gone on, and what is done with their models."""

    def model(name: str) -> str:
        return str(root / name / "model")

    def distill(recipe: str, teacher: str, *more: str) -> list[str]:
        return ["distill", recipe, f"teacher.model={model(teacher)}", *FAST, *more, "--out", str(root / recipe)]

    dash = distill("digits-dash", "teacher", "student.block_out_channels=[8, 8]", "student.norm_num_groups=4")
    share = ["method.steps=3", "method.gan_share=.5", "method.calibration=2", "method.student_every=2"]
    unidad = distill("digits-unidad", "source", "data.shots=3", *share, "training.channels_last=true")
    of = ["--data", "digits", "-n", "8"]
    runs: list[tuple[list[str], int | None]] = [
        (["train", "digits-teacher", *FAST, *NET, "--out", str(root / "teacher")], None),
        (["train", "digits-teacher-v", *FAST, *NET, "--out", str(root / "teacher-v")], None),
        (["train", "digits-source", *FAST, *NET, "--out", str(root / "source")], None),
        (dash, 4),
        (dash, None),
        (distill("digits-sfddm", "teacher"), None),
        (distill("digits-encoder", "teacher"), None),
        (distill("digits-guided", "teacher-v"), None),
        (distill("digits-progressive", "teacher-v"), None),
        (unidad, 5),
        (unidad, None),
        (distill("digits-finetune", "source"), None),
        (
            [
                "distill",
                *subject,
                "training.precision=fp32",
                "training.teacher_precision=fp32",
                "--out",
                str(root / "subject"),
            ],
            None,
        ),
        (["sample", model("digits-dash"), "--guidance", "tag", "--steps", "4", "--out", str(root / "tag.npz")], None),
        (["inpaint", model("digits-dash"), *of, "--mask", "left", "--steps", "4", "--out", str(root / "in.png")], None),
        (["consistency", model("digits-sfddm"), "--teacher", model("teacher"), "--out", str(root / "as.png")], None),
    ]
    return [{"words": [*words, "--quiet"], "stop_at": step} for words, step in runs]


def kept(root: Path) -> dict[str, torch.Tensor]:
    """All weights of every run's model, and samples, each in one row."""
    found: dict[str, list[torch.Tensor]] = {"samples": [torch.from_numpy(np.load(root / "tag.npz")["images"]).float()]}
    for file in sorted(root.glob("*/model/**/*.safetensors")):
        run = found.setdefault(file.relative_to(root).parts[0], [])
        run += [tensor.float().flatten() for _, tensor in sorted(load_file(file).items())]
    return {run: torch.cat([part.flatten() for part in parts]) for run, parts in found.items()}


@pytest.mark.slow
def test_it_refuses_what_a_gpu_refuses(build: Path) -> None:
    child("-c", MIXTURES, str(build), str(HERE.parent))


@pytest.mark.slow
def test_every_method_learns_there_what_it_learns_on_the_cpu(
    build: Path, tiny_subject: list[str], tmp_path: Path
) -> None:
    found = {}
    for name, device in (("cpu", "cpu"), ("other", str(build))):
        root, file = tmp_path / name, tmp_path / f"{name}.json"
        made = plan(root, tiny_subject)
        file.write_text(json.dumps(made), encoding="utf-8")
        done = json.loads(child(str(HERE / "run.py"), device, str(file)).splitlines()[-1])
        assert [one["code"] for one in done] == [0 if one["stop_at"] is None else 143 for one in made]
        assert not any(one["reads"] for one in done), "a step that reads a value waits for the device"
        assert not any(one["sends"] for one in done), "so does one that sends something and does not go on"
        found[name] = kept(root)
    assert len(found["cpu"]) == 12, "eleven models and the samples"
    for run, weights in found["cpu"].items():
        apart = ((found["other"][run] - weights).norm() / weights.norm()).item()
        assert apart < 1e-3, f"{run}: {apart} of its norm"  # roundings, and what Adam makes of gradients of nearly 0
    for run in ("teacher", "digits-dash", "digits-unidad", "subject"):
        cpu, other = (Receipt.load(tmp_path / name / run) for name in ("cpu", "other"))
        assert (cpu.environment.device, other.environment.device) == ("cpu", "other:0")
        for one, two in zip(cpu.models.values(), other.models.values(), strict=True):
            fds = [[point.fd.value for point in model.sweep if point.fd is not None] for model in (one, two)]
            assert fds[0] == pytest.approx(fds[1], rel=1e-3)
