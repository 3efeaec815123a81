from __future__ import annotations

import pytest
import torch
from eval_fakes import SCHEDULE, tiny_unet
from torch import Tensor, nn

from diffstill.diffusion.guidance import TAG, Constant, Interval
from diffstill.diffusion.sampling import count_nfe
from diffstill.evaluation.cost import (
    _latency,
    count_flops,
    count_parameters,
    measure_cost,
    predict_cost,
    saved_bytes,
    size_mb,
)
from diffstill.models.adapters import unet2d
from diffstill.models.denoiser import Denoiser


class TwoConvolutions(nn.Module):
    """Hand-countable: 3x3 convolutions 1 -> 4 -> 1 on 8x8 with a ReLU between; counts the images it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 1, 3, 1, 1)
        self.register_buffer("table", torch.zeros(10, dtype=torch.float64))
        self.images = 0

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.images += len(x_t)
        return self.second(torch.relu(self.first(x_t)))


def small() -> Denoiser:
    return Denoiser(TwoConvolutions(), SCHEDULE, 3, (1, 8, 8))


def test_flops_parameters_and_bytes_of_a_hand_counted_network() -> None:
    denoiser = small()
    assert count_flops(denoiser) == 2 * (64 * 9 * 4 + 64 * 9 * 4)
    assert count_parameters(denoiser.network) == 36 + 4 + 36 + 1
    assert size_mb(denoiser.network) == pytest.approx((77 * 4 + 10 * 8) / 1e6)


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(3, 3)
    assert count_parameters(nn.Sequential(layer, layer)) == 12
    assert size_mb(nn.Sequential(layer, layer)) == pytest.approx(48 / 1e6)


@pytest.mark.parametrize(
    ("widths", "layers", "parameters", "gflops"),
    [((128, 256, 256, 256), 2, 35_751_939, 12.44), ((64, 128, 128, 128), 1, 6_082_627, 2.15)],
)
def test_the_published_cifar_networks(widths: tuple[int, ...], layers: int, parameters: int, gflops: float) -> None:
    """dash.md 2.4; attention is 0.3 GFLOP of the teacher's."""
    network = unet2d.build(
        sample_shape=(3, 32, 32),
        num_classes=10,
        block_out_channels=widths,
        layers_per_block=layers,
        attention_levels=(1,),
    )
    assert count_parameters(network) == parameters
    assert count_flops(Denoiser(network, SCHEDULE, 10, (3, 32, 32))) / 1e9 == pytest.approx(gflops, abs=0.005)


@pytest.mark.parametrize(
    ("guided", "guidance", "nfe"),
    [
        (True, None, 20),
        (True, Constant(1.0), 10),
        (True, TAG(), 20),
        (True, Interval(2.0, 0.0, 0.5), 15),
        (False, None, 10),
    ],
)
def test_network_evaluations_are_the_ones_that_are_made(guided: bool, guidance: object, nfe: int) -> None:
    denoiser = small()
    found = measure_cost(denoiser, steps=10, guided=guided, guidance=guidance, batches=(3,), runs=2)
    assert found.nfe == nfe
    assert found.flops_image == nfe * found.flops_forward
    # One image for the FLOP count, three images for a warm-up of three steps and for two runs.
    warmup = count_nfe(guidance or Constant(2.0), SCHEDULE.T, 3) if guided else 3
    assert denoiser.network.images == 1 + 3 * (warmup + 2 * nfe)


def test_latency_is_of_whole_trajectories_by_batch() -> None:
    found = measure_cost(tiny_unet(), steps=3, batches=(1, 8), runs=4)
    assert [(part.batch, part.runs) for part in found.latency] == [(1, 4), (8, 4)]
    for part in found.latency:
        assert 0 < part.p10_s <= part.median_s <= part.p90_s
        assert part.images_per_s == pytest.approx(part.batch / part.median_s)
        assert part.peak_memory_mb is None  # the CPU does not tell
    assert found.device.startswith("cpu (")


def test_peak_memory_is_that_of_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else lies on the device meanwhile, the arms of an arena among it, is taken off."""
    denoiser, others = small(), 5_000_000
    own = int(size_mb(denoiser.network) * 1e6)
    monkeypatch.setattr(Denoiser, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: others + own)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: others + own + 700_000)
    found = _latency(denoiser, lambda steps: torch.zeros(1), 2, 1, 2, 1.0)
    assert found.peak_memory_mb == pytest.approx((own + 700_000) / 1e6)


def test_a_spent_time_budget_still_makes_two_runs() -> None:
    found = measure_cost(small(), steps=2, batches=(1,), runs=50, budget_s=0.0)
    assert found.latency[0].runs == 2


def test_measuring_changes_nothing() -> None:
    denoiser = tiny_unet()
    denoiser.network.train()
    before = {name: value.clone() for name, value in denoiser.network.state_dict().items()}
    measure_cost(denoiser, steps=2, batches=(1,), runs=2)
    predict_cost(denoiser)
    assert denoiser.network.training
    assert all(p.grad is None for p in denoiser.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in denoiser.network.state_dict().items())


def test_saved_activations_by_hand() -> None:
    """The first convolution keeps its input, the second (and the ReLU, the same tensor) theirs."""
    assert saved_bytes(small(), 2) == 2 * (64 + 4 * 64) * 4


def test_the_forecast_adds_up() -> None:
    student, teacher = small(), tiny_unet()
    forecast = predict_cost(student, teacher, batch_size=16, student_passes=2, teacher_passes=1)
    flops = count_flops(student)
    assert (forecast.parameters, forecast.teacher_parameters) == (77, count_parameters(teacher.network))
    assert forecast.flops_forward == flops
    assert forecast.flops_per_image == 3 * 2 * flops + count_flops(teacher)
    activations = 16 * 2 * (64 + 4 * 64) * 4 / 1e6
    assert forecast.memory_mb == pytest.approx(
        size_mb(student.network) + 77 * 4 * 4 / 1e6 + size_mb(teacher.network) + activations
    )
    assert forecast.seconds_per_1000_images == pytest.approx(1000 * forecast.flops_per_image / forecast.flops_per_s)
    alone = predict_cost(student, batch_size=16, student_passes=1)
    assert alone.flops_per_image == 3 * flops
    assert alone.teacher_parameters == 0


def test_the_forecast_counts_every_network_once_and_only_what_is_trained_four_times() -> None:
    student, critic, still = small(), small().network, small().network.requires_grad_(False)
    alone, size = predict_cost(student, batch_size=16).memory_mb, size_mb(still)
    assert predict_cost(student, batch_size=16, beside=[critic]).memory_mb == pytest.approx(
        alone + size + 77 * 4 * 3 / 1e6
    )
    both = predict_cost(student, batch_size=16, beside=[critic, still, still]).memory_mb
    assert both == pytest.approx(alone + 2 * size + 77 * 4 * 3 / 1e6)
    student.network.first.requires_grad_(False)  # the base of a LoRA: no gradient, no moments, no copy of its own
    fixed = sum(p.numel() for p in student.network.first.parameters())
    assert predict_cost(student, batch_size=16).memory_mb < alone - fixed * 4 * 4 / 1e6 + 1e-9
