"""Made-up receipts with real digits as pictures: what the report room's tests and a look at its pages need.

``python tests/fabricated.py FOLDER`` writes one page of each kind.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from diffstill.evaluation.results import (
    Cost,
    Estimate,
    ExtractorInfo,
    Fidelity,
    FidelityBin,
    Latency,
    ModelEvaluation,
    Protocol,
    ScalePoint,
)
from diffstill.report.arena import ArenaArm, ArenaResult, ArmSeed
from diffstill.report.page import write_arena, write_comparison, write_report
from diffstill.report.pictures import class_grid, grid, save_png
from diffstill.report.receipt import Ancestor, DataSummary, Environment, Receipt, TrainingSummary

CLASSES = [str(i) for i in range(10)]
GUIDANCE = ["1", "1.5", "2", "3", "tag:1,4,5"]
TEACHER_FD = [10.2, 11.8, 19.9, 31.1, 8.9]
STUDENT_FD = [16.3, 14.1, 18.2, 29.0, 12.9]


def near(value: float, spread: float = 0.06) -> Estimate:
    return Estimate(value=value, low=value * (1 - spread), high=value * (1 + spread))


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) uint8 images and their labels."""
    bunch = load_digits()
    return torch.from_numpy(np.rint(bunch.images * 255 / 16).astype(np.uint8))[:, None], torch.from_numpy(bunch.target)


def pictures(folder: Path, role: str, noise: float, seed: int = 0) -> dict[str, str]:
    images, labels = digits()
    rng = torch.Generator().manual_seed(seed)
    spoilt = (images + noise * torch.randn(images.shape, generator=rng)).clamp(0, 255).to(torch.uint8)
    found = {"grid": f"images/{role}-grid.png"}
    save_png(class_grid(spoilt, labels, CLASSES), folder / found["grid"])
    for i, guidance in enumerate(GUIDANCE):
        found[f"sweep:{guidance}"] = f"images/{role}-sweep-{i}.png"
        darker = (spoilt * (1 + 0.2 * i)).clamp(0, 255).to(torch.uint8)
        save_png(grid(darker[:10], 10), folder / found[f"sweep:{guidance}"])
    return found


def protocol(**changes: object) -> Protocol:
    extractor = ExtractorInfo(name="FD-digits", sha256="ab" * 32, dim=64, accuracy=0.986)
    settings: dict[str, object] = {
        "extractor": extractor, "reference": "digits train, 1437 images", "reference_sha256": "cd" * 32,
        "samples": 1000, "steps": 50, "guidance": GUIDANCE, "seeds": [0], "floor": near(3.8, 0.1),
    }  # fmt: skip
    return Protocol(**(settings | changes))  # type: ignore[arg-type]


def cost(parameters: int, seconds: float) -> Cost:
    latency = [
        Latency(batch=b, runs=7, median_s=s, p10_s=0.95 * s, p90_s=1.1 * s, images_per_s=b / s)
        for b, s in ((1, seconds / 9), (32, seconds))
    ]
    forward = parameters * 71.0
    return Cost(parameters=parameters, flops_forward=forward, nfe=100, flops_image=100 * forward,
                size_mb=parameters * 4e-6, latency=latency)  # fmt: skip


def fidelity(ratio: float = 0.93, cosine: float = 0.75, gap_mse: float = 0.006) -> Fidelity:
    def part(label: str, pairs: int, k: float) -> FidelityBin:
        return FidelityBin(
            label=label, pairs=pairs, ratio=near(ratio * k), cosine=near(min(cosine * k, 0.99), 0.03),
            gap_mse=near(gap_mse / k), cond_mse=near(0.011 / k), null_mse=near(0.013 / k), best_rescale=near(0.81 * k),
        )  # fmt: skip

    by_timestep = [part(f"t {i * 100}-{i * 100 + 99}", 1000, 0.72 + 0.5 * math.sin(0.35 * i)) for i in range(10)]
    by_class = [part(f"class {c}", 36, 1 + 0.1 * math.cos(3.0 * i)) for i, c in enumerate(CLASSES)]
    return Fidelity(split="test", seed=0, overall=part("all", 10000, 1.0), by_timestep=by_timestep,
                    by_class=by_class, teacher_gap_rms=0.14, collapsed=ratio < 0.5)  # fmt: skip


def evaluation(
    name: str, method: str, distances: list[float], size: Cost, found: Fidelity | None, images: dict[str, str]
) -> ModelEvaluation:
    sweep = [
        ScalePoint(guidance=g, nfe=50 if g == "1" else 100, fd=near(fd), fd_test=near(fd + 2.1),
                   kid=near(fd / 1500, 0.3), precision=near(0.86), recall=near(0.7),
                   class_agreement=Estimate(value=a, low=a - 0.012, high=min(1, a + 0.006)))
        for g, fd, a in zip(GUIDANCE, distances, (0.962, 0.985, 0.995, 1.0, 0.998), strict=True)
    ]  # fmt: skip
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return ModelEvaluation(
        name=name, method=method, sha256=sha256, cost=size, sweep=sweep, fidelity=found, images=images
    )


def log(path: Path, arm: str, parts: tuple[str, ...], seed: int = 0) -> None:
    """A ``log.jsonl`` such as a run writes, its last line torn."""
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(10, 2001, 10):
        level = (0.03 + 0.6 * step**-0.6) * np.exp(0.15 * rng.standard_normal(len(parts)))
        record = {part: float(level[i] / (i + 1)) for i, part in enumerate(parts)}
        record |= {"images": step * 128, "step": step, "loss": sum(record.values()), "lr": 1e-4, "grad_norm": 0.3}
        lines.append(json.dumps(record | {"arm": arm}))
        lines.append(json.dumps({"images": step * 128, "step": step, "event": "rate", "images_per_s": 900.0}))
        if step % 200 == 0:
            rise = 1 - math.exp(-step / 500)
            probe = {"ratio": 0.93 * rise, "cosine": 0.75 * rise}
            lines.append(json.dumps({"images": step * 128, "arm": arm, "event": "probe"} | probe))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + '\n{"images": 2561', encoding="utf-8")


def environment() -> Environment:
    return Environment(python="3.11.7", torch="2.13.0", diffusers="0.42.1", platform="Linux", cpu="A processor",
                       cores=2, device="cpu", git_commit="1" * 40)  # fmt: skip


def data() -> DataSummary:
    splits = {"train": 1437, "test": 360}
    return DataSummary(name="digits", fingerprint="0123456789abcdef", splits=splits, shape=(1, 8, 8), classes=CLASSES)


def receipt(
    folder: Path, name: str = "dash-digits", found: Fidelity | None = None, *, shift: float = 0.0, seed: int = 0
) -> Receipt:
    """A complete receipt of a distillation, its pictures and logs beside it."""
    for role, parts in (("teacher", ("noise",)), ("student", ("imitation", "null_branch", "anchor"))):
        log(folder / role / "log.jsonl", role, parts, seed)
    weights = [0.2 + 1.9 * math.exp(-(((i - 17) / 14) ** 2)) for i in range(50)]
    weights = [w * 50 / sum(weights) for w in weights]
    training = [
        TrainingSummary(name="teacher", method="supervised", steps=3000, images_seen=384000, seconds=512.0,
                        images_per_s=750.0, parameters=702753, curve="teacher/log.jsonl", curriculum=weights),
        TrainingSummary(name="student", method="dash", steps=2000, images_seen=256000, seconds=169.0,
                        images_per_s=1514.0, parameters=117769, curve="student/log.jsonl"),
    ]  # fmt: skip
    lineage = [
        Ancestor(name="teacher", method="supervised", recipe_sha256="12" * 32, data_fingerprint="0123456789abcdef",
                 weights_sha256="34" * 32),
        Ancestor(name="student", method="dash", recipe_sha256="56" * 32, data_fingerprint="0123456789abcdef",
                 weights_sha256="78" * 32, parent="teacher"),
    ]  # fmt: skip
    student = [fd + shift for fd in STUDENT_FD]
    models = {
        "teacher": evaluation("teacher", "supervised", TEACHER_FD, cost(702753, 3.925), None,
                              pictures(folder, "teacher", 4, seed)),
        "student": evaluation(name, "dash", student, cost(117769, 1.082), found or fidelity(),
                              pictures(folder, "student", 18, seed)),
    }  # fmt: skip
    return Receipt(
        created="2026-03-01T12:00:00Z", kind="demo", name=name, seed=seed, environment=environment(), data=data(),
        recipe={"method": {"name": "dash", "anchor": 0.1}, "student": {"channels": [16, 24]}, "steps": 2000},
        protocol=protocol(), models=models, lineage=lineage, training=training,
    )  # fmt: skip


ARMS = {
    "dash": ("DASH", 12.9, 0.93, 0.75, 0.0060, 169.0),
    "gap": ("Gap matching", 19.8, 0.90, 0.73, 0.0066, 166.0),
    "composite": ("Composite, one scale", 17.1, 0.68, 0.55, 0.0121, 164.0),
    "fitnets": ("FitNets", 16.4, 0.71, 0.58, 0.0113, 201.0),
    "scratch": ("From scratch", 14.6, 1.07, 0.64, 0.0103, 62.0),
    "conditional": ("Conditional only", 24.0, 3.90, 0.26, 0.1510, 95.0),
}


def arena(folder: Path) -> ArenaResult:
    rng = np.random.default_rng(7)
    arms = []
    for name, (label, fd, ratio, cosine, gap, seconds) in ARMS.items():
        seeds = []
        for seed in range(3):
            for budget, better in (("equal_steps", 1.0), ("equal_seconds", (62 / seconds) ** -0.12)):
                k = 1 + 0.04 * rng.standard_normal()
                found = fidelity(ratio * k, min(0.99, cosine * k), gap * k)
                images = pictures(folder, f"{name}-{seed}", 20, seed) if seed == 0 and budget == "equal_steps" else {}
                distances = [fd * k * better * s / STUDENT_FD[-1] for s in STUDENT_FD]
                run = evaluation(label, name, distances, cost(117769, 1.082), found, images)
                seeds.append(ArmSeed(seed=seed, steps=2000, images_seen=256000, seconds=seconds * k, evaluation=run,
                                     budget=budget, collapse_alarm=ratio < 0.7 and seed == 1))  # fmt: skip
        arms.append(ArenaArm(name=name, method=name, label=label, parameters=117769, seeds=seeds))
    teacher = evaluation("teacher", "supervised", TEACHER_FD, cost(702753, 3.925), None, pictures(folder, "teacher", 4))
    return ArenaResult(
        recipe={"steps": 2000}, data=data(), environment=environment(), protocol=protocol(), teacher=teacher, arms=arms,
        notes=["Students share one frozen teacher and one batch order."],
    )  # fmt: skip


def main(folder: Path) -> None:
    first = receipt(folder / "a")
    second = receipt(folder / "b", "composite-digits", fidelity(0.41, 0.52, 0.02), shift=4.0, seed=1)
    second.protocol = protocol(samples=500)
    second.warnings.append("Only 500 samples a setting: the distances are biased upwards.")
    print(write_report(first, folder / "a", folder / "report.html"))
    print(write_report(second, folder / "b", folder / "collapsed.html"))
    print(write_comparison([(folder / "a", first), (folder / "b", second)], folder / "comparison.html"))
    print(write_arena(arena(folder), folder / "arena.html"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
