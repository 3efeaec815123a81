"""EMA, learning rates, clipping and optimizer state of an arm, with real methods on tiny U-Nets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import DASH, assert_same, losses
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from diffstill.checks.bench import Bench
from diffstill.engine.arm import Arm
from diffstill.engine.ema import Ema
from diffstill.engine.log import read_log
from diffstill.engine.settings import TrainSettings
from diffstill.engine.state import load_latest, pack_optimizer, save_checkpoint, unpack_optimizer
from diffstill.methods import RoleOptimizer, TeacherOutputs
from diffstill.methods.dash import Dash

# EMA


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(()))


@given(decay=st.floats(0, 0.9999), cap=st.booleans(), values=st.lists(st.floats(-5, 5), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_ema_is_its_closed_form(decay: float, cap: bool, values: list[float]) -> None:
    """``sum_k (1 - d_k) prod_{j>k} d_j w_k`` with ``d_n = min(decay, (1 + n) / (10 + n))``, started from zero."""
    network = Scalar()
    ema = Ema(network, decay, cap)
    for value in values:
        with torch.no_grad():
            network.weight.fill_(value)
        ema.update(network)
    rates = [min(decay, (1 + n) / (10 + n)) if cap else decay for n in range(1, len(values) + 1)]
    wanted = sum(v * (1 - rates[k]) * math.prod(rates[k + 1 :]) for k, v in enumerate(values))
    torch.testing.assert_close(ema.network.weight, torch.full((2,), float(wanted), dtype=torch.float64))
    assert ema.updates == len(values)


def test_the_cap_of_the_decay() -> None:
    ema = Ema(Scalar(), 0.9999)
    for updates, wanted in ((0, 2 / 11), (1, 3 / 12), (9, 11 / 20), (90, 92 / 101), (89_989, 0.9999), (10**6, 0.9999)):
        ema.updates = updates
        assert ema.rate() == pytest.approx(wanted, rel=1e-9)
    assert Ema(Scalar(), 0.9999, cap=False).rate() == 0.9999


def test_ema_copies_buffers_and_is_no_part_of_training() -> None:
    network = Scalar()
    ema = Ema(network, 0.9)
    network.seen.fill_(7)
    ema.update(network)
    assert float(ema.network.seen) == 7
    assert not ema.network.training
    assert not any(p.requires_grad for p in ema.network.parameters())
    again = Ema(Scalar(), 0.9)
    again.load(ema.state(), ema.updates)
    assert_same(again.state(), ema.state())
    assert again.rate() == ema.rate()


def test_the_arm_evaluates_the_average_of_its_weights(tmp_path: Path) -> None:
    """The EMA student of a run, recomputed by hand from the raw weights after every step."""
    trainer = DASH.trainer(tmp_path, steps=5, ema_decay=0.5)
    arm = trainer.arms[0]
    raw = arm.method.roles["student"]
    mean = {name: p.detach().clone() for name, p in raw.named_parameters()}
    for step in range(5):
        trainer.step()
        rate = min(0.5, (2 + step) / (11 + step))
        for name, p in raw.named_parameters():
            mean[name] = rate * mean[name] + (1 - rate) * p.detach()
    for name, p in arm.student.network.named_parameters():
        torch.testing.assert_close(p, mean[name], rtol=1e-5, atol=1e-7)
    batch = DASH.batch()
    averaged = arm.student(batch.x_t, batch.t, batch.labels)
    assert not torch.allclose(averaged, arm.method.student(batch.x_t, batch.t, batch.labels))


# Learning rate and settings


def arm_with(**settings: Any) -> Arm:
    return Arm("arm", DASH.method(), TrainSettings(**{"images": 800, "batch_size": 8, **settings}), DASH.runtime)


def test_the_learning_rate_warms_up_and_follows_the_cosine() -> None:
    arm = arm_with(lr=1.0, lr_min=0.1, warmup_images=80)
    # Step k of the warm-up uses (k + 1) / 11 of the rate: never zero, and the full rate right after it.
    assert [arm.learning_rate(8 * k) for k in range(10)] == pytest.approx([(k + 1) / 11 for k in range(10)])
    assert arm.learning_rate(80) == pytest.approx(1.0)
    assert arm.learning_rate(80 + 360) == pytest.approx(0.55)
    assert arm.learning_rate(80 + 180) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert arm.learning_rate(800) == arm.learning_rate(10_000) == pytest.approx(0.1)
    constant = arm_with(lr=1.0, decay="none")
    assert {constant.learning_rate(images) for images in (0, 8, 400, 800)} == {1.0}


def test_the_optimizer_uses_the_rate_of_the_step_and_the_scale_of_the_role(tmp_path: Path) -> None:
    bench = Bench(Dash, {"curriculum": "learn"})
    trainer = bench.trainer(tmp_path, steps=4, warmup_images=16, weight_decay=0.3)
    arm = trainer.arms[0]
    rates = []
    for _ in range(4):
        trainer.step()
        rates.append(arm.optimizers["train"].param_groups[0]["lr"])
    assert rates == pytest.approx([arm.learning_rate(8 * k) for k in range(4)])
    assert [group["weight_decay"] for group in arm.optimizers["train"].param_groups] == [0.3, 0.0]
    method = bench.method()
    method.role_optimizers["curriculum"] = RoleOptimizer(lr_scale=10)
    scaled = Arm("arm", method, trainer.settings, bench.runtime)
    batch = bench.batch()
    assert method.teacher is not None
    scaled.backward(
        scaled.phases["train"], batch, TeacherOutputs(method.teacher, batch, method.teacher_needs), 1.0, True
    )
    scaled.update(scaled.phases["train"], 8)
    assert [group["lr"] for group in scaled.optimizers["train"].param_groups] == pytest.approx(
        [rates[1], 10 * rates[1]]
    )
    assert bool(bench.method().roles["curriculum"].logits.eq(0).all())
    assert bool(arm.method.roles["curriculum"].logits.ne(0).any())


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"images": 100, "batch_size": 64}, "images 100 is no multiple of batch_size 64; use 128"),
        ({"images": 64, "batch_size": 64, "micro_batch": 48}, "batch_size 64 is no multiple of micro_batch 48"),
        ({"images": 64, "lr": 1e-5, "lr_min": 1e-4}, "lr_min 0.0001 is greater than lr 1e-05"),
        ({"images": 64, "ema_decay": 1.0}, "less than 1"),
        ({"images": 64, "epochs": 3}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_be_are_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TrainSettings.model_validate(bad)


def test_micro_batches_train_the_same_network(tmp_path: Path) -> None:
    whole, parts = (DASH.trainer(tmp_path / str(size), micro_batch=size) for size in (None, 2))
    whole.run()
    parts.run()
    a, b = losses(tmp_path / "None"), losses(tmp_path / "2")
    assert [i for i, _ in a] == [i for i, _ in b] == [8, 16, 24, 32, 40, 48]
    assert [v for _, v in a] == pytest.approx([v for _, v in b], rel=1e-4)
    for part in ("imitation", "null", "anchor", "grad_norm"):
        one, many = ([r[part] for r in read_log(tmp_path / size / "log.jsonl") if part in r] for size in ("None", "2"))
        assert len(one) == 6
        assert one == pytest.approx(many, rel=1e-3)
    for x, y in zip(
        whole.arms[0].student.network.parameters(), parts.arms[0].student.network.parameters(), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-4)


def test_gradients_are_clipped_for_the_roles_that_ask(tmp_path: Path) -> None:
    bench = Bench(Dash, {"curriculum": "learn"})
    trainer = bench.trainer(tmp_path, steps=1, grad_clip=0.01)
    arm = trainer.arms[0]
    batch = bench.batch()
    arm.backward(
        arm.phases["train"], batch, TeacherOutputs(arm.method.teacher, batch, arm.method.teacher_needs), 1.0, True
    )
    curriculum = arm.method.roles["curriculum"].logits.grad.clone()
    seen: dict[str, Tensor] = {}
    real = arm.optimizers["train"].step

    def step(*args: Any, **kwargs: Any) -> Any:
        seen["student"] = torch.cat([p.grad.flatten() for p in arm.method.roles["student"].parameters()])
        seen["curriculum"] = arm.method.roles["curriculum"].logits.grad.clone()
        return real(*args, **kwargs)

    arm.optimizers["train"].step = step
    arm.update(arm.phases["train"], 0)
    assert float(seen["student"].norm()) == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(seen["curriculum"], curriculum)
    assert arm.take_means()["grad_norm"] > 0.01


# Optimizer state


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_optimizer_state_goes_through_a_file_bit_exactly(layout: torch.memory_format, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1), nn.Flatten(), nn.Linear(12, 2))
        network.to(memory_format=layout)
        groups = [{"params": list(network[0].parameters())}, {"params": list(network[1:].parameters())}]
        return network, torch.optim.AdamW(groups, lr=1e-2, fused=True)

    def steps(network: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            network(x.contiguous(memory_format=layout)).square().mean().backward()
            optimizer.step()

    whole, cut, again = build(), build(), build()
    steps(*whole, range(6))
    steps(*cut, range(3))
    save_checkpoint(tmp_path, 3, {}, {"a": pack_optimizer(cut[1]), "w": cut[0].state_dict()})
    saved, _ = load_latest(tmp_path)
    assert saved is not None
    again[0].load_state_dict(saved.tensors["w"])
    unpack_optimizer(again[1], saved.tensors["a"])
    assert_same(pack_optimizer(again[1]), pack_optimizer(cut[1]))
    steps(*again, range(3, 6))
    assert_same(again[0].state_dict(), whole[0].state_dict())
    assert_same(pack_optimizer(again[1]), pack_optimizer(whole[1]))
