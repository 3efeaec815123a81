"""Batches as a function of seed and images seen: order, flips, named draws, slices of processes."""

from __future__ import annotations

import pytest
import torch
from engines import CPU
from hypothesis import given, settings
from hypothesis import strategies as st

from diffstill.checks.bench import random_images, tiny_denoiser
from diffstill.data.batches import batch_indices
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.engine.stream import BatchStream, micro_batches

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
    denoiser = tiny_denoiser((8, 8), 0)
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
        random_images(tiny_denoiser((8, 8), 0), 40),
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
