"""The one training loop: any number of arms over one stream of batches and one frozen teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..data.batches import stream_seed
from ..errors import Interrupted, RunFailed
from ..evaluation.guidance_fidelity import COLLAPSE
from ..methods.base import Batch, TeacherOutputs
from ..models.adapters import unwrap
from ..models.denoiser import Denoiser
from .arm import Arm, union_of_needs
from .compiled import compiled_fault
from .log import RunLog
from .runtime import Runtime, StopRequest
from .settings import TrainSettings
from .state import latest_name, load_latest, save_checkpoint
from .stream import BatchStream, micro_batches

REUSE_WINDOW = 8
"""Batches that come round again together under ``teacher_reuse``."""
STOP_EVERY = 8
"""Steps between agreements of several processes on a signal or a due checkpoint."""


class Probe(Protocol):
    """Guidance fidelity on a few fixed validation pairs: ``ratio``, ``cosine``, ``gap_mse``..."""

    def __call__(self, student: Denoiser) -> Mapping[str, float]: ...


@dataclass
class Progress:
    """What a progress bar shows."""

    images_seen: int
    total: int
    images_per_s: float
    values: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains ``arms`` until each has seen its images; resumes by itself from ``run_dir/checkpoints``.

    Args:
        probe: called on each guided arm's EMA student; a gap ratio under 0.5 in the second half of its training raises
            the collapse alarm (a logged warning, ``arm.alarm``).
        timed: measure every arm's own seconds (one synchronisation an arm and step; an arena does, a plain run not).
    """

    def __init__(
        self,
        arms: list[Arm],
        stream: BatchStream,
        settings: TrainSettings,
        runtime: Runtime,
        run_dir: Path,
        *,
        teacher: Denoiser | None = None,
        probe: Probe | None = None,
        timed: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.arms, self.stream, self.settings, self.runtime = arms, stream, settings, runtime
        self.run_dir, self.probe, self.timed = run_dir, probe, timed
        self.on_progress = on_progress
        self.folder = run_dir / "checkpoints"
        self.log = RunLog(run_dir / "log.jsonl" if runtime.is_main else None)
        self.total = max(arm.images for arm in arms)
        self.images_seen = 0
        self.seconds = 0.0
        self.warnings: list[str] = []
        self._cache: dict[int, list[tuple[Batch, TeacherOutputs | None]]] = {}
        stream.channels_last(runtime.channels_last(settings.channels_last))
        self._started: dict[str, float] | None = None
        self._teacher_unproven = teacher is not None and self._compiles_teacher()
        if self._teacher_unproven or any(arm.compiled for arm in arms):
            # What an earlier stage compiled would count against the limit of recompilations, past which torch runs
            # eager without an error.
            torch.compiler.reset()
        self.teacher = None if teacher is None else self._training_view(teacher)

    def _training_view(self, teacher: Denoiser) -> Denoiser:
        """The frozen teacher in training precision, compiled where that is on; the one given stays as it is."""
        self.runtime.place(teacher.freeze().network, self.runtime.channels_last(self.settings.channels_last))
        view = teacher.with_network(teacher.network)
        if self._teacher_unproven:
            view = teacher.with_network(torch.compile(teacher.network, dynamic=False))  # type: ignore[arg-type]
        view.autocast_dtype = self.runtime.dtype(self.settings.teacher_precision, frozen=True)
        return view

    def _compiles_teacher(self) -> bool:
        wants = union_of_needs(self.arms)
        compiles = self.runtime.compiles(self.settings.compile, self.settings.steps, frozen=True)
        return compiles and bool(wants & {"cond", "null"}) and "features" not in wants

    def _prove_teacher(self, view: Denoiser) -> Denoiser:
        """Goes back to the eager teacher where the compiled one has other outputs."""
        self._teacher_unproven = False
        wants = union_of_needs(self.arms)
        first = micro_batches(self.stream.batch(self.images_seen), self.settings.micro_batch)[0]

        def outputs() -> torch.Tensor:
            taught = TeacherOutputs(view, first, wants)
            return torch.stack([getattr(taught, branch) for branch in ("cond", "null") if branch in wants])

        fault = compiled_fault(outputs, "output")
        if not self.runtime.any(fault is not None):
            return view
        self.warnings.append(f"the teacher runs without torch.compile: {fault or 'it failed elsewhere'}")
        return view.with_network(unwrap(view.network))

    def run(self) -> None:
        """The whole training.

        Raises:
            RunFailed: NaN or infinite loss, or a checkpoint that cannot be written.
            Interrupted: SIGINT or SIGTERM, after the step was finished and saved.
        """
        self._resume()
        if self.on_progress:
            self.on_progress(Progress(self.images_seen, self.total, 0.0))
        if self.images_seen >= self.total:
            return
        with StopRequest().listening() as stop:
            try:
                self._loop(stop)
            except OSError as error:
                raise RunFailed(f"the run could not write to {self.run_dir}: {error}; {self._last_good()}") from error

    def _loop(self, stop: StopRequest) -> None:
        s = self.settings
        began = saved_at = logged_at = time.monotonic()
        logged_images, seconds_before = self.images_seen, self.seconds
        probe_every = s.probe_every or max(s.batch_size, self.total // 10)
        while self.images_seen < self.total:
            self.step()
            step = self.images_seen // s.batch_size
            now = time.monotonic()
            self.seconds = seconds_before + now - began
            done = self.images_seen >= self.total
            if step % s.log_every == 0 or done:
                rate = (self.images_seen - logged_images) / max(now - logged_at, 1e-9)
                logged_at, logged_images = now, self.images_seen
                self._log_point(rate)
            if self.probe and (_crossed(self.images_seen, s.batch_size, probe_every) or done):
                self._probe()
            due = bool(s.checkpoint_every and _crossed(self.images_seen, s.batch_size, s.checkpoint_every))
            if self.runtime.world == 1 or step % STOP_EVERY == 0 or done:
                due |= self.runtime.any(now - saved_at > s.checkpoint_minutes * 60)
                stopping = self.runtime.any(bool(stop))
            else:
                stopping = False
            if due or stopping or done:
                self.save()
                saved_at = time.monotonic()
            if done:  # also a signal in the last step, or while it was saved
                stopping = self.runtime.any(bool(stop))
            if stopping:
                signum = stop.signum or 15
                raise Interrupted(
                    signum, f"stopped by a signal at {self.images_seen} images; saved; run the same command to go on"
                )

    def step(self) -> None:
        """One global batch: every active arm's forward, backward and update."""
        active = [arm for arm in self.arms if arm.failed is None and self.images_seen < arm.images]
        if not active:
            self.images_seen = self.total
            return
        if self._teacher_unproven and self.teacher is not None:
            self.teacher = self._prove_teacher(self.teacher)
        parts, before = self._parts(active), {arm.name: arm.seconds for arm in active}
        for _, teacher in parts:
            if teacher is not None and self.timed:
                self._compute_timed(teacher, active)
        for arm in active:
            clock = self._tick()
            self._step(arm, parts)
            arm.seconds += self._tick() - clock
            if self.timed:  # as if it had been alone
                arm.seconds += sum(teacher.owed(arm.name) for _, teacher in parts if teacher is not None)
            self.warnings += [line for line in arm.warnings if line not in self.warnings]
        if self.timed:
            self._leave_out_start(active, before)
        self.images_seen += self.settings.batch_size

    def _step(self, arm: Arm, parts: list[tuple[Batch, TeacherOutputs | None]]) -> None:
        """One arm's phases over the step's micro-batches."""
        total, seed = sum(part.size for part, _ in parts), self.stream.seed
        for part, _ in parts:
            part.memo.clear()
        for phase in arm.due(self.images_seen):
            which = () if len(arm.phases) == 1 else (phase.name,)
            for number, (part, teacher) in enumerate(parts):
                # Network dropout is the one draw that torch keeps globally; every arm gets the same stream.
                torch.manual_seed(stream_seed(seed, "dropout", self.images_seen, number, self.runtime.rank, *which))
                arm.backward(phase, part, teacher, part.size / total, number == len(parts) - 1)
            arm.update(phase, self.images_seen)

    def _parts(self, active: list[Arm]) -> list[tuple[Batch, TeacherOutputs | None]]:
        """The step's micro-batches and teacher outputs. With ``teacher_reuse`` r, windows of batches come r times
        and the teacher is asked only the first time: a pure function of images_seen either way."""
        shown, window = self._shown(self.images_seen)
        if shown not in self._cache or self.settings.teacher_reuse == 1:
            wants = union_of_needs(active)
            teacher = self.teacher if wants else None
            made = [
                (part, None if teacher is None else TeacherOutputs(teacher, part, wants, self._tick))
                for part in micro_batches(self.stream.batch(shown), self.settings.micro_batch)
            ]
            self._cache = {key: value for key, value in self._cache.items() if key in window}
            self._cache[shown] = made
        return self._cache[shown]

    def _shown(self, images_seen: int) -> tuple[int, range]:
        """Which position of the stream the step at ``images_seen`` shows, and the positions of its window."""
        size, reuse = self.settings.batch_size, self.settings.teacher_reuse
        if reuse == 1:
            return images_seen, range(images_seen, images_seen + 1)
        step = images_seen // size
        first = step // (REUSE_WINDOW * reuse) * REUSE_WINDOW * size
        return first + step % REUSE_WINDOW * size, range(first, first + REUSE_WINDOW * size)

    def _compute_timed(self, outputs: TeacherOutputs, active: list[Arm]) -> None:
        if outputs.computed:
            return
        clock = self._tick()
        outputs.compute()
        spent = self._tick() - clock
        branches = max(1, len(union_of_needs(active) & {"cond", "null"}))
        for arm in active:
            # What the arm would have paid alone: its own number of teacher branches.
            arm.seconds += spent * len(arm.method.teacher_needs & {"cond", "null"}) / branches

    def _leave_out_start(self, active: list[Arm], before: dict[str, float]) -> None:
        """A process's first step, which allocates and tunes for all arms, counts as long as its second does."""
        spent = {arm.name: arm.seconds - before[arm.name] for arm in active}
        if self._started is None:
            self._started = spent
            return
        for arm in active:
            arm.seconds -= max(0.0, self._started.get(arm.name, 0.0) - spent[arm.name])
        self._started = {}

    def _tick(self) -> float:
        if self.timed:
            self.runtime.synchronize()
        return time.monotonic()

    def _log_point(self, rate: float) -> None:
        step = self.images_seen // self.settings.batch_size
        shown: dict[str, float] = {}
        for arm in self.arms:
            means = arm.take_means()
            if not means or arm.failed:
                continue
            if not all(math.isfinite(v) for k, v in means.items() if not k.endswith("grad_norm")):
                self._diverged(arm)
                continue
            if (fault := arm.method.fault(means)) is not None:
                self._diverged(arm, fault)
                continue
            self.log.write(
                images=self.images_seen,
                step=step,
                arm=arm.name,
                lr=arm.learning_rate(self.images_seen),
                **_plain(means),
            )
            shown[arm.name] = means["loss"]
        self.log.write(images=self.images_seen, step=step, event="rate", images_per_s=rate, seconds=self.seconds)
        if self.on_progress:
            self.on_progress(Progress(self.images_seen, self.total, rate, shown))

    def _diverged(self, arm: Arm, fault: str = "the loss or a weight became NaN or infinite") -> None:
        reason = f"{arm.name}: {fault} before {self.images_seen} images"
        self.log.write(images=self.images_seen, arm=arm.name, event="diverged")
        if len(self.arms) == 1:
            raise RunFailed(f"{reason}; {self._last_good()}; try a lower training.lr or training.precision=fp32")
        arm.failed = reason
        self.warnings.append(reason)

    def _last_good(self) -> str:
        name = latest_name(self.folder)
        return f"last good checkpoint: {self.folder / name}" if name else "no checkpoint had been saved"

    def _probe(self) -> None:
        assert self.probe is not None
        for arm in self.arms:
            if arm.failed or not arm.method.guided:
                continue
            values = dict(self.probe(arm.student))
            self.log.write(images=self.images_seen, arm=arm.name, event="probe", **_plain(values))
            if values["ratio"] < COLLAPSE and 2 * self.images_seen >= arm.images and not arm.alarm:
                arm.alarm = True
                line = (
                    f"{arm.name}: guidance has collapsed (gap ratio {values['ratio']:.2f} < {COLLAPSE:g} "
                    f"at {self.images_seen} images)"
                )
                self.warnings.append(line)
                self.log.write(images=self.images_seen, arm=arm.name, event="collapse_alarm", message=line)

    def save(self) -> None:
        """A checkpoint of all arms; refused while a loss or weight is not finite, or the method finds a fault, so those
        on disk are always good."""
        for arm in self.arms:
            if arm.failed is None and not arm.finite():
                self._diverged(arm)
            if arm.failed is None and (fault := arm.fault()) is not None:
                self._diverged(arm, fault)
            arm.share_sums()
        if self.runtime.is_main:
            meta: dict[str, Any] = {
                "arms": {arm.name: arm.meta() for arm in self.arms},
                "seconds": self.seconds,
                "warnings": self.warnings,
            }
            save_checkpoint(self.folder, self.images_seen, meta, {arm.name: arm.tensors() for arm in self.arms})
        self.runtime.barrier()

    def _resume(self) -> None:
        checkpoint, notes = load_latest(self.folder, clean=self.runtime.is_main)
        self.warnings += notes
        if checkpoint is None:
            self.log.rewind(-1)
            return
        for arm in self.arms:
            arm.load(checkpoint.tensors[arm.name], checkpoint.meta["arms"][arm.name])
        self.images_seen, self.seconds = checkpoint.images_seen, checkpoint.meta["seconds"]
        self.warnings = checkpoint.meta["warnings"] + notes
        self.log.rewind(self.images_seen)


def _crossed(images_seen: int, batch: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in the batch just finished."""
    return images_seen // every > (images_seen - batch) // every


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: (value if math.isfinite(value) else None) for key, value in values.items()}
