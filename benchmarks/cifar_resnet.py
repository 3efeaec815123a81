"""Turns the weights of a CIFAR-10 ResNet into a TorchScript file that images can be measured in.

    python benchmarks/cifar_resnet.py WEIGHTS.npz OUT/ResNet56.pt
    diffstill eval MODEL extractor=torchscript:OUT/ResNet56.pt

The distance is then called FD-ResNet56, after the file: it is no FID. The network is that of He et al. (1512.03385,
section 4.2): stages of 16, 32 and 64 channels, and shortcuts without parameters (option A) that take every second pixel
and fill up with channels of zeros. The npz has an array a parameter, named as PyTorch names them (``conv1.weight``,
``layer1.0.bn2.running_var``, ``linear.bias``); how many blocks there are follows from the names.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64)
CLASSES = 10
MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, in RGB: what the published weights were trained with."""


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.stride, self.zeros = (1 if inside == outside else 2), (outside - inside) // 2
        self.conv1 = nn.Conv2d(inside, outside, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = F.pad(x[:, :, :: self.stride, :: self.stride], [0, 0, 0, 0, self.zeros, self.zeros])
        return F.relu(hidden + short)


class CifarResNet(nn.Module):
    """(B, 3, 32, 32) uint8 RGB to features (B, 64), the mean over space of the last stage, and logits (B, 10).

    Args:
        blocks: of each of the three stages; the network has ``6 blocks + 2`` layers.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks)
        self.linear = nn.Linear(WIDTHS[-1], CLASSES)
        self.mean = nn.Buffer(torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.sd = nn.Buffer(torch.tensor(SD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (images.float() / 255 - self.mean) / self.sd
        x = F.relu(self.bn1(self.conv1(x)))
        features = self.layer3(self.layer2(self.layer1(x))).mean([2, 3])
        return features, self.linear(features)


def _stage(inside: int, outside: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*[Block(inside if i == 0 else outside, outside) for i in range(blocks)])


def load_network(path: Path) -> CifarResNet:
    """The network in eval mode, with every array of the npz in its place and none missing.

    Raises:
        ValueError: arrays that are not those of such a network.
    """
    with np.load(path) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    numbers = [int(found[1]) for name in state if (found := re.match(r"layer1\.(\d+)\.", name))]
    network = CifarResNet(max(numbers, default=0) + 1)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} is no CIFAR ResNet: {' '.join(str(error).split())[:300]}") from None
    return network.eval().requires_grad_(False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", type=Path, help="an npz of arrays by PyTorch's names")
    parser.add_argument("out", type=Path, help="the TorchScript file; the distance has its name")
    asked = parser.parse_args(arguments)
    try:
        network = load_network(asked.weights)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    # Frozen, the file has no parts of torch in it, which are written in an order that changes from run to run: its hash
    # is what tells that two distances are of one network. Nothing is folded, so no number moves.
    torch.jit.freeze(torch.jit.script(network), optimize_numerics=False).save(str(asked.out))
    print(f"wrote {asked.out}: {6 * len(network.layer1) + 2} layers, {WIDTHS[-1]} features, {CLASSES} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
