"""The FID network in its real architecture, of random weights: the published ones are not ours to hand on."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_fakes import bars_splits
from libraries import torch_fidelity, torchmetrics
from torch import Tensor, nn

from diffstill.disk import file_sha256
from diffstill.errors import InputError
from diffstill.evaluation.features import extract, extract_all, make_extractor
from diffstill.evaluation.frechet import FeatureStats, frechet_distance
from diffstill.evaluation.inception import (
    INCEPTION_SHA256,
    InceptionExtractor,
    _import_port,
    inception_network,
)

if importlib.util.find_spec("torch_fidelity") is None:
    pytest.skip("torch-fidelity is not installed", allow_module_level=True)

CPU = torch.device("cpu")


def pictures(count: int, seed: int = 0, shape: tuple[int, int, int] = (3, 9, 13), contrast: float = 1.0) -> Tensor:
    """Random blots, so that images differ at a scale the network sees."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 127.5 + contrast * (255 * torch.rand(count, shape[0], 3, 3, generator=generator) - 127.5)
    return nn.functional.interpolate(coarse, shape[1:], mode="bilinear").round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A weight file in the form of the published one, 95 MB."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)

    class Unloaded(_import_port().FeatureExtractorInceptionV3):
        """The library builds no network without a file of all its weights."""

        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
            assert not state_dict

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Unloaded("random", ["2048"], feature_extractor_weights_path=str(path))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                # Every number of the file has to count: a port that left one out would show.
                nn.init.normal_(module.bias, 0, 0.1)
                nn.init.normal_(module.running_mean, 0, 0.1)
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
    torch.save(network.state_dict(), path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def extractor(weights: Path) -> InceptionExtractor:
    return InceptionExtractor(inception_network(weights), file_sha256(weights), CPU)


@pytest.fixture(scope="module")
def features(extractor: InceptionExtractor) -> tuple[Tensor, Tensor]:
    """Of six images and of six others."""
    return extract(extractor, pictures(6)), extract(extractor, pictures(6, seed=1, contrast=0.5))


# --- the network


def test_the_network_is_the_published_one_in_form(weights: Path, extractor: InceptionExtractor) -> None:
    state = torch.load(weights, weights_only=True)
    convolutions = [name for name in state if name.endswith("conv.weight")]
    assert len(convolutions) == 94
    assert len(state) == 94 * 6 + 2
    assert {name.rpartition(".")[2] for name in state if ".bn." in name} == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["fc.weight"].shape == (1008, 2048)
    trained = sum(t.numel() for name, t in state.items() if name.rpartition(".")[2] in ("weight", "bias"))
    # Inception v3 without its auxiliary head has 23,834,568 of 1,000 classes; TensorFlow's graph had 1,008.
    assert trained == 23_834_568 + 8 * 2049


def test_features_and_logits_are_those_of_the_library(weights: Path, extractor: InceptionExtractor) -> None:
    images = pictures(3)
    port = _import_port().FeatureExtractorInceptionV3
    theirs = port("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    wanted, wanted_logits = theirs(images)
    found, logits = extractor.read(images)
    assert torch.equal(found, wanted)
    assert torch.equal(logits, wanted_logits)
    assert (found.shape, logits.shape) == ((3, 2048), (3, 1008))
    assert (found.dtype, found.requires_grad, extractor.classifies) == (torch.float32, False, False)
    # What the Inception score is of: the last layer without its bias.
    torch.testing.assert_close(logits, found @ torch.load(weights, weights_only=True)["fc.weight"].T)
    assert float(found.std(0).mean() / found.mean()) > 0.02, "images that the network tells apart"


def test_both_come_from_one_pass_and_a_batch_is_its_images(extractor: InceptionExtractor) -> None:
    passes = []
    hook = extractor._network.register_forward_hook(lambda *_: passes.append(1))
    images = pictures(3)
    together = extractor.read(images)
    hook.remove()
    assert len(passes) == 1
    torch.testing.assert_close(extract_all(extractor, images, 2), together, rtol=1e-4, atol=1e-4)


def tf1_bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W) to (size, size) by TensorFlow 1's rule, a pixel at a time: no half pixels, the last row repeated."""
    height, width = image.shape
    out = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = math.floor(y), math.floor(x)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
            lower = image[below, left] * (1 - x + left) + image[below, right] * (x - left)
            out[i, j] = upper * (1 - y + top) + lower * (y - top)
    return out


def test_images_are_resized_by_tf1s_rule_and_scaled_about_128(extractor: InceptionExtractor) -> None:
    seen: list[Tensor] = []
    hook = extractor._network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    image = pictures(1, seed=3, shape=(3, 5, 4))
    extractor.read(image)
    hook.remove()
    assert seen[0].shape == (1, 3, 299, 299)
    for channel, given in enumerate(image[0].double().numpy()):
        assert np.abs(seen[0][0, channel].numpy() - (tf1_bilinear(given, 299) - 128) / 128).max() < 1e-5
    # Of an image of the network's own size nothing is changed but the scale, and black is -1.
    seen.clear()
    hook = extractor._network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    whole = pictures(1, shape=(3, 299, 299)) // 2
    extractor.read(whole)
    hook.remove()
    assert torch.equal(seen[0], (whole.float() - 128) / 128)


def test_grey_is_repeated_over_the_channels(extractor: InceptionExtractor) -> None:
    grey = pictures(2, shape=(1, 8, 8))
    for found, wanted in zip(extractor.read(grey), extractor.read(grey.repeat(1, 3, 1, 1)), strict=True):
        assert torch.equal(found, wanted)


# --- the distance


def test_fid_equals_torch_fidelitys(features: tuple[Tensor, Tensor]) -> None:
    one, two = (part[:, :200] for part in features)  # the library needs a minute for all of them
    formula = torch_fidelity("metric_fid")
    theirs = [formula.fid_features_to_statistics(part.double()) for part in (one, two)]
    wanted = formula.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert wanted > 0.1
    assert frechet_distance(FeatureStats.of(one), FeatureStats.of(two)) == pytest.approx(wanted, rel=1e-5)


def test_fid_equals_torchmetrics(features: tuple[Tensor, Tensor]) -> None:
    one, two = (FeatureStats.of(part[:, :200]) for part in features)
    wanted = torchmetrics("image.fid")._compute_fid(one.mean, one.covariance, two.mean, two.covariance)
    assert frechet_distance(one, two) == pytest.approx(float(wanted), rel=1e-5)


def test_logits_serve_torch_fidelitys_inception_score(extractor: InceptionExtractor) -> None:
    """By its definition: exp of the mean divergence of an image's classes from those of all images."""
    logits = extract_all(extractor, pictures(4))[1]
    assert logits is not None
    score = torch_fidelity("metric_isc").isc_features_to_metric(logits, splits=1, shuffle=False)
    classes = logits.double().softmax(1)
    divergence = (classes * (classes / classes.mean(0)).log()).sum(1).mean()
    assert score["inception_score_mean"] == pytest.approx(float(divergence.exp()), rel=1e-9)
    assert 1 <= score["inception_score_mean"] <= 4


# --- the weights


def test_only_the_published_weights_are_called_fid(extractor: InceptionExtractor, weights: Path) -> None:
    assert extractor.info.name == "FD-inception"
    assert extractor.info.sha256 == file_sha256(weights) != INCEPTION_SHA256
    assert (extractor.info.dim, extractor.info.resize, extractor.info.accuracy) == (2048, "tf1-bilinear 299", None)
    assert InceptionExtractor(nn.Identity(), INCEPTION_SHA256, CPU).info.name == "FID"


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_other_files_are_refused_before_they_are_opened(weights: Path, tmp_path: Path) -> None:
    mark, trap = tmp_path / "mark", tmp_path / "trap.pth"
    torch.save(Trap(mark), trap)
    for path in (weights, trap):
        with pytest.raises(
            InputError, match=r"^extractor: 'inception:.*' is another file \(sha256 [0-9a-f]{8}\.\.\.\)"
        ):
            make_extractor(f"inception:{path}", bars_splits(train=9))
    assert not mark.exists()
    torch.load(trap, weights_only=False)
    assert mark.exists(), "it would have shown"


# --- the library, in part


def fidelity_modules() -> set[str]:
    return {name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"}


@pytest.mark.parametrize(
    "fault", ["raise ImportError('not here')", "raise RuntimeError('operator torchvision::nms does not exist')"]
)
def test_a_torchvision_that_cannot_be_loaded_is_no_hindrance(
    fault: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("torchvision", "torch_fidelity"):
            monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(fault)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ImportError, RuntimeError)):
        importlib.import_module("torch_fidelity")
    half = fidelity_modules()
    inception_network(weights)
    # As if nobody had imported anything: what another's failed import had left is still there, and nothing more.
    assert fidelity_modules() == half
    assert "torch_fidelity" not in half
    with pytest.raises((ImportError, RuntimeError)):
        importlib.import_module("torch_fidelity")
    for name in fidelity_modules():
        del sys.modules[name]
    inception_network(weights)
    assert fidelity_modules() == set()


def test_what_was_imported_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in fidelity_modules():
        monkeypatch.delitem(sys.modules, name)
    mine = type(sys)("torch_fidelity")
    monkeypatch.setitem(sys.modules, "torch_fidelity", mine)
    assert _import_port().URL_INCEPTION_V3.endswith("weights-inception-2015-12-05-6726825d.pth")
    assert fidelity_modules() == {"torch_fidelity"}
    assert sys.modules["torch_fidelity"] is mine


def test_a_library_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Missing:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name.partition(".")[0] == "torch_fidelity":
                raise ModuleNotFoundError(f"No module named {name!r}")

    for name in fidelity_modules():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    with pytest.raises(
        InputError, match=r"^extractor: 'inception' cannot be loaded \(No module .*\); pip install --no-deps"
    ):
        inception_network(tmp_path / "any.pth")
