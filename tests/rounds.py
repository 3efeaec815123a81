"""What the tests of guided and progressive distillation share: exact models on one grid, perfect
students of them, the laws that the real samplers make of noise, and a process that knows diffusers alone."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from worlds import cosine_pi

from diffstill.analytic import AffineStudent, GaussianMixtureWorld, analytic_denoiser
from diffstill.data.dataset import ImageData
from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.prediction import PredictionType
from diffstill.diffusion.sampling import ddim_sample, stochastic_sample
from diffstill.diffusion.schedule import spaced_indices
from diffstill.engine.arm import Arm
from diffstill.engine.loop import Trainer
from diffstill.engine.runtime import Runtime
from diffstill.engine.settings import TrainSettings
from diffstill.engine.stream import BatchStream
from diffstill.methods import Setting
from diffstill.methods.progressive import Progressive, ProgressiveOptions
from diffstill.methods.trajectory import trajectory_target
from diffstill.models.denoiser import Denoiser


def single(mean: float = 0.3, std: float = 0.5) -> GaussianMixtureWorld:
    return GaussianMixtureWorld.single_gaussians(torch.full((1, 1, 1, 1), mean, dtype=torch.float64), std)


def exact(steps: int, kind: PredictionType = "v_prediction") -> Denoiser:
    """The optimal denoiser of N(.3, .5^2) at t = i / steps (``cosine_pi``: alpha at t = 1 is 3e-8, not 0)."""
    return analytic_denoiser(single(), cosine_pi(steps), kind)


class Follower(Denoiser):
    """The perfect student of a round: it predicts its target itself."""

    leader: Denoiser
    reach: int = 1

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor, scale: Tensor | None = None) -> Tensor:
        return trajectory_target(self.leader, x_t, t, labels, reach=self.reach, scale=scale)


def follow(teacher: Denoiser, steps: int, reach: int = 1) -> Follower:
    """A round: the perfect student with ``steps`` of the teacher's, each reaching ``reach`` of its own down."""
    leader = teacher.respaced(spaced_indices(teacher.schedule.T, steps, "trailing"))
    made = Follower(
        teacher.network, leader.schedule, teacher.num_classes, teacher.sample_shape, teacher.prediction_type
    )
    made.leader, made.reach, made.scale_range = leader, reach, teacher.scale_range
    made.sampler = "ddim" if reach == 1 else "stochastic"
    return made


def ddim(model: Denoiser, noise: Tensor, labels: Tensor, scale: float = 1.0, **options: Any) -> Tensor:
    """All of the model's steps by our sampler, nothing clipped."""
    return ddim_sample(
        lambda x, t, s: model.guided(x, t, labels, s),
        noise,
        model.schedule,
        Constant(scale),
        **{"steps": model.schedule.T, "prediction_type": model.prediction_type, "clip": "none", **options},
    )


def embedding(model: Denoiser) -> Any:
    """The label table of a U-Net, and the projection of the scale in it where there is one."""
    network: Any = model.network
    return network.class_embedding


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def ddim_law(model: Denoiser) -> tuple[float, float]:
    """Mean and standard deviation of what deterministic sampling makes of N(0, 1): an affine map here."""
    low, high = ddim(model, column(0, 1), torch.zeros(2, dtype=torch.int64)).flatten().tolist()
    return low, abs(high - low)


def stochastic_law(model: Denoiser) -> tuple[float, float]:
    """The same of the stochastic sampler, exactly: sample j is shown a 1 at the j-th draw of noise, and 0 elsewhere."""
    count = model.schedule.T + 1  # one sample sees no noise at all
    rows = iter(torch.eye(count, dtype=torch.float64)[:-1].view(-1, count, 1, 1, 1))
    labels = torch.zeros(count, dtype=torch.int64)
    out = stochastic_sample(
        lambda x, t, s: model.guided(x, t, labels, s),
        next(rows),
        model.schedule,
        Constant(1.0),
        lambda: next(rows),
        prediction_type=model.prediction_type,
        clip="none",
    ).flatten()
    assert next(rows, None) is None, "T evaluations, T - 1 fresh noises"
    return float(out[-1]), float((out[:-1] - out[-1]).square().sum().sqrt())


def affine_round(teacher: Denoiser, steps: int, folder: Path, **options: Any) -> Denoiser:
    """A round in the real trainer, from an exact teacher or from the student of the round before. The student is an
    affine map for every timestep, which can be the target exactly."""
    leader = teacher.respaced(spaced_indices(teacher.schedule.T, steps, "trailing"))
    network = copy.deepcopy(teacher.network).requires_grad_(True)
    if not isinstance(network, AffineStudent):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = AffineStudent(1, (1, 1, 1), teacher.schedule.T, bins=teacher.schedule.T)
    student = Denoiser(network, leader.schedule, 1, (1, 1, 1), leader.prediction_type)
    method = Progressive(Setting(student, leader.freeze()), ProgressiveOptions(**options))
    pixels = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    data = ImageData("levels", "train", pixels, torch.zeros(256, dtype=torch.int64), ("only",))
    chosen = TrainSettings(
        images=400 * 64, batch_size=64, lr=0.05, lr_min=0, decay="linear", weight_decay=0, ema_decay=0, compile=False
    )
    stream = BatchStream(data, leader.schedule, batch_size=64, seed=0, device=torch.device("cpu"))
    runtime = Runtime("cpu")
    arm = Arm("arm", method, chosen, runtime)
    Trainer([arm], stream, chosen, runtime, folder, teacher=leader).run()
    return arm.student


STRANGER = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffstill":
            raise ImportError("diffstill is not here")
sys.meta_path.insert(0, Blocker())
import numpy as np, torch
from diffusers import DiffusionPipeline
root, folders, labels, seed, runs = json.loads(sys.argv[1])
out = {}
for name in folders:
    pipe = DiffusionPipeline.from_pretrained(f"{root}/{name}", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    for run, options in runs.items():
        draws = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(len(labels))]
        try:
            out[f"{name}/{run}"] = pipe(labels, generator=draws, output_type="np", **options).images
        except ValueError as error:
            out[f"{name}/{run}"] = np.array(str(error))
assert "diffstill" not in sys.modules
np.savez(f"{root}/out.npz", **out)
"""


def plain_diffusers(
    root: Path, folders: list[str], labels: list[int], seed: int, runs: dict[str, dict[str, Any]]
) -> dict[str, np.ndarray]:
    """What a process in which diffstill cannot be imported draws from ``root/folder``, by ``folder/run``: images
    (B, H, W, C), or the message of a ``ValueError``. The noises are those of stream ``seed``."""
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps([str(root), folders, labels, seed, runs])],
        # To the bit only with as many threads: sums are split between them.
        env={**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(root / "out.npz", allow_pickle=False) as found:
        return dict(found)
