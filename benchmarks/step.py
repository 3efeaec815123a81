"""A training step written out by hand. With every switch off it is the straightforward loop that most scripts hold;
each switch does one part of the same work in a faster way."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from problem import ANCHOR, LABEL_DROPOUT, NUM_CLASSES, Problem
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from diffstill.data.dataset import ImageData
from diffstill.engine.compiled import compiled_fault
from diffstill.methods.base import Batch

Mode = Literal["default", "reduce-overhead"]
"""Of ``torch.compile``; ``reduce-overhead`` is with CUDA graphs."""


@dataclass(frozen=True)
class Switches:
    """How the parts of a step are done."""

    batched: bool = False
    """Both branches in one forward, of the teacher and of the student."""
    foreach_ema: bool = False
    fused: bool = False
    resident: bool = False
    """Images on the device as uint8, in place of PNG files that the host decodes each step."""
    no_sync: bool = False
    """Loss parts are summed on the device, in place of ``.item()`` each step."""
    autotune: bool = False
    """TF32 and cuDNN's autotuning (CUDA)."""
    teacher_bf16: bool = False
    bf16: bool = False
    """Autocast of the trained network; weights, losses and optimizer stay float32."""
    channels_last: bool = False
    teacher_compile: Mode | None = None
    compile: Mode | None = None
    """Of the trained network; used only where its gradients equal eager's."""
    reuse: int = 1
    """Updates for each output of the teacher. More than 1 changes what is learned."""


@dataclass(frozen=True)
class Draw:
    """What one step sees."""

    x_t: Tensor
    labels: Tensor
    t: Tensor
    noise: Tensor
    dropped: Tensor
    """(B,) bool: samples trained on the null label (``train`` only)."""

    @classmethod
    def of(cls, batch: Batch) -> Draw:
        """The library's batch, for a comparison on equal terms."""
        return cls(batch.x_t, batch.labels, batch.t, batch.noise, batch.uniform("label_dropout") < LABEL_DROPOUT)


Branches = tuple[Tensor, Tensor]


class Step:
    """A step by hand; calling it does one. ``ema`` and ``logged`` are what a script would save and print."""

    def __init__(self, problem: Problem, on: Switches) -> None:
        self.problem, self.on, self.device = problem, on, problem.device
        self.settings = problem.settings()
        self.network = self._placed(problem.trained()).train()
        self.teacher = None if problem.work == "train" else self._placed(problem.teacher()).eval().requires_grad_(False)
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        s = self.settings
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=s.lr,
            betas=s.betas,
            weight_decay=s.weight_decay,
            fused=on.fused,
            foreach=False if not on.fused else None,
        )
        self.alphas = problem.schedule.alphas.float().to(self.device)
        self.sigmas = problem.schedule.sigmas.float().to(self.device)
        self.weights = problem.curriculum().weights().to(self.device)
        self.images = _resident(problem) if on.resident else _decoded(problem)
        self._graphs = "reduce-overhead" in (on.teacher_compile, on.compile)
        self.updates = 0
        self.logged: dict[str, float] = {}
        self.sums: dict[str, Tensor] = {}

    def compile(self, batch: Batch) -> str | None:
        """Compiles what the switches say; separate, so that a check may run before it.

        Returns:
            What is wrong with the compiled gradients at ``batch``, None where nothing is.
        """
        if self.on.teacher_compile or self.on.compile:
            torch.compiler.reset()
        if self.teacher is not None and self.on.teacher_compile:
            self.teacher.compile(mode=self.on.teacher_compile)
        if self.on.compile is None:
            return None
        self.network.compile(mode=self.on.compile)
        drawn = Draw.of(batch)
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.network.modules()):
            self.network.eval()  # so that two passes can be compared
        fault = compiled_fault(lambda: self.gradients(drawn))
        self.network.train()
        return fault

    def gradients(self, drawn: Draw) -> Tensor:
        """All gradients of one batch as a vector; no weight is changed."""
        self.losses(drawn, self.teach(drawn))["loss"].backward()
        found = torch.cat([p.grad.flatten().clone() for p in self.network.parameters() if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def prepare(self) -> None:
        """Global switches, set before every turn since the library and other rungs set them otherwise."""
        set_autotune(self.on.autotune)

    def __call__(self) -> None:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        if self.updates % self.on.reuse == 0:
            self.drawn = self.draw()
            self.taught = self.teach(self.drawn)
        self.learn(self.drawn, self.taught)

    def draw(self) -> Draw:
        x0, labels = next(self.images)
        if self.on.channels_last:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        t = torch.randint(self.problem.schedule.T, labels.shape, device=self.device)
        noise = torch.randn_like(x0)
        x_t = self.alphas[t].view(-1, 1, 1, 1) * x0 + self.sigmas[t].view(-1, 1, 1, 1) * noise
        dropped = torch.rand(labels.shape, device=self.device) < LABEL_DROPOUT
        return Draw(x_t, labels, t, noise, dropped)

    @torch.no_grad()
    def teach(self, drawn: Draw) -> Branches | None:
        """The frozen teacher's two outputs."""
        if self.teacher is None:
            return None
        cond, null = self._branches(self.teacher, drawn, self.on.teacher_bf16)
        # CUDA graphs write every replay's outputs to the same memory.
        return (cond.clone(), null.clone()) if self._graphs else (cond, null)

    def losses(self, drawn: Draw, taught: Branches | None) -> dict[str, Tensor]:
        """``loss`` and its parts, scalars with grad."""
        weight = self.weights[drawn.t]

        def term(a: Tensor, b: Tensor) -> Tensor:
            return (weight * (a - b).square().flatten(1).mean(1)).mean()

        if taught is None:
            labels = torch.where(drawn.dropped, NUM_CLASSES, drawn.labels)
            return {"loss": term(self._forward(self.network, drawn.x_t, drawn.t, labels, self.on.bf16), drawn.noise)}
        cond, null = self._branches(self.network, drawn, self.on.bf16)
        parts = {
            "imitation": term(cond, taught[0]),
            "null": term(null, taught[1]),
            "anchor": term(cond, drawn.noise),
        }
        return {"loss": parts["imitation"] + parts["null"] + ANCHOR * parts["anchor"], **parts}

    def learn(self, drawn: Draw, taught: Branches | None) -> None:
        """Losses, gradients, clipping, optimizer, EMA, log."""
        parts = self.losses(drawn, taught)
        self.optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        assert self.settings.grad_clip is not None
        parts["grad_norm"] = nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self._update_ema()
        for name, value in parts.items():
            if self.on.no_sync:
                self.sums[name] = self.sums[name] + value.detach() if name in self.sums else value.detach()
            else:
                self.logged[name] = value.item()

    @torch.no_grad()
    def _update_ema(self) -> None:
        self.updates += 1
        rate = min(self.settings.ema_decay, (1 + self.updates) / (10 + self.updates))
        if self.on.foreach_ema:
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), 1 - rate)
            return
        for mine, theirs in zip(self.ema.parameters(), self.network.parameters(), strict=True):
            mine.mul_(rate).add_(theirs, alpha=1 - rate)

    def loss_on(self, batch: Batch) -> float:
        """The loss at the library's batch, network dropout off, nothing changed."""
        drawn = Draw.of(batch)
        self.network.eval()
        with torch.no_grad():
            loss = float(self.losses(drawn, self.teach(drawn))["loss"])
        self.network.train()
        return loss

    def _branches(self, network: nn.Module, drawn: Draw, bf16: bool) -> Branches:
        x_t, t, labels, null = drawn.x_t, drawn.t, drawn.labels, torch.full_like(drawn.labels, NUM_CLASSES)
        if not self.on.batched:
            return self._forward(network, x_t, t, labels, bf16), self._forward(network, x_t, t, null, bf16)
        both = self._forward(network, torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, null]), bf16)
        cond, unconditional = both.chunk(2)
        return cond, unconditional

    def _forward(self, network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor, bf16: bool) -> Tensor:
        context: AbstractContextManager[object] = nullcontext()
        if bf16:
            context = torch.autocast(self.device.type, torch.bfloat16)
        with context:
            predicted: Tensor = network(x_t, t, class_labels=labels).sample
        return predicted.float()

    def _placed(self, network: nn.Module) -> nn.Module:
        layout: dict[str, Any] = {"memory_format": torch.channels_last} if self.on.channels_last else {}
        return network.to(**layout)


def set_autotune(on: bool) -> None:
    """TF32 and cuDNN's autotuning, or torch's defaults (TF32 in convolutions alone, no autotuning)."""
    torch.backends.cudnn.benchmark = on
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = True


@dataclass(frozen=True)
class Flops:
    """Arithmetic of one step, 2 x multiply-accumulate: convolutions, linear layers and attention, as is usual."""

    trained: float
    """Forward and backward of the network that is trained, both branches where there are two."""
    teacher: float = 0.0
    """Both forwards of the frozen teacher."""

    @property
    def step(self) -> float:
        return self.trained + self.teacher

    def reusing(self, reuse: int) -> Flops:
        """Mean of the steps where each output of the teacher serves ``reuse`` of them."""
        return Flops(self.trained, self.teacher / reuse)

    def dtype(self, *, bf16: bool, teacher_bf16: bool) -> Literal["bf16", "fp32"]:
        """In which more than half of the arithmetic is done."""
        return "bf16" if self.trained * bf16 + self.teacher * teacher_bf16 > self.step / 2 else "fp32"


def step_flops(problem: Problem) -> Flops:
    """Counts the straightforward float32 step. Every faster way of doing it does the same work, so that one count
    serves all rungs (but for a teacher that is asked less often).

    Counted on the CPU with one image, since all that is counted is proportional to the batch; attention by its plain
    formula, so that no fused kernel hides it. The count is then the same on every device.
    """
    one = Step(replace(problem, batch=1, images=1, device=torch.device("cpu")), Switches())
    drawn = one.draw()
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as teacher:
            taught = one.teach(drawn)
        with FlopCounterMode(display=False) as trained:
            one.losses(drawn, taught)["loss"].backward()
    counts = [float(counter.get_total_flops()) * problem.batch for counter in (trained, teacher)]
    return Flops(*counts)


class PngFiles(Dataset[tuple[Tensor, int]]):
    """PNG bytes in memory, decoded when an item is asked for: a folder of images without the disk."""

    def __init__(self, data: ImageData) -> None:
        self.files = [_png(image.permute(1, 2, 0).numpy()) for image in data.images]
        self.labels = data.labels.tolist()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(io.BytesIO(self.files[index])) as image:
            pixels = np.array(image)
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1, self.labels[index]


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, format="PNG")
    return file.getvalue()


def _decoded(problem: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches by an ordinary DataLoader in the training process, epoch after epoch."""
    loader = DataLoader(PngFiles(problem.data), batch_size=problem.batch, shuffle=True, drop_last=True)
    while True:
        for images, labels in loader:
            yield images.to(problem.device), labels.to(problem.device)


def _resident(problem: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = problem.data.images.to(problem.device), problem.data.labels.to(problem.device)
    while True:
        order = torch.randperm(len(labels), device=problem.device)
        for start in range(0, len(order) - problem.batch + 1, problem.batch):
            index = order[start : start + problem.batch]
            yield images[index].float() / 127.5 - 1, labels[index]
