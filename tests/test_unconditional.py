"""Models of one class: no class table, one pass a step, no guidance; trained, saved, loaded, measured, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffstill.cli import main
from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.prediction import target
from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.engine.stream import BatchStream
from diffstill.errors import InputError
from diffstill.evaluation.sampling import sample_images
from diffstill.jobs.opened import data_of
from diffstill.methods import METHODS, Setting
from diffstill.models.adapters import FAMILIES
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import load_model, save_model
from diffstill.models.lineage import Lineage
from diffstill.models.students import inherit, student_for_ratio
from diffstill.pipelines.pipeline import ClassConditionalPipeline
from diffstill.report.receipt import Receipt

SHAPE = (1, 8, 8)
SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_levels": [1],
    "norm_num_groups": 4,
}
SETTINGS = [
    "data.unlabelled=true",
    "data.limit=60",
    "training.images=64",
    "training.batch_size=16",
    "training.warmup_images=0",
    "evaluation.samples=20",
    "evaluation.steps=3",
    "evaluation.pairs=20",
    "evaluation.latency_batches=[1]",
]
TRAIN = [*SETTINGS, "network.block_out_channels=[8, 16]", "network.norm_num_groups=4"]


def network(family: str = "unet2d", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return FAMILIES[family].build(sample_shape=SHAPE, num_classes=1, **{**SMALL, **options}).eval()


def learned_variance(seed: int = 1) -> diffusers.UNet2DModel:
    """A network as guided-diffusion's: twice the channels out, the second half a variance."""
    torch.manual_seed(seed)
    return diffusers.UNet2DModel.from_config({**network().config, "out_channels": 2}).eval()


def denoiser(made: Any = None) -> Denoiser:
    return Denoiser(made if made is not None else network(), NoiseSchedule.create("cosine"), 1, SHAPE)


def inputs(count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    return torch.randn(count, *SHAPE), torch.tensor([10, 500, 990])[:count], torch.zeros(count, dtype=torch.int64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unconditional") / "run"
    assert main(["train", "digits-teacher", *TRAIN, "--out", str(out), "--quiet"]) == 0
    return out


# --- the network


@pytest.mark.parametrize("family", ["unet2d", "unet2d_condition"])
def test_one_class_makes_an_unconditional_network(family: str) -> None:
    made = network(family)
    assert made.config.num_class_embeds is None
    assert not [name for name, _ in made.named_parameters() if "class" in name]
    model = denoiser(made)
    assert model.unconditional
    x, t, labels = inputs()
    with torch.no_grad():
        plain = model(x, t, labels)
        cond, null = model.branches(x, t, labels)
        torch.testing.assert_close(model.guided(x, t, labels, 3.0), plain)
    torch.testing.assert_close(cond, plain)
    torch.testing.assert_close(null, plain)


def test_a_transformer_keeps_its_label_and_a_scale_input_needs_classes() -> None:
    made = FAMILIES["dit"].build(
        sample_shape=SHAPE, num_classes=1, num_layers=1, num_attention_heads=2, attention_head_dim=8
    )
    x, t, labels = inputs()
    assert denoiser(made)(x, t, labels).shape == x.shape
    with pytest.raises(ValueError, match="images of one class have no guidance scale; use family: unet2d"):
        network("guided_unet2d")


def test_students_inherit_and_shrink_from_an_unconditional_teacher() -> None:
    big = network(block_out_channels=(16, 32))
    options = student_for_ratio(big.config, 4)
    assert 4 * sum(p.numel() for p in network(**options).parameters()) <= sum(p.numel() for p in big.parameters())
    small = network(seed=1, layers_per_block=1)
    kept = inherit(big, small).channels[0]
    assert torch.equal(small.conv_in.weight, big.conv_in.weight[kept])
    same = network(seed=2, block_out_channels=(16, 32))
    inherit(big, same)
    x, t, labels = inputs()
    with torch.no_grad():
        torch.testing.assert_close(denoiser(same)(x, t, labels), denoiser(big)(x, t, labels))


# --- foreign folders and saved ones


def test_a_plain_unconditional_pipeline_loads(tmp_path: Path) -> None:
    made = network()
    diffusers.DDPMPipeline(made, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert (loaded.denoiser.num_classes, loaded.class_names) == (1, ("image",))
    assert (loaded.guided, loaded.default_guidance, loaded.lineage) == (False, "1", None)
    x, t, labels = inputs()
    with torch.no_grad():
        assert torch.equal(loaded.denoiser(x, t, labels), made(x, t).sample)


def test_of_a_learned_variance_the_mean_alone_is_used(tmp_path: Path) -> None:
    made = learned_variance()
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    diffusers.DDPMPipeline(made, scheduler).save_pretrained(tmp_path / "foreign")
    model = load_model(tmp_path / "foreign").denoiser
    assert model.sample_shape == SHAPE
    x, t, labels = inputs()
    with torch.no_grad():
        assert torch.equal(model(x, t, labels), made(x, t).sample[:, :1])
    model(x, t, labels).square().mean().backward()
    grad = model.network.conv_out.weight.grad  # type: ignore[union-attr]
    assert isinstance(grad, Tensor)
    assert bool(grad[0].any())
    assert not grad[1].any()
    save_model(model, tmp_path / "own", lineage=Lineage.new("own", "supervised"), class_names=["image"], guided=False)
    again = load_model(tmp_path / "own").denoiser
    with torch.no_grad():
        assert torch.equal(again(x, t, labels), model(x, t, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 2}, "names 2 classes, and its network is unconditional"),
        ({"guided": True}, "names 1 class, and its network is unconditional"),
    ],
)
def test_a_folder_that_claims_more_than_its_network_has_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    lineage = Lineage.new("own", "supervised")
    save_model(denoiser(), tmp_path / "own", lineage=lineage, class_names=["image"], guided=False)
    file = tmp_path / "own" / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / "own")
    assert message in str(caught.value)


def test_a_foreign_network_of_text_is_not_taken_for_unconditional(tmp_path: Path) -> None:
    made = network("unet2d_condition")
    diffusers.DDPMPipeline(made, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not class-conditional"):
        load_model(tmp_path)


# --- the pipeline

STRANGER = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffstill":
            raise ImportError("diffstill is not here")
sys.meta_path.insert(0, Blocker())
import numpy as np, torch
from diffusers import DiffusionPipeline
root, names = json.loads(sys.argv[1])
out = {}
for name in names:
    pipe = DiffusionPipeline.from_pretrained(f"{root}/{name}", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(11 * 1_000_003 + i) for i in range(4)]
    out[name] = pipe(batch_size=4, generator=noise, num_inference_steps=5, output_type="np").images
np.savez(f"{root}/out.npz", **out)
"""


def test_plain_diffusers_draws_the_same_images_from_saved_folders(tmp_path: Path) -> None:
    models = {
        "plain": denoiser(),
        "variance": denoiser(learned_variance()),
        "condition": denoiser(network("unet2d_condition", seed=2)),
    }
    for name, model in models.items():
        lineage = Lineage.new(name, "supervised")
        save_model(model, tmp_path / name, lineage=lineage, class_names=["image"], guided=False)
        assert "pipe(batch_size=4)" in (tmp_path / name / "README.md").read_text()
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps([str(tmp_path), list(models)])],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        for name in models:
            loaded = load_model(tmp_path / name)
            assert (loaded.denoiser.num_classes, loaded.class_names, loaded.guided) == (1, ("image",), False)
            ours = sample_images(loaded.denoiser, 4, guidance=Constant(1.0), steps=5, seed=11)
            theirs = np.rint(found[name].transpose(0, 3, 1, 2) * 255)
            assert theirs.std() > 20
            assert np.abs(theirs - ours.numpy()).max() <= 1


def pipeline(made: Any) -> Any:
    pipe = ClassConditionalPipeline(diffusers.DDIMScheduler(), unet=made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pipeline_takes_no_labels_or_the_only_one() -> None:
    pipe = pipeline(network())
    assert (pipe.config.num_classes, pipe.config.guided) == (1, False)
    noise = torch.randn(3, *SHAPE)
    options = {"latents": noise, "num_inference_steps": 3, "output_type": "pt"}
    without = pipe(batch_size=3, **options).images
    assert torch.equal(without, pipe(class_labels=[0, 0, 0], **options).images)
    assert len(pipe(num_inference_steps=2).images) == 1
    with pytest.raises(ValueError, match=r"^guidance 2 cannot act: this model has no live null branch"):
        pipe(guidance_scale=2)
    with pytest.raises(ValueError, match=r"1 is out of range; this model has classes 0\.\.0"):
        pipe(class_labels=1)


def test_a_model_of_classes_still_asks_for_labels() -> None:
    pipe = pipeline(FAMILIES["unet2d"].build(sample_shape=SHAPE, num_classes=3, **SMALL))
    with pytest.raises(ValueError, match=r"^class_labels: give one label for each image, 0\.\.2"):
        pipe(batch_size=2)


# --- training and commands


def test_training_measures_one_setting_and_raises_no_alarm(run: Path) -> None:
    receipt = Receipt.load(run / "receipt.json")
    model = receipt.models["teacher"]
    assert not model.guided
    assert [(point.guidance, point.nfe) for point in model.sweep] == [("1", 3)]
    assert model.sweep[0].class_agreement is None
    assert model.fidelity is None
    assert model.cost is not None
    assert model.cost.nfe == 3
    assert receipt.warnings == []
    assert receipt.data.classes == ["image"]
    loaded = load_model(run / "model")
    assert (loaded.guided, loaded.default_guidance, loaded.class_names) == (False, "1", ("image",))
    card = (run / "model" / "README.md").read_text()
    assert "An unconditional diffusion model of 8x8 grey images" in card
    assert "- unconditional\n" in card
    assert "class-conditional" not in card


def test_dry_run_sample_and_eval_take_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(run / "model")
    assert main(["train", "digits-teacher", *TRAIN, "--dry-run"]) == 0
    assert main(["sample", model, "--out", str(tmp_path / "grid.png"), "--steps", "2"]) == 0
    assert main(["sample", model, "--out", str(tmp_path / "many"), "--steps", "2", "-n", "3"]) == 0
    assert len(list((tmp_path / "many").iterdir())) == 3
    assert main(["eval", model, "--out", str(tmp_path / "eval"), "--quiet"]) == 0
    assert not Receipt.load(tmp_path / "eval" / "receipt.json").models["model"].guided
    assert main(["check", model]) == 0
    capsys.readouterr()
    assert main(["sample", model, "--out", str(tmp_path / "no.png"), "--guidance", "2"]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("guidance: '2' cannot be set: this model is unconditional; leave it out")
    )


class Blind(nn.Module):
    """Fails on any label but the only class."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert not labels.any()
        return self.weight * x


def test_label_dropout_does_nothing_where_there_is_one_class() -> None:
    from pictures import load

    schedule = NoiseSchedule.create("cosine", 100)
    data = load("digits", unlabelled=True, shots=5)
    batch = BatchStream(data.train, schedule, batch_size=32, seed=0, device=torch.device("cpu")).batch(0)
    supervised = METHODS["supervised"]
    options = supervised.options_class(label_dropout=0.5, curriculum={"rule": "none"})  # type: ignore[call-arg]
    method = supervised(Setting(Denoiser(Blind(), schedule, 1, SHAPE)), options)
    assert not method.guided
    alpha, sigma = schedule.at(batch.t, 4)
    wanted = target(batch.x0, batch.noise, alpha, sigma, "epsilon")
    torch.testing.assert_close(method.loss(batch, None).total, (batch.x_t - wanted).square().mean())


def distill(model: Path, out: Path, *options: str) -> int:
    student = ["student.block_out_channels=[8, 8]", "student.norm_num_groups=4", "beside={}"]
    teacher = f"teacher={{model: {model}}}"
    return main(["distill", "digits-dash", *SETTINGS, *student, teacher, *options, "--out", str(out), "--quiet"])


@pytest.mark.parametrize("name", [name for name, made in METHODS.items() if "null" in made.teacher_needs] + ["sfddm"])
def test_methods_of_two_branches_refuse_an_unconditional_teacher(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options = ["respace.steps=4"] if name == "sfddm" else []
    if name == "guided":
        options = ["student={family: teacher}"]
    assert distill(run / "model", tmp_path / "run", f"method.name={name}", *options) == 2
    error = capsys.readouterr().err
    problem = "needs both branches of its teacher, and this one is unconditional"
    assert f"method.name: '{name}' {problem}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["conditional", "progressive"])
def test_methods_of_one_branch_learn_from_it(run: Path, tmp_path: Path, name: str) -> None:
    options = ["respace.steps=4", "evaluation.steps=4"] if name == "progressive" else []
    assert distill(run / "model", tmp_path / "run", f"method.name={name}", *options) == 0
    student = Receipt.load(tmp_path / "run" / "receipt.json").models["student"]
    assert not student.guided
    assert [point.guidance for point in student.sweep] == ["1"]
    assert student.fidelity is None
    assert not load_model(tmp_path / "run" / "model").guided


def test_images_for_a_model_of_one_class_need_no_labels(tmp_path: Path) -> None:
    """Whatever labels they have: the editing commands cannot be told to leave them out."""
    save_model(
        denoiser(), tmp_path / "model", lineage=Lineage.new("one", "supervised"), class_names=["all"], guided=False
    )
    shape = SHAPE[1:]
    images = np.random.default_rng(0).integers(0, 256, (30, *shape, SHAPE[0]), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(30) % 3)
    data, _ = data_of(load_model(tmp_path / "model"), f"npz:{tmp_path / 'images.npz'}")
    assert data.num_classes == 1
