"""A network of others, brought over as TorchScript, measures as it does at home."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import cifar_resnet
import numpy as np
import pytest
import torch
from eval_fakes import noise_data
from torch import Tensor
from torch.nn import functional as F

from diffstill.data.sources import DataSpec, DataSplits, load_data
from diffstill.evaluation.features import extract_all, make_extractor

SHARED = Path(__file__).parents[2] / "shared"
"""Third-party weights and images of the workplace; no part of the product, and absent elsewhere."""


def random_weights(path: Path, blocks: int, seed: int = 0) -> dict[str, Tensor]:
    """An npz of every array of a network of random weights, running statistics among them."""
    generator = torch.Generator().manual_seed(seed)
    state = cifar_resnet.CifarResNet(blocks).state_dict()
    state = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    drawn = {name: torch.randn(t.shape, generator=generator) / max(1, t[0].numel()) ** 0.5 for name, t in state.items()}
    drawn = {name: 0.5 + t.abs() if "bn" in name and "mean" not in name else t for name, t in drawn.items()}
    np.savez(path, **{name: t.numpy() for name, t in drawn.items()})
    return drawn


def by_hand(state: dict[str, Tensor], images: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The network of the paper once more, in functions of float64."""
    state = {name: t.double() for name, t in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (
            state[f"{name}.{part}"].view(-1, 1, 1) for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    mean, sd = (torch.tensor(v).double().view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = norm(F.conv2d((images.double() / 255 - mean) / sd, state["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            hidden = norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").relu()
            hidden = norm(F.conv2d(hidden, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                zeros = torch.zeros(len(x), x.shape[1] // 2, *hidden.shape[2:], dtype=x.dtype)
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = (x + hidden).relu()
    features = x.mean((2, 3))
    return features, features @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("blocks", [1, 3])
def test_weights_of_an_npz_are_measured_in(blocks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = tmp_path / "w.npz", tmp_path / "made" / "ResNet.pt"
    state = random_weights(weights, blocks)
    assert cifar_resnet.main([str(weights), str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}: {6 * blocks + 2} layers, 64 features, 10 classes\n"
    images = noise_data(5, shape=(3, 32, 32))
    extractor = make_extractor(f"torchscript:{out}", DataSplits(images, images, images))
    assert (extractor.info.name, extractor.info.dim) == ("FD-ResNet", 64)
    assert extractor.info.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    for found, wanted in zip(
        extract_all(extractor, images.images, 2), by_hand(state, images.images, blocks), strict=True
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert not extractor.classifies, "ten logits, three classes"


def test_the_same_weights_give_the_same_file(tmp_path: Path) -> None:
    """Its hash stands in every protocol: made anew elsewhere, the network has to be known as the same."""
    weights, outs = tmp_path / "w.npz", [tmp_path / seed / "net.pt" for seed in "123"]
    random_weights(weights, 1)
    runs = [
        subprocess.Popen(
            [sys.executable, cifar_resnet.__file__, str(weights), str(out)],
            env={**os.environ, "PYTHONHASHSEED": out.parent.name},
        )
        for out in outs
    ]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    assert len({hashlib.sha256(out.read_bytes()).hexdigest() for out in outs}) == 1


@pytest.mark.parametrize("how", ["missing", "unknown", "shape", "none"])
def test_weights_of_another_network_are_refused(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, out = tmp_path / "w.npz", tmp_path / "net.pt"
    arrays = {name: t.numpy() for name, t in random_weights(weights, 2).items()}
    if how == "missing":
        del arrays["layer2.1.bn1.running_var"]
    elif how == "unknown":
        arrays["layer4.0.conv1.weight"] = arrays["conv1.weight"]
    elif how == "shape":
        arrays["linear.weight"] = arrays["linear.weight"][:9]
    np.savez(weights, **arrays)
    if how == "none":
        weights.unlink()
    assert cifar_resnet.main([str(weights), str(out)]) == 2
    told = capsys.readouterr().err
    assert str(weights) in told
    assert told.count("\n") == 1
    assert not out.exists()


@pytest.mark.skipif(not (SHARED / "weights").is_dir(), reason="the weights are not here")
@pytest.mark.parametrize(("layers", "published"), [(20, 0.9173), (56, 0.9339)])
def test_the_published_accuracy_is_reached(layers: int, published: float, tmp_path: Path) -> None:
    out = tmp_path / f"ResNet{layers}.pt"
    assert cifar_resnet.main([str(SHARED / "weights" / f"cifar10_resnet{layers}.npz"), str(out)]) == 0
    data = load_data(DataSpec(source=f"npz:{SHARED / 'data' / 'cifar10'}", limit=1000))
    extractor = make_extractor(f"torchscript:{out}", data)
    assert (extractor.info.name, extractor.classifies) == (f"FD-ResNet{layers}", True)
    assert len(data.test) == 1000
    assert extractor.info.accuracy == pytest.approx(published, abs=3 * (published * (1 - published) / 1000) ** 0.5)
