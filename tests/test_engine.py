"""The engine: batches, EMA, rates, checkpoints, faults and exact resume, with real methods on tiny U-Nets."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import resource
import signal
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from diffstill.checks.bench import BATCH, Bench, random_images, tiny_denoiser
from diffstill.data.batches import batch_indices
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.engine.arm import Arm
from diffstill.engine.compiled import compiled_fault
from diffstill.engine.ema import Ema
from diffstill.engine.log import RunLog, read_log
from diffstill.engine.loop import Progress, Trainer
from diffstill.engine.settings import TrainSettings
from diffstill.engine.state import load_latest, pack_optimizer, save_checkpoint, unpack_optimizer
from diffstill.engine.stream import BatchStream, micro_batches
from diffstill.errors import InputError, Interrupted, RunFailed
from diffstill.evaluation.guidance_fidelity import FidelityProbe
from diffstill.methods import METHODS, Batch, Losses, RoleOptimizer, TeacherOutputs
from diffstill.methods.dash import Dash

CPU = torch.device("cpu")
DASH = Bench(Dash)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def losses(folder: Path, arm: str = "arm") -> list[tuple[int, float]]:
    return [(r["images"], r["loss"]) for r in read_log(folder / "log.jsonl") if "loss" in r and r["arm"] == arm]


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


# Batches


@given(count=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 5), epochs=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_every_image_comes_once_an_epoch(count: int, batch: int, seed: int, epochs: int) -> None:
    steps = -(-count * epochs // batch)
    walked = torch.cat([batch_indices(count, seed, step * batch, batch) for step in range(steps)])
    assert len(walked) == steps * batch
    for epoch in range(epochs):
        part = walked[epoch * count : (epoch + 1) * count]
        assert part.sort().values.tolist() == list(range(count))


@given(start=st.integers(0, 500), batch=st.integers(2, 50), cut=st.integers(1, 49))
@settings(max_examples=40, deadline=None)
def test_positions_do_not_depend_on_the_batch_size(start: int, batch: int, cut: int) -> None:
    cut = min(cut, batch - 1)
    whole = batch_indices(17, 3, start, batch)
    parts = [batch_indices(17, 3, start, cut), batch_indices(17, 3, start + cut, batch - cut)]
    assert torch.equal(whole, torch.cat(parts))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(batch_indices(50, seed, 50 * epoch, 50).tolist()) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6


FIELDS = ("x0", "labels", "t", "noise", "x_t")


def stream(rank: int = 0, world: int = 1, seed: int = 0, flip: bool = True) -> BatchStream:
    denoiser = tiny_denoiser((4, 4), 0)
    data = random_images(denoiser, 40)
    return BatchStream(data, denoiser.schedule, batch_size=16, seed=seed, device=CPU, flip=flip, rank=rank, world=world)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_take_slices_of_the_same_global_batch(world: int) -> None:
    for images_seen in (0, 16, 48):
        whole = stream().batch(images_seen)
        parts = [stream(rank, world).batch(images_seen) for rank in range(world)]
        for name in FIELDS:
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
        assert torch.equal(whole.uniform("a"), torch.cat([part.uniform("a") for part in parts]))
        for part in parts:
            assert torch.equal(part.t_global, whole.t)
            assert torch.equal(part.uniform("a", whole_batch=True), whole.uniform("a", whole_batch=True))
            assert part.size == 16 // world


def test_a_batch_is_a_function_of_seed_and_images_seen_alone() -> None:
    walked = stream()
    for images_seen in (0, 16, 32):
        last = walked.batch(images_seen)
    fresh = stream().batch(32)
    assert all(torch.equal(getattr(last, name), getattr(fresh, name)) for name in FIELDS)
    assert torch.equal(last.uniform("x"), fresh.uniform("x"))
    for other in (stream().batch(16), stream(seed=1).batch(32)):
        assert not torch.equal(other.noise, fresh.noise)
        assert not torch.equal(other.t, fresh.t)
        assert not torch.equal(other.uniform("x"), fresh.uniform("x"))
    schedule = NoiseSchedule.create("cosine", 1000)
    assert torch.equal(fresh.x_t, schedule.add_noise(fresh.x0, fresh.noise, fresh.t))


def test_flipping_mirrors_about_half_of_the_images_and_nothing_else() -> None:
    plain, flipped = stream(flip=False), stream()
    mirrored = 0
    for images_seen in range(0, 160, 16):
        a, b = plain.batch(images_seen), flipped.batch(images_seen)
        assert torch.equal(a.noise, b.noise)
        for before, after in zip(a.x0, b.x0, strict=True):
            assert torch.equal(after, before) or torch.equal(after, before.flip(-1))
            mirrored += int(torch.equal(after, before.flip(-1)))
    assert 50 < mirrored < 110


def test_named_draws_are_independent_and_do_not_depend_on_the_order_of_asking() -> None:
    big = BatchStream(
        random_images(tiny_denoiser((4, 4), 0), 40),
        NoiseSchedule.create("cosine", 1000), batch_size=4096, seed=0, device=CPU,
    )  # fmt: skip
    first, second = big.batch(0), big.batch(0)
    a, b = first.uniform("a"), first.uniform("b")
    assert torch.equal(second.uniform("b"), b)
    assert torch.equal(second.uniform("a"), a)
    assert 0 <= float(a.min()) < 0.01 < 0.99 < float(a.max()) < 1
    drawn = [a, b, big.batch(4096).uniform("a"), first.noise.flatten(1)[:, 0], first.t.float()]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(5)
    assert float(correlation.abs().max()) < 5 / 4096**0.5
    assert first.uniform("a", whole_batch=True).shape == (1,)


@pytest.mark.parametrize("size", [1, 4, 16, None, 99])
def test_micro_batches_are_slices_with_their_draws(size: int | None) -> None:
    whole = stream().batch(16)
    parts = micro_batches(whole, size)
    assert len(parts) == (16 // size if size and size < 16 else 1)
    for name in FIELDS:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.uniform("a") for part in parts]), whole.uniform("a"))
    assert all(torch.equal(part.t_global, whole.t) for part in parts)


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 16 is no multiple of the 3 processes"):
        stream(0, 3)


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
        rates.append(arm.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([arm.learning_rate(8 * k) for k in range(4)])
    assert [group["weight_decay"] for group in arm.optimizer.param_groups] == [0.3, 0.0]
    method = bench.method()
    method.role_optimizers["curriculum"] = RoleOptimizer(lr_scale=10)
    scaled = Arm("arm", method, trainer.settings, bench.runtime)
    batch = bench.batch()
    assert method.teacher is not None
    scaled.backward(batch, TeacherOutputs(method.teacher, batch, method.teacher_needs), 1.0, True)
    scaled.update(8)
    assert [group["lr"] for group in scaled.optimizer.param_groups] == pytest.approx([rates[1], 10 * rates[1]])
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
    arm.backward(batch, TeacherOutputs(arm.method.teacher, batch, arm.method.teacher_needs), 1.0, True)
    curriculum = arm.method.roles["curriculum"].logits.grad.clone()
    seen: dict[str, Tensor] = {}
    real = arm.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        seen["student"] = torch.cat([p.grad.flatten() for p in arm.method.roles["student"].parameters()])
        seen["curriculum"] = arm.method.roles["curriculum"].logits.grad.clone()
        return real(*args, **kwargs)

    arm.optimizer.step = step
    arm.update(0)
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


# Checkpoints

TENSORS = {"arm": {"a/b": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}, "other": {"x": torch.zeros(2)}}
META = {"seconds": 1.25, "arms": {"arm": {"count": 3, "alarm": False, "failed": None}}, "warnings": []}


def saved(folder: Path, *steps: int) -> Path:
    for step in steps:
        save_checkpoint(folder, step, {**META, "step": step}, TENSORS)
    return folder


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") == (None, [])
    found, warnings = load_latest(saved(tmp_path, 8))
    assert found is not None
    assert warnings == []
    assert found.images_seen == 8
    assert found.meta == {**META, "step": 8}
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensors in TENSORS.items():
        assert_same(found.tensors[name], tensors)


def test_the_newest_two_are_kept_and_nothing_half_written(tmp_path: Path) -> None:
    saved(tmp_path, 8, 16, 24, 1000, 999_999_999_999)
    assert names(tmp_path) == ["000000001000", "999999999999"]
    (tmp_path / ".writing-000000002000").mkdir()
    found, _ = load_latest(tmp_path)
    assert found is not None
    assert found.images_seen == 999_999_999_999
    assert len(names(tmp_path)) == 2


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_any_file_is_seen_and_the_one_before_is_taken(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    newest = saved(folder, 8, 16) / "000000000016"
    file = newest / data.draw(st.sampled_from(names(newest)))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    file.write_bytes(content)
    found, warnings = load_latest(folder)
    assert found is not None
    if found.images_seen == 16:
        # Only white space or an escape of state.json may change without a change of what it says.
        assert file.name == "state.json"
        assert found.meta == {**META, "step": 16}
        assert warnings == []
    else:
        assert found.images_seen == 8
        assert found.meta["step"] == 8
        (warning,) = warnings
        assert warning.startswith("checkpoint 000000000016 is damaged and was passed over")
        assert names(folder) == ["000000000008", "damaged-000000000016"]
    for name, tensors in TENSORS.items():
        assert_same(found.tensors[name], tensors)


def test_no_digit_of_the_description_can_change_unseen(tmp_path: Path) -> None:
    file = saved(tmp_path, 8) / "000000000008" / "state.json"
    text = file.read_text()
    name = text.index('"sha256"')  # without its name the hash is not looked for, but nothing else is changed
    digits = [at for at, sign in enumerate(text) if sign in "0123456789" and not name <= at < name + 8]
    assert len(digits) > 100
    for at in digits:
        file.write_text(text[:at] + str(9 - int(text[at])) + text[at + 1 :])
        with pytest.raises(RunFailed, match="can be read"):
            load_latest(tmp_path)
    file.write_text(text)
    assert load_latest(tmp_path)[0] is not None


def test_damaged_checkpoints_do_not_push_good_ones_out(tmp_path: Path) -> None:
    (saved(tmp_path, 8, 16) / "000000000016" / "state.json").unlink()
    load_latest(tmp_path)
    saved(tmp_path, 12)
    assert names(tmp_path) == ["000000000008", "000000000012", "damaged-000000000016"]
    found, warnings = load_latest(tmp_path)
    assert found is not None
    assert (found.images_seen, warnings) == (12, [])


def test_only_damaged_checkpoints_are_a_failed_run_not_a_fresh_start(tmp_path: Path) -> None:
    for name in names(saved(tmp_path, 8, 16)):
        (tmp_path / name / "arm.safetensors").write_bytes(b"")
    with pytest.raises(RunFailed, match=r"no checkpoint in .* can be read .*--fresh") as caught:
        load_latest(tmp_path)
    one_line(caught.value)
    assert names(tmp_path) == ["000000000008", "000000000016"]


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("wrapped", [False, True], ids=["pickle", "torch"])
def test_a_pickle_that_poses_as_safetensors_is_refused_and_never_run(tmp_path: Path, wrapped: bool) -> None:
    proof = tmp_path / "executed"
    content = pickle.dumps(Bomb(proof))
    if wrapped:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("archive/data.pkl", content)
        content = archive.getvalue()
    folder = saved(tmp_path / "run", 8, 16)
    newest = folder / "000000000016"
    (newest / "arm.safetensors").write_bytes(content)
    # Even where someone also corrects the recorded hashes.
    state = json.loads((newest / "state.json").read_text())
    state["files"]["arm"] = hashlib.sha256(content).hexdigest()
    del state["sha256"]
    (newest / "state.json").write_text(json.dumps(state))
    found, warnings = load_latest(folder)
    assert found is not None
    assert found.images_seen == 8
    assert "damaged" in warnings[0]
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bomb(proof)))  # the bomb does work
    assert proof.exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files can grow no further than ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    first = DASH.trainer(tmp_path, steps=2)
    first.run()
    again = DASH.trainer(tmp_path, steps=4)
    with largest_file(50_000), pytest.raises(RunFailed) as caught:
        again.run()
    told = one_line(caught.value)
    assert "could not save the checkpoint" in told
    assert "last good checkpoint: 000000000016" in told
    assert "free some space" in told
    assert names(tmp_path / "checkpoints") == ["000000000016"]
    found, warnings = load_latest(tmp_path / "checkpoints")
    assert found is not None
    assert (found.images_seen, warnings) == (16, [])
    # With space again, the same command ends as if nothing had been.
    DASH.trainer(tmp_path, steps=4).run()
    found, _ = load_latest(tmp_path / "checkpoints")
    assert found is not None
    assert found.images_seen == 32


def test_a_log_that_cannot_be_written_is_a_failed_run_too(tmp_path: Path) -> None:
    with largest_file(100), pytest.raises(RunFailed, match="could not write to") as caught:
        DASH.trainer(tmp_path).run()
    assert "no checkpoint had been saved" in one_line(caught.value)


# Divergence


class Diverging(Dash):
    """A real method that breaks when ``after`` images have been seen: in its loss, or in its gradient alone."""

    name = "diverging"
    after = 24
    gradient_alone = False

    def loss(self, batch: Batch, teacher: TeacherOutputs | None) -> Losses:
        found = super().loss(batch, teacher)
        if batch.images_seen < self.after:
            return found
        if self.gradient_alone:
            # sqrt at 0 has an infinite slope, and 0 times infinity is NaN: the value is untouched.
            return Losses(found.total + (0 * found.total).sqrt(), found.parts)
        return Losses(found.total * float("nan"), found.parts)


class DivergingGradient(Diverging):
    name = "diverging-gradient"
    gradient_alone = True


@pytest.mark.parametrize("log_every", [1, 2, 100])
def test_a_loss_that_is_nan_ends_the_run_and_names_the_last_good_checkpoint(tmp_path: Path, log_every: int) -> None:
    trainer = Bench(Diverging).trainer(tmp_path, steps=8, checkpoint_every=8, log_every=log_every)
    with pytest.raises(RunFailed) as caught:
        trainer.run()
    told = one_line(caught.value)
    assert "NaN or infinite" in told
    assert f"last good checkpoint: {tmp_path / 'checkpoints' / '000000000024'}" in told
    assert "lower training.lr" in told
    found, _ = load_latest(tmp_path / "checkpoints")
    assert found is not None
    assert found.images_seen == 24
    assert all(bool(value.isfinite().all()) for value in found.tensors["arm"].values())
    assert [r["event"] for r in read_log(tmp_path / "log.jsonl") if "event" in r][-1] == "diverged"


def test_before_any_checkpoint_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="no checkpoint had been saved"):
        Bench(Diverging).trainer(tmp_path, steps=8).run()
    assert load_latest(tmp_path / "checkpoints") == (None, [])


def test_weights_that_are_nan_are_never_saved_though_the_loss_was_fine(tmp_path: Path) -> None:
    """The update of step 4 makes the weights NaN; its loss is finite, and so would be the log."""
    trainer = Bench(DivergingGradient).trainer(tmp_path, steps=8, checkpoint_every=8, log_every=100)
    with pytest.raises(RunFailed, match="000000000024"):
        trainer.run()
    found, _ = load_latest(tmp_path / "checkpoints")
    assert found is not None
    assert all(bool(value.isfinite().all()) for value in found.tensors["arm"].values())


# Several arms


def two_arms(folder: Path, other: type[Dash] = Dash, die_at: int | None = None, **settings: Any) -> Trainer:
    """``arm``, and ``short``, which stops after half of the images."""
    bench = Bench(other)
    chosen = TrainSettings(
        images=8 * BATCH, batch_size=BATCH, lr=1e-3, compile=False, **{"log_every": 1, **settings}
    )  # fmt: skip

    def told(progress: Progress) -> None:
        if die_at is not None and progress.images_seen >= die_at * BATCH:
            raise KeyboardInterrupt

    arms = [
        Arm("arm", DASH.method(0.1), chosen, DASH.runtime),
        Arm("short", bench.method(0.1), chosen, DASH.runtime, images=4 * BATCH),
    ]
    return Trainer(
        arms, DASH.stream(), chosen, DASH.runtime, folder, teacher=DASH.teacher(), on_progress=told, timed=True
    )


@pytest.mark.parametrize("killed_at", [3, 6])
def test_a_run_of_two_arms_resumes_bit_exactly(tmp_path: Path, killed_at: int) -> None:
    every = {"checkpoint_every": 16, "log_every": 3}  # half-finished averages have to survive, too
    whole = two_arms(tmp_path / "whole", **every)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        two_arms(tmp_path / "cut", die_at=killed_at, **every).run()
    left, _ = load_latest(tmp_path / "cut" / "checkpoints")
    assert left is not None
    assert left.images_seen == 16 * ((killed_at - 1) // 2)
    again = two_arms(tmp_path / "cut", **every)
    again.run()
    for a, b in zip(whole.arms, again.arms, strict=True):
        assert_same(a.tensors(), b.tensors())
        assert losses(tmp_path / "whole", a.name) == losses(tmp_path / "cut", a.name)
        assert b.seconds > 0
    assert [images for images, _ in losses(tmp_path / "cut", "short")] == [24, 48]
    assert [images for images, _ in losses(tmp_path / "cut", "arm")] == [24, 48, 64]


def test_an_arm_trains_alike_alone_and_in_company(tmp_path: Path) -> None:
    together = two_arms(tmp_path / "two")
    together.run()
    chosen = together.settings
    alone = Trainer(
        [Arm("arm", DASH.method(0.1), chosen, DASH.runtime)],
        DASH.stream(), chosen, DASH.runtime, tmp_path / "one", teacher=DASH.teacher(),
    )  # fmt: skip
    alone.run()
    assert_same(alone.arms[0].tensors(), together.arms[0].tensors())


@pytest.mark.parametrize("log_every", [1, 100])
def test_one_arm_that_diverges_does_not_stop_the_other(tmp_path: Path, log_every: int) -> None:
    class Early(Diverging):
        after = 8

    trainer = two_arms(tmp_path, Early, checkpoint_every=16, log_every=log_every)
    trainer.run()
    good, bad = trainer.arms
    assert good.failed is None
    assert bad.failed is not None
    assert trainer.warnings == [bad.failed]
    assert "short: the loss or a weight became NaN" in bad.failed
    events = [r for r in read_log(tmp_path / "log.jsonl") if r.get("event") == "diverged"]
    assert [r["arm"] for r in events] == ["short"]
    alone = two_arms(tmp_path / "alone")
    alone.run()
    for name, value in alone.arms[0].tensors().items():
        if not name.startswith("sum/"):
            assert torch.equal(value, good.tensors()[name]), name


def test_a_checkpoint_of_other_networks_is_refused_in_one_line(tmp_path: Path) -> None:
    DASH.trainer(tmp_path).run()
    other = Bench(Dash, None, student=tiny_denoiser((4, 4), 0)).trainer(tmp_path, steps=12)
    with pytest.raises(InputError, match="run: 'arm' has a checkpoint of other networks") as caught:
        other.run()
    assert "--fresh" in one_line(caught.value)


def test_a_finished_run_does_nothing(tmp_path: Path) -> None:
    first = DASH.trainer(tmp_path)
    first.run()
    log = (tmp_path / "log.jsonl").read_bytes()
    again = DASH.trainer(tmp_path)
    again.run()
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert_same(again.arms[0].tensors(), first.arms[0].tensors())


# Signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_saves_and_resumes_exactly(tmp_path: Path, signum: int, code: int) -> None:
    whole = DASH.trainer(tmp_path / "whole", dropout=0.1)
    whole.run()
    before = signal.getsignal(signum)
    cut = DASH.trainer(tmp_path / "cut", dropout=0.1)

    def told(progress: Progress) -> None:
        if progress.images_seen == 24:
            os.kill(os.getpid(), signum)

    cut.on_progress = told
    with pytest.raises(Interrupted, match="stopped by a signal at 24 images; saved") as caught:
        cut.run()
    assert caught.value.exit_code == code
    one_line(caught.value)
    assert signal.getsignal(signum) is before
    assert names(tmp_path / "cut" / "checkpoints") == ["000000000024"]
    again = DASH.trainer(tmp_path / "cut", dropout=0.1)
    again.run()
    assert_same(again.arms[0].tensors(), whole.arms[0].tensors())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    trainer = DASH.trainer(tmp_path)

    def told(progress: Progress) -> None:
        if progress.images_seen == 16:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    trainer.on_progress = told
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert load_latest(tmp_path / "checkpoints") == (None, [])


def test_a_signal_in_the_last_step_is_too_late(tmp_path: Path) -> None:
    trainer = DASH.trainer(tmp_path)
    trainer.on_progress = lambda p: os.kill(os.getpid(), signal.SIGTERM) if p.images_seen == 48 else None
    trainer.run()
    assert trainer.images_seen == 48


# The collapse alarm


def collapsed(folder: Path, gap: float, probe: Any = None, **settings: Any) -> Trainer:
    """A student whose labels all read the same row (``gap`` 0), hardly trained; watched by the real probe."""
    trainer = DASH.trainer(folder, probe_every=8, lr=1e-9, lr_min=0, weight_decay=0, **settings)
    arm = trainer.arms[0]
    teacher = arm.method.teacher
    assert teacher is not None
    if probe is None:
        for network in (arm.method.student.network, arm.ema["student"].network):
            rows = network.class_embedding.weight
            with torch.no_grad():
                rows.copy_(rows[:1] + gap * (rows - rows[:1]))
    trainer.probe = probe or FidelityProbe(teacher, DASH.data, pairs=20)
    return trainer


def test_the_alarm_fires_once_in_the_second_half_when_the_gap_is_gone(tmp_path: Path) -> None:
    trainer = collapsed(tmp_path, 0.0)
    trainer.run()
    probes = [r for r in read_log(tmp_path / "log.jsonl") if r.get("event") == "probe"]
    assert [r["images"] for r in probes] == [8, 16, 24, 32, 40, 48]
    assert all(r["ratio"] < 0.01 for r in probes)
    (line,) = trainer.warnings
    assert line == "arm: guidance has collapsed (gap ratio 0.00 < 0.5 at 24 images)"
    alarms = [r["images"] for r in read_log(tmp_path / "log.jsonl") if r.get("event") == "collapse_alarm"]
    assert alarms == [24]
    assert trainer.arms[0].alarm
    again = DASH.trainer(tmp_path, lr=1e-9, lr_min=0)
    again.run()
    assert again.arms[0].alarm
    assert again.warnings == trainer.warnings


def test_no_alarm_while_the_gap_is_alive(tmp_path: Path) -> None:
    trainer = collapsed(tmp_path, 20.0)
    trainer.run()
    probes = [r for r in read_log(tmp_path / "log.jsonl") if r.get("event") == "probe"]
    assert all(r["ratio"] > 0.5 for r in probes)
    assert trainer.warnings == []
    assert not trainer.arms[0].alarm


def test_students_without_a_dial_are_not_probed(tmp_path: Path) -> None:
    def never(student: Any) -> Mapping[str, float]:
        raise AssertionError("probed")

    trainer = Bench(METHODS["single-head"]).trainer(tmp_path, steps=2, probe_every=8)
    trainer.probe = never
    trainer.run()


# The log


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for images in (8, 16, 24):
        log.write(images=images, loss=1.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"images": 32, "lo')
    assert [r["images"] for r in read_log(tmp_path / "log.jsonl")] == [8, 16, 24]
    log.rewind(16)
    assert [r["images"] for r in read_log(tmp_path / "log.jsonl")] == [8, 16]
    assert names(tmp_path) == ["log.jsonl"]
    log.write(images=24, loss=float(2))
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 3
    RunLog(None).write(images=1)
    RunLog(None).rewind(0)


def test_means_are_over_the_steps_since_the_last_record(tmp_path: Path) -> None:
    every, third = DASH.trainer(tmp_path / "1"), DASH.trainer(tmp_path / "3", log_every=3)
    every.run()
    third.run()
    one = [value for _, value in losses(tmp_path / "1")]
    three = losses(tmp_path / "3")
    assert [images for images, _ in three] == [24, 48]
    assert [value for _, value in three] == pytest.approx([sum(one[:3]) / 3, sum(one[3:]) / 3], rel=1e-6)


# Devices and the compiler


class Moved(nn.Module):
    """Remembers where it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Any] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.sent.append(args[0])
        return super().to(*args, **kwargs)


def test_what_a_method_holds_frozen_goes_to_the_device(tmp_path: Path) -> None:
    method = DASH.method()
    method.frozen["helper"] = helper = Moved()
    Arm("arm", method, TrainSettings(images=8, batch_size=8), DASH.runtime)
    assert helper.sent == [DASH.runtime.device]
    assert set(method.frozen) == {"curriculum", "helper"}


def backend(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A compiler that changes every output of the graph."""

    def compile_graph(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(change(out) for out in graph(*args))

    return compile_graph


def refuse(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no code for this")


@pytest.mark.parametrize(
    ("compiler", "wanted"),
    [
        (backend(lambda g: g), None),
        (backend(lambda g: g * 1.01), None),
        (backend(torch.zeros_like), "its gradient is off by 100%"),
        (backend(lambda g: 1.2 * g), "its gradient is off by 20%"),
        (refuse, "it failed with BackendCompilerFailed"),
    ],
    ids=["right", "rounding", "zeros", "off", "fails"],
)
def test_a_compiler_that_gives_other_gradients_is_found_out(compiler: Any, wanted: str | None) -> None:
    torch._dynamo.reset()
    x = torch.linspace(1, 2, 5)
    compiled = torch.compile(lambda x: x * 3, backend=compiler)
    assert compiled_fault(lambda: compiled(x)) == wanted


@pytest.mark.slow
def test_an_arm_whose_compiled_form_is_wrong_trains_eagerly_and_says_so(tmp_path: Path) -> None:
    """Whatever this machine's compiler makes of a U-Net, the losses are eager's."""
    plain, compiled = (DASH.trainer(tmp_path / str(way), steps=3, compile=way) for way in (False, True))
    plain.run()
    compiled.run()
    a, b = losses(tmp_path / "False"), losses(tmp_path / "True")
    assert [v for _, v in a] == pytest.approx([v for _, v in b], rel=1e-3)
    assert all("trained without torch.compile" in line for line in compiled.warnings)
    assert compiled.arms[0].method.student.network.training
