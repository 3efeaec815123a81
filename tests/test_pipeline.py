"""The pipeline that travels: without diffstill it draws diffstill's own samples; its arguments are checked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffstill.data.dataset import to_uint8
from diffstill.diffusion.guidance import parse_guidance
from diffstill.diffusion.sampling import ddim_sample, image_noise, usual_steps
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.models.adapters import dit, unet2d
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import save_model
from diffstill.models.lineage import Lineage
from diffstill.pipelines import travelling_source
from diffstill.pipelines.pipeline import ClassConditionalPipeline

LABELS = [0, 1, 2, 2, 1]
SEED = 11
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "conditional": {"guidance_scale": 1.0},
    "strong": {"guidance_scale": 3.5},
    "tag": {"guidance_schedule": "tag:1,4,5"},
    "interval": {"guidance_schedule": "interval:3,0.2,0.8"},
    "paper": {"guidance_scale": 2.0, "clip": "paper"},
    "unclipped": {"guidance_scale": 2.0, "clip": "none"},
    "fewer": {"guidance_scale": 2.0, "num_inference_steps": 7},
}
GUIDANCE = {"default": "1.5", "conditional": "1", "strong": "3.5", "tag": "tag", "interval": "interval:3,0.2,0.8"}
CLIP: dict[str, Any] = {"paper": "paper", "unclipped": "none"}
STEPS = 10


def network(channels: int = 1, seed: int = 0) -> torch.nn.Module:
    """Untrained, but with branches far apart."""
    torch.manual_seed(seed)
    made = unet2d.build(
        sample_shape=(channels, 8, 8),
        num_classes=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_levels=[1],
        norm_num_groups=4,
    )
    made.class_embedding.weight.data *= 3
    return made.eval()


def denoiser(channels: int = 1, schedule: str = "cosine", kind: Any = "epsilon", seed: int = 0) -> Denoiser:
    return Denoiser(network(channels, seed), NoiseSchedule.create(schedule), 3, (channels, 8, 8), kind)


def transformer() -> Denoiser:
    torch.manual_seed(3)
    made = dit.build(sample_shape=(3, 8, 8), num_classes=3, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    for parameter in made.parameters():  # adaLN-zero starts as a constant
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return Denoiser(made.eval(), NoiseSchedule.create("linear"), 3, (3, 8, 8))


MODELS: dict[str, Any] = {
    "grey": denoiser,
    "colour": lambda: denoiser(3, "linear", "v_prediction", seed=1),
    "x0": lambda: denoiser(1, "cosine", "sample", seed=2),
    "dit": transformer,
}


def own_samples(model: Denoiser, run: str) -> Tensor:
    """diffstill's sampler on the same noise, (B, C, H, W)."""
    noise = image_noise(model.sample_shape, SEED, 0, len(LABELS))
    labels = torch.tensor(LABELS)
    with torch.no_grad():
        return ddim_sample(
            lambda x, t, s: model.guided(x, t, labels, s),
            noise,
            model.schedule,
            parse_guidance(GUIDANCE.get(run, "2")),
            steps=RUNS[run].get("num_inference_steps", STEPS),
            prediction_type=model.prediction_type,
            clip=CLIP.get(run, "recompute"),
        )


# ------------------------------------------------------------------------------- in an environment without diffstill

STRANGER = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffstill":
            raise ImportError("diffstill is not here")
sys.meta_path.insert(0, Blocker())
try:
    import diffstill
    raise SystemExit("diffstill could be imported")
except ImportError:
    pass
import numpy as np, torch
from diffusers import DiffusionPipeline
root, runs, models, labels, seed, steps = json.loads(sys.argv[1])
def generators():
    return [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(len(labels))]
pipes = {name: DiffusionPipeline.from_pretrained(f"{root}/{name}", trust_remote_code=True) for name in models}
out = {}
for name, pipe in pipes.items():
    pipe.set_progress_bar_config(disable=True)
    for run, options in runs.items():
        options = {"num_inference_steps": steps, **options}
        out[f"{name}/{run}"] = pipe(class_labels=labels, generator=generators(), output_type="np", **options).images
other = DiffusionPipeline.from_pretrained(f"{root}/other", trust_remote_code=True)
again = DiffusionPipeline.from_pretrained(f"{root}/grey", trust_remote_code=True)
for name, pipe in (("other", other), ("again", again)):
    out[name] = pipe(labels, 3.5, generators(), steps, "np").images
np.savez(f"{root}/out.npz", **out)
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What plain diffusers draws from folders that diffstill saved, in a process where diffstill cannot be imported."""
    root = tmp_path_factory.mktemp("stranger")
    for name, make in MODELS.items():
        lineage = Lineage.new(name, "supervised")
        save_model(make(), root / name, lineage=lineage, class_names=["a", "b", "c"], default_guidance="1.5")
    # The same model with another formula in its pipeline.py, as if written by another version of diffstill.
    shutil.copytree(root / "grey", root / "other")
    text = (root / "other" / "pipeline.py").read_text()
    assert text.count("return null + scale * (cond - null)") == 1
    (root / "other" / "pipeline.py").write_text(text.replace("return null + scale * (cond - null)", "return cond"))
    arguments = json.dumps([str(root), RUNS, list(MODELS), LABELS, SEED, STEPS])
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, arguments],
        env={**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(root / "out.npz", allow_pickle=False) as found:
        return dict(found)


@pytest.mark.parametrize("run", list(RUNS))
@pytest.mark.parametrize("name", list(MODELS))
def test_plain_diffusers_draws_the_same_pixels(stranger: dict[str, np.ndarray], name: str, run: str) -> None:
    ours = own_samples(MODELS[name](), run)
    theirs = torch.from_numpy(stranger[f"{name}/{run}"]).permute(0, 3, 1, 2)
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    # Two float32 tables of alpha, one multiplied up in float64: the trajectories agree to rounding.
    torch.testing.assert_close(theirs, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5 if name != "x0" else 1e-4)
    levels = (to_uint8(ours).int() - (theirs * 255).round().int()).abs()
    assert int(levels.max()) <= 1
    assert float((levels > 0).float().mean()) < 1e-3 or int((levels > 0).sum()) <= 2


def test_two_folders_in_one_process_keep_their_own_code(stranger: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(stranger["other"], stranger["grey/conditional"], atol=1e-5)
    np.testing.assert_array_equal(stranger["again"], stranger["grey/strong"])


def test_what_travels_is_self_contained() -> None:
    text = travelling_source("1.2.3")
    assert "from ." not in text
    assert "import diffstill" not in text
    assert "diffstill 1.2.3" in text.splitlines()[0]
    assert text.count("scale * (cond - null)") == 1
    found: dict[str, Any] = {"__name__": "pipeline"}
    exec(compile(text, "pipeline.py", "exec", dont_inherit=True), found)
    assert str(found["parse_guidance"]("tag")) == "tag:1,4,5"


# ------------------------------------------------------------------------------------------------------- in process


def pipeline(model: Denoiser | None = None, **options: Any) -> Any:
    model = model or denoiser()
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=model.schedule.T,
        trained_betas=model.schedule.betas.tolist(),
        prediction_type=model.prediction_type,
    )
    made = ClassConditionalPipeline(scheduler, unet=model.network, **options)
    made.set_progress_bar_config(disable=True)
    return made


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def test_images_come_in_the_form_that_was_asked_for() -> None:
    grey, colour = pipeline(), pipeline(denoiser(3))
    images = grey([0, 2], generator=generators(2), num_inference_steps=2).images
    assert [(image.mode, image.size) for image in images] == [("L", (8, 8))] * 2
    assert colour(1, num_inference_steps=2).images[0].mode == "RGB"
    forms = {
        form: grey([0, 2], generator=generators(2), num_inference_steps=2, output_type=form, return_dict=False)[0]
        for form in ("np", "pt", "latent")
    }
    assert forms["np"].shape == (2, 8, 8, 1)
    assert forms["pt"].shape == forms["latent"].shape == (2, 1, 8, 8)
    np.testing.assert_array_equal(np.asarray(images[1]), (forms["np"][1, ..., 0] * 255).round().astype(np.uint8))
    np.testing.assert_array_equal(forms["pt"].numpy().transpose(0, 2, 3, 1), forms["np"])
    torch.testing.assert_close((forms["latent"] / 2 + 0.5).clamp(0, 1), forms["pt"], rtol=0, atol=0)


def test_with_one_generator_an_image_it_does_not_depend_on_its_batch() -> None:
    pipe, labels = pipeline(), [2, 0, 1, 1]
    together = pipe(labels, generator=generators(4), num_inference_steps=5, output_type="np").images
    alone = [
        pipe(label, generator=[generator], num_inference_steps=5, output_type="np").images[0]
        for label, generator in zip(labels, generators(4), strict=True)
    ]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


def test_labels_may_be_names_numbers_or_tensors() -> None:
    pipe = pipeline(id2label={"0": "zero", "1": "one", "2": "two"})
    assert pipe.label_ids("two") == pipe.label_ids(torch.tensor(2)) == pipe.label_ids(2) == [2]
    assert pipe.label_ids(["two", 0]) == pipe.label_ids(torch.tensor([2, 0])) == [2, 0]


@pytest.mark.parametrize(
    ("scale", "evaluations"),
    [({"guidance_scale": 1}, 1), ({"guidance_scale": 2}, 2), ({"guidance_schedule": "interval:3,0,0.4"}, 1.4)],
)
def test_the_null_pass_runs_only_where_it_counts(scale: dict[str, Any], evaluations: float) -> None:
    pipe = pipeline()
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    pipe([0, 1, 2], num_inference_steps=10, **scale)
    handle.remove()
    assert len(rows) == 10  # one batched forward a step
    assert sum(rows) == pytest.approx(3 * 10 * evaluations)


def test_the_default_guidance_is_the_models_own() -> None:
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw(default: str, **asked: Any) -> Tensor:
        pipe = pipeline(default_guidance=default)
        return pipe([0, 1], latents=noise, num_inference_steps=5, output_type="pt", **asked).images

    assert torch.equal(draw("tag:1,4,5"), draw("2", guidance_schedule="tag"))
    assert torch.equal(draw("tag:1,4,5", guidance_scale=3), draw("3"))
    assert not torch.equal(draw("tag:1,4,5"), draw("3"))


def test_a_model_without_a_null_branch_takes_one_pass_and_refuses_a_scale() -> None:
    pipe = pipeline(guided=False, default_guidance="1")
    noise = torch.randn(1, 1, 8, 8)
    unguided = pipe(0, latents=noise, num_inference_steps=3, output_type="pt").images
    assert torch.equal(unguided, pipeline()(0, 1.0, latents=noise, num_inference_steps=3, output_type="pt").images)
    assert torch.equal(unguided, pipe(0, 1.0, latents=noise, num_inference_steps=3, output_type="pt").images)
    with pytest.raises(ValueError, match=r"^guidance 2 cannot act: this model has no live null branch"):
        pipe(0, 2)


@pytest.mark.parametrize("T", [8, 50, 64, 96, 100, 128, 190, 1000])
def test_the_usual_number_of_steps_is_diffstills(T: int) -> None:
    """What travels has no import of ours; a model of 96 steps would otherwise begin in the middle."""
    model = Denoiser(network(), NoiseSchedule.create("cosine", T), 3, (1, 8, 8))
    scheduler, _ = pipeline(model)._prepared_scheduler(None, "recompute", None)
    assert len(scheduler.timesteps) == usual_steps(T)


def test_a_callback_sees_every_step_and_may_change_the_latents() -> None:
    seen: list[int] = []

    def blank(pipe: Any, step: int, t: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(int(t))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else {}

    images = pipeline()(0, num_inference_steps=4, output_type="latent", callback_on_step_end=blank).images
    assert seen == [750, 500, 250, 0]
    assert float(images.abs().max()) == 0


@pytest.fixture(scope="module")
def flow_end() -> Tensor:
    """Where the probability flow of the colour model ends, by diffstill's own sampler with many steps."""
    model, labels = MODELS["colour"](), torch.tensor([0, 2])
    with torch.no_grad():
        return ddim_sample(
            lambda x, t, s: model.guided(x, t, labels, s),
            image_noise((3, 8, 8), 5, 0, 2),
            model.schedule,
            parse_guidance(1.5),
            steps=250,
            prediction_type="v_prediction",
            clip="none",
        )


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        ("DPMSolverMultistepScheduler", 20),
        ("EulerDiscreteScheduler", 50),
        ("HeunDiscreteScheduler", 20),
        ("UniPCMultistepScheduler", 20),
    ],
)
def test_other_solvers_end_where_ddim_ends(flow_end: Tensor, scheduler: str, steps: int) -> None:
    pipe = pipeline(MODELS["colour"]())
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    noise = image_noise((3, 8, 8), 5, 0, 2)
    found = pipe([0, 2], 1.5, None, steps, "latent", clip="none", latents=noise).images
    assert flow_end.std() > 0.5
    assert float((found - flow_end).abs().mean()) < 0.04


def test_stochastic_samplers_follow_the_generators() -> None:
    pipe = pipeline(denoiser(3, "linear", "v_prediction", seed=1))
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    first, second = (pipe([0, 2], 1.0, generators(2), 5, "np").images for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(pipe([0], 1.0, generators(1), 5, "np").images[0], first[0], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 3}, "class_labels: 3 is out of range; this model has classes 0..2"),
        ({"class_labels": [0, -1]}, "class_labels: -1 is out of range; this model has classes 0..2"),
        ({"class_labels": [0.5]}, "class_labels: 0.5 is out of range; this model has classes 0..2"),
        ({"class_labels": []}, "class_labels is empty; give one label for each image"),
        ({"class_labels": "cat"}, "class_labels: no class is called 'cat'; the names are a, b, c"),
        ({"generator": []}, "generator: 0 generators for 2 images; give one, or one an image"),
        ({"latents": torch.zeros(1, 1, 8, 8)}, "latents (1, 1, 8, 8) do not fit; 2 labels need (2, 1, 8, 8)"),
        ({"num_inference_steps": 0}, "num_inference_steps 0 must lie in 1..1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps 1001 must lie in 1..1000"),
        ({"clip": "sometimes"}, "clip 'sometimes' is not known; use recompute, paper or none"),
        ({"output_type": "jpg"}, "output_type 'jpg' is not known; use pil, np, pt or latent"),
        ({"guidance_scale": 2, "guidance_schedule": "tag"}, "give guidance_scale or guidance_schedule, not both"),
        (
            {"guidance_schedule": "tug:1"},
            "guidance 'tug:1' is not understood; use a number such as 2, tag, tag:1,4,5 or interval:3,0.2,0.8",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], message: str) -> None:
    pipe = pipeline(id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(ValueError) as caught:
        pipe(**{"class_labels": [0, 1], "num_inference_steps": 2, **arguments})
    assert str(caught.value) == message


def test_a_pipeline_needs_exactly_one_network() -> None:
    with pytest.raises(ValueError, match="exactly one of unet and transformer"):
        ClassConditionalPipeline(diffusers.DDIMScheduler())
