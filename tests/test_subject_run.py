"""A text-to-image run by the command line: latents made once, exact resume, and a folder that stock diffusers samples
as the training did."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import Decoder, Encoder
from processes import Nursery, until
from tiny_sd import IMAGES, LOW_RANK, prepared, recipe_of, shaken

from diffstill.cli import main
from diffstill.data.batches import stream_seed
from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.sampling import image_noise
from diffstill.errors import InputError
from diffstill.evaluation.sampling import draw
from diffstill.jobs.finish import GRID_SEED
from diffstill.jobs.subject import Prepared, _doubts, pictures
from diffstill.models.lineage import Ancestor, DataRef, Lineage
from diffstill.models.pipeline_folder import LORA, load_subject, save_pipeline
from diffstill.models.text_to_image import load_pipeline
from diffstill.recipe import DistillRecipe, resolved
from diffstill.report.receipt import Receipt

UNET = "unet/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Run:
    """A finished run by the command line."""

    path: Path
    coded: Counter[str]
    """How many images its autoencoder has seen, by half."""

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def lora(self) -> bool:
        return (self.model / LORA).is_file()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Images that go through an autoencoder's halves."""
    seen: Counter[str] = Counter()

    def told(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, (Encoder, Decoder)):
            seen[type(module).__name__] += len(args[0])

    handle = nn.modules.module.register_module_forward_hook(told)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def runs(tiny_subject: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One of whole networks, one of a LoRA."""
    made = {}
    for name, more in (("whole", []), ("lora", [LOW_RANK])):
        out = tmp_path_factory.mktemp(name) / "run"
        with counted() as seen:
            assert main(["distill", *tiny_subject, *more, "--out", str(out), "--quiet"]) == 0
        made[name] = Run(out, seen)
    return made


@pytest.fixture(params=["whole", "lora"])
def run(request: pytest.FixtureRequest, runs: dict[str, Run]) -> Run:
    return runs[request.param]


def test_latents_are_made_once_and_the_autoencoder_is_let_go(tiny_subject: list[str], run: Run) -> None:
    with counted() as seen:
        made, _ = prepared(tiny_subject)
    assert seen == {"Encoder": IMAGES}
    assert made.parts.vae is None
    assert made.parts.text_encoder is None
    assert run.coded == {"Encoder": IMAGES, "Decoder": 3 * 20}, "12 steps, and samples of three models"


# The run.


def test_a_run_leaves_a_folder_a_receipt_and_a_report(run: Run, tiny_pipeline: Path) -> None:
    receipt = Receipt.load(run.path)
    student = receipt.models["student"]
    assert list(receipt.models) == ["teacher", "student", "teacher@1-renoise"]
    assert [receipt.models[r].cost.nfe for r in receipt.models] == [4, 1, 1]  # type: ignore[union-attr]
    assert student.subject is not None
    assert student.subject.samples == 20
    assert student.subject.nearest.value > 0  # type: ignore[operator]
    assert student.subject.real_spread == pytest.approx(receipt.models["teacher"].subject.real_spread)  # type: ignore[union-attr]
    assert receipt.training[0].steps == 12
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "The subject" in page
    assert "to the nearest image" in page
    assert all((run.path / m.images["grid"]).is_file() for m in receipt.models.values())
    lineage = Lineage.model_validate_json((run.model / "lineage.json").read_text())
    assert lineage.weights_sha256 == student.sha256 == receipt.lineage[-1].weights_sha256
    assert lineage.teacher is not None
    same = (run.model / UNET).read_bytes() == (tiny_pipeline / UNET).read_bytes()
    assert same == run.lora, "a LoRA leaves the base as it was, to the byte"
    for part in ("vae", "text_encoder"):
        name = next((tiny_pipeline / part).glob("*.safetensors")).name
        assert (run.model / part / name).read_bytes() == (tiny_pipeline / part / name).read_bytes()
    assert "a prt dog" in (run.model / "README.md").read_text(encoding="utf-8")
    assert main(["report", str(run.path)]) == 0


def test_a_source_teacher_that_is_shown_the_subjects_prompt_is_warned_of(tiny_subject: list[str]) -> None:
    for source, warned in (("a prt dog", True), ("a dog", False)):
        doubts = _doubts(recipe_of(tiny_subject, f"prompts.source={source}"))
        assert bool(doubts) == warned
        assert all("was shown the subject's own prompt ('a prt dog')" in line for line in doubts)


def test_a_finished_run_is_not_done_again(
    run: Run, tiny_subject: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = [LOW_RANK] if run.lora else []
    assert main(["distill", *tiny_subject, *more, "--out", str(run.path), "--quiet"]) == 0
    assert "all done already" in capsys.readouterr().out
    assert main(["distill", *tiny_subject, *more, "prompts.target=a zzz dog", "--out", str(run.path), "--quiet"]) == 2
    assert "prompts.target: a prt dog -> a zzz dog" in capsys.readouterr().err


def test_the_checkpoints_of_a_lora_hold_no_base(run: Run) -> None:
    names = [name for name in last_checkpoint(run.path) if name.startswith(("role/", "ema/"))]
    based = [n for n in names if ".lora_" not in n and "table" not in n and not n.startswith("role/heads/")]
    assert bool(based) != run.lora


def last_checkpoint(out: Path) -> dict[str, Tensor]:
    return load_file(out / "checkpoints" / f"{12:012d}" / "subject-sd15.safetensors")


def saved(made: Prepared, recipe: DistillRecipe, folder: Path) -> Path:
    lineage = Lineage.new("dog", "unidad", recipe=resolved(recipe), data=DataRef(name="dog6", fingerprint="0"),
                          teacher=Ancestor(name="sd", method="", weights_sha256="0"))  # fmt: skip
    save_pipeline(made.method.student, made.parts.folder, folder, lineage=lineage)
    return folder


@pytest.mark.parametrize("more", [(), (LOW_RANK, "lora.alpha=3"), ("method.steps=1",)], ids=["whole", "lora", "K1"])
def test_stock_diffusers_draws_to_the_bit_what_training_unrolls(
    tiny_subject: list[str], more: tuple[str, ...], tmp_path: Path
) -> None:
    options = ("method.steps=3", "training.batch_size=2", *more)
    made, batch = prepared(tiny_subject, *options)
    method = shaken(made)
    with torch.no_grad():
        unrolled = method.unroll(batch)
    folder = saved(made, recipe_of(tiny_subject, *options), tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    if lora := (folder / LORA).is_file():
        pipe.load_lora_weights(folder)
    assert lora == (LOW_RANK in more)
    K = len(pipe.scheduler)
    # The chain's fresh noises, one generator each in training and one for all in the pipeline.
    noises = iter([batch.normal(f"chain {step}") for step in range(1, K)])
    step = pipe.scheduler.step

    def told(output: Tensor, t: Any, sample: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        place = K - len(pipe.scheduler.timesteps) + list(pipe.scheduler.timesteps).index(t)
        seed = stream_seed(0, f"chain {place + 1}", 0)
        return step(output, t, sample, generator=torch.Generator().manual_seed(seed), return_dict=return_dict)

    pipe.scheduler.step = told
    drawn = pipe(
        "a prt dog", num_images_per_prompt=2, num_inference_steps=K, guidance_scale=1,
        latents=batch.normal("chain 0"), output_type="latent",
    ).images  # fmt: skip
    assert len(list(noises)) == K - 1
    assert torch.equal(drawn, unrolled)
    student, _ = load_subject(folder)
    assert student.time_index is not None
    assert torch.equal(student.time_index, method.student.time_index)
    assert student.schedule.same_as(method.student.schedule)


STRANGER = """
import sys
sys.modules["diffstill"] = None
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
out, found = sys.argv[1], {}
for name, folder in zip(("whole", "lora"), sys.argv[2:]):
    pipe = StableDiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    if name == "lora":
        pipe.load_lora_weights(folder)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    told = {"num_inference_steps": 1, "guidance_scale": 1, "num_images_per_prompt": 2, "latents": noise}
    found[f"{name}/latents"] = pipe("a prt dog", output_type="latent", **told).images.contiguous()
    found[f"{name}/images"] = torch.from_numpy(pipe("a prt dog", output_type="np", **told).images).contiguous()
save_file(found, out)
"""


def test_the_folders_run_where_diffstill_is_not(runs: dict[str, Run], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", STRANGER, str(out), str(runs["whole"].model), str(runs["lora"].model)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(out)
    for name, run in runs.items():
        student, parts = load_subject(run.model)
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7))
        with student.evaluating():
            drawn = draw(student, torch.zeros(2, dtype=torch.int64), Constant(1.0), lambda noise=noise: noise)
        assert torch.equal(found[f"{name}/latents"], drawn)
        images = (parts.decode(drawn).clamp(-1, 1) + 1) / 2
        assert torch.allclose(found[f"{name}/images"].permute(0, 3, 1, 2), images, atol=1e-4)


def test_the_teachers_pictures_are_stock_diffusers(tiny_subject: list[str], tiny_pipeline: Path) -> None:
    """Guidance, DDIM and decoding of the teacher that the student is shown beside; nothing is clipped in latents."""
    made, _ = prepared(tiny_subject)
    drawn = pictures(made.teacher, load_pipeline(str(tiny_pipeline)), 3, steps=4, scale=7.5, batch_size=2)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    betas = made.teacher.schedule.betas.tolist()
    pipe.scheduler = DDIMScheduler(trained_betas=betas, clip_sample=False, timestep_spacing="leading")
    for i, ours in enumerate(drawn):
        noise = image_noise((4, 16, 16), GRID_SEED, i, 1)
        theirs = pipe("a dog", num_inference_steps=4, guidance_scale=7.5, latents=noise, output_type="np").images[0]
        theirs = torch.from_numpy(theirs).permute(2, 0, 1) * 255
        assert (theirs - ours).abs().max() <= 1


def test_weights_that_the_lineage_does_not_know_are_refused(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.model, tmp_path / "model")
    file = tmp_path / "model" / (LORA if run.lora else UNET)
    state = load_file(file)
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        meta = json.loads(opened.read(size)).get("__metadata__")
    name = next(iter(state))
    state[name] = state[name] + 0.01
    save_file(state, file, metadata=meta)
    with pytest.raises(InputError, match=r"other weights than its lineage.json says"):
        load_subject(tmp_path / "model")


def test_a_killed_run_goes_on_to_the_same_weights(
    tiny_subject: list[str], runs: dict[str, Run], tmp_path: Path
) -> None:
    """kill -9 in the middle, the same command again: networks, optimizers and latents as if nothing had been."""
    out, errors = tmp_path / "run", tmp_path / "errors"
    command = ["distill", *tiny_subject, LOW_RANK, "--out", str(out), "--quiet"]
    nursery = Nursery()
    try:
        child = nursery.start(command, errors)
        until(lambda: len(list((out / "checkpoints").glob("0*/state.json"))) >= 2)
        os.kill(child, signal.SIGKILL)
        assert nursery.wait() == -signal.SIGKILL, errors.read_text()[-2000:]
    finally:
        nursery.close()
    assert not (out / "model").exists(), "the kill came too late to prove anything"
    assert main(command) == 0
    one, two = last_checkpoint(runs["lora"].path), last_checkpoint(out)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    adapters = [load_file(model / LORA) for model in (runs["lora"].model, out / "model")]  # in no fixed order
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
