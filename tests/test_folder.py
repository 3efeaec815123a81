"""The model folder: bit-identical there and back, strict about everything else, refusals in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from folders import NAMES, WEIGHTS, denoiser, largest_file, save
from PIL import Image
from safetensors.torch import load_file

from diffstill.diffusion.schedule import NoiseSchedule
from diffstill.errors import InputError, RunFailed
from diffstill.methods.curriculum import Curriculum
from diffstill.models.adapters import dit, unet2d
from diffstill.models.card import write_card
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import load_model
from diffstill.models.lineage import Ancestor, DataRef, Lineage, recipe_sha256, weights_sha256

# ------------------------------------------------------------------------------------------------------ round trips


def test_who_may_read_a_folder_may_read_its_weights(saved: Path) -> None:
    modes = {path.stat().st_mode & 0o777 for path in saved.rglob("*") if path.is_file()}
    (saved.parent / "any").touch()
    assert modes == {(saved.parent / "any").stat().st_mode & 0o777}


def test_a_full_disk_is_a_failed_run_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with largest_file(20_000), pytest.raises(RunFailed, match=r"^the model folder .*/model cannot be written: "):
        save(denoiser(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("schedule", "T"), [("cosine", 1000), ("linear", 200), ("scaled_linear", 1000)])
def test_a_model_comes_back_bit_identical(tmp_path: Path, schedule: str, T: int, kind: Any) -> None:
    model = denoiser(schedule, T, kind, attention_levels=[1])
    written = save(model, tmp_path / "model", default_guidance="tag:1,4,5")
    loaded = load_model(tmp_path / "model")
    back = loaded.denoiser
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, back.network.state_dict()[name]), name
    assert torch.equal(back.schedule.betas, model.schedule.betas)
    assert back.schedule.fingerprint() == model.schedule.fingerprint()
    assert back.schedule.name == schedule
    assert (back.num_classes, back.sample_shape, back.prediction_type) == (3, (1, 8, 8), kind)
    assert not back.network.training
    assert loaded.class_names == tuple(NAMES)
    assert loaded.default_guidance == "tag:1,4,5"
    assert loaded.guided
    assert loaded.curriculum is None
    assert loaded.lineage == written
    assert written.weights_sha256 == weights_sha256(model.network)
    assert written.parameters == sum(p.numel() for p in model.network.parameters())


def test_a_transformer_comes_back_too(tmp_path: Path) -> None:
    network = dit.build(sample_shape=(3, 8, 8), num_classes=3, num_layers=1, num_attention_heads=1)
    model = Denoiser(network, NoiseSchedule.create("linear"), 3, (3, 8, 8))
    save(model, tmp_path / "model")
    back = load_model(tmp_path / "model").denoiser
    assert weights_sha256(back.network) == weights_sha256(network)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(model.with_network(network.eval())(x, t, y), back(x, t, y))


def test_the_layout_is_stock(folder: Path) -> None:
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "README.md",
        "curriculum.safetensors",
        "lineage.json",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    assert weights_sha256(network) == weights_sha256(load_model(folder).denoiser.network)
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    expected = {
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "prediction_type": "epsilon",
        "num_train_timesteps": 1000,
    }
    assert {name: scheduler.config[name] for name in expected} == expected
    own = NoiseSchedule.create("cosine").alphas_cumprod.float()
    torch.testing.assert_close(scheduler.alphas_cumprod, own, rtol=1e-5, atol=1e-12)


def test_the_curriculum_travels_with_what_it_belongs_to(saved: Path) -> None:
    loaded = load_model(saved)
    assert loaded.curriculum is not None
    assert loaded.curriculum_meta is not None
    own = Curriculum(loaded.denoiser.schedule)
    assert {**own.meta()}.items() <= loaded.curriculum_meta.items()
    for name, tensor in own.table().items():
        assert torch.equal(loaded.curriculum[name], tensor)
    Curriculum.from_table(loaded.curriculum, loaded.curriculum_meta, loaded.denoiser.schedule)


@pytest.mark.parametrize("form", ["bfloat16", "channels_last", "compiled", "training"])
def test_the_runtime_form_of_a_network_leaves_no_trace(tmp_path: Path, form: str) -> None:
    model = denoiser()
    network: Any = model.network
    plain = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    if form == "bfloat16":
        network.bfloat16()
        plain = {name: tensor.bfloat16().float() for name, tensor in plain.items()}
    elif form == "channels_last":
        network.to(memory_format=torch.channels_last)
    elif form == "compiled":
        compiled: Any = torch.compile(network)
        model = model.with_network(compiled)
    else:
        network.train()
    save(model, tmp_path / "model")
    state = load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")
    assert state.keys() == plain.keys()
    assert all(state[name].dtype == torch.float32 and torch.equal(state[name], plain[name]) for name in plain)
    load_model(tmp_path / "model")


def test_an_unguided_student_says_so(tmp_path: Path) -> None:
    save(denoiser(), tmp_path / "model", guided=False, default_guidance="3")
    loaded = load_model(tmp_path / "model")
    assert (loaded.guided, loaded.default_guidance) == (False, "1")
    assert "no live null branch" in (tmp_path / "model/README.md").read_text()


def test_loading_does_not_disturb_the_callers_random_numbers(saved: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_model(saved)
    assert torch.equal(torch.rand(3), expected)


# ------------------------------------------------------------------------------------------------------- replacing


def test_a_newer_model_replaces_the_older_one(tmp_path: Path) -> None:
    save(denoiser(), tmp_path / "model", curriculum={"weights": torch.ones(1000)})
    other = denoiser()
    other.network.get_parameter("conv_in.bias").data += 1
    save(other, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert weights_sha256(loaded.denoiser.network) == weights_sha256(other.network)
    assert loaded.curriculum is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_older_model_whole(tmp_path: Path) -> None:
    model = denoiser()
    save(model, tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    with pytest.raises(RunFailed, match=r"cannot be written: .*no_such"):
        save(model, tmp_path / "model", card_images=tmp_path / "no_such.png")
    model.network.get_parameter("conv_in.bias").data[0] = float("nan")
    with pytest.raises(RunFailed, match=r"the weights are not finite \(conv_in.bias\); nothing was written"):
        save(model, tmp_path / "model")
    assert {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"^folder: .* holds something else than a model; name a new or empty folder$"):
        save(denoiser(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ["a", "b"]}, "class_names: ['a', 'b'] is not usable; give 3 different names"),
        ({"class_names": ["a", "b", "b"]}, "class_names: ['a', 'b', 'b'] is not usable; give 3 different names"),
        ({"default_guidance": "much"}, "default_guidance: 'much' is not usable; guidance 'much' is not understood"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        save(denoiser(), tmp_path / "model", **options)
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_a_diffusers_form_is_refused(tmp_path: Path) -> None:
    model = Denoiser(torch.nn.Linear(1, 1), NoiseSchedule.create(), 3, (1, 8, 8))
    with pytest.raises(
        InputError,
        match=r"^network: 'Linear' is not usable; only unet2d, guided_unet2d, unet2d_condition, dit networks",
    ):
        save(model, tmp_path / "model")


# ----------------------------------------------------------------------------------------------- foreign and sharded


def foreign(folder: Path, shard: str = "10GB") -> diffusers.UNet2DModel:
    """What plain diffusers saves of a class-conditional U-Net."""
    network = unet2d.build(sample_shape=(3, 16, 16), num_classes=4, block_out_channels=(8, 16), norm_num_groups=4)
    pipe = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    pipe.save_pretrained(folder)
    network.save_pretrained(folder / "unet", max_shard_size=shard)
    return network


def test_a_plain_diffusers_folder_loads(tmp_path: Path) -> None:
    network = foreign(tmp_path)
    loaded = load_model(tmp_path)
    assert weights_sha256(loaded.denoiser.network) == weights_sha256(network)
    assert (loaded.denoiser.num_classes, loaded.denoiser.sample_shape, loaded.guided) == (4, (3, 16, 16), True)
    assert loaded.lineage is None
    assert loaded.class_names == ("0", "1", "2", "3")
    assert loaded.denoiser.schedule.T == 1000
    without = load_model(tmp_path, has_null=False)
    assert (without.denoiser.num_classes, without.guided, without.default_guidance) == (5, False, "1")
    assert len(without.class_names) == 5


def test_sharded_weights_load_whole_or_not_at_all(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    network = foreign(tmp_path, shard="100KB")
    (tmp_path / WEIGHTS).unlink()
    shards = sorted((tmp_path / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    assert weights_sha256(load_model(tmp_path).denoiser.network) == weights_sha256(network)
    shards[-1].unlink()
    with pytest.raises(InputError, match="has no complete"):
        load_model(tmp_path)


# ---------------------------------------------------------------------------------------------------------- lineage


def test_a_lineage_remembers_every_ancestor(tmp_path: Path) -> None:
    recipe = {"method": {"name": "dash", "lambda_un": 1.0}, "seed": 3}
    data = DataRef(name="digits", fingerprint="0123")
    grandparent = save(denoiser(), tmp_path / "a", lineage=Lineage.new("a", "supervised", data=data, images_seen=10))
    parent = save(denoiser(), tmp_path / "b", lineage=Lineage.new("b", "dash", teacher=grandparent, recipe=recipe))
    child = Lineage.new("c", "sfddm", teacher=load_model(tmp_path / "b").lineage, seeds=[1, 2])
    assert child.stages == ["supervised", "dash", "sfddm"]
    assert child.teacher is not None
    assert child.teacher.recipe_sha256 == parent.recipe_sha256 == recipe_sha256(dict(reversed(recipe.items())))
    assert child.teacher.teacher is not None
    assert child.teacher.teacher.weights_sha256 == grandparent.weights_sha256
    assert child.teacher.teacher.teacher is None
    foreign_teacher = Lineage.new("d", "dash", teacher=Ancestor(name="theirs", method="", weights_sha256="0" * 64))
    assert foreign_teacher.stages == ["dash"]
    assert foreign_teacher.teacher == Ancestor(name="theirs", method="", weights_sha256="0" * 64)
    assert load_model(tmp_path / "b").lineage == parent
    assert parent.recipe == recipe


def test_the_hash_of_weights_is_of_names_shapes_and_values() -> None:
    network: Any = torch.nn.Linear(2, 3)
    state = network.state_dict()
    sha = weights_sha256(network)
    assert weights_sha256(dict(reversed(state.items()))) == sha
    assert weights_sha256({name: tensor.double() for name, tensor in state.items()}) == sha
    assert weights_sha256({**state, "bias": state["bias"] + 1e-6}) != sha
    assert weights_sha256({**state, "weight": state["weight"].reshape(2, 3)}) != sha
    assert weights_sha256({"weight": state["weight"], "offset": state["bias"]}) != sha
    assert weights_sha256(network.bfloat16()) != sha


# ------------------------------------------------------------------------------------------------------------- card


def test_the_card_is_for_people_and_for_the_hub(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "samples.png")
    big = denoiser(block_out_channels=(16, 32))
    teacher = save(big, tmp_path / "teacher", lineage=Lineage.new("big", "supervised"))
    lineage = Lineage.new("small", "dash", teacher=teacher, data=DataRef(name="digits", fingerprint="0123"))
    save(
        denoiser(),
        tmp_path / "model",
        lineage=lineage,
        card_images=tmp_path / "samples.png",
        figures={"FD-digits | test": "12.3 (11.9 to 12.8)"},
        class_names=["zero", "one|two", "x\ny"],
    )
    text = (tmp_path / "model/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "diffusers",
        "tags": ["diffstill", "class-conditional", "distillation"],
    }
    assert "![Samples of this model](grid.png)" in body
    assert (tmp_path / "model/grid.png").read_bytes() == (tmp_path / "samples.png").read_bytes()
    assert "| FD-digits \\| test | 12.3 (11.9 to 12.8) |" in body
    assert "| classes | 3: zero, one\\|two, x y |" in body
    assert "trust_remote_code=True" in body
    ratio = teacher.parameters / sum(p.numel() for p in denoiser().network.parameters())
    assert f"It was distilled from `big`, which is {ratio:.2f} times its size." in body
    assert "{%" not in text
    assert "\n\n\n" not in body


def test_the_card_can_be_written_again_after_an_evaluation(folder: Path) -> None:
    before = (folder / "README.md").read_text()
    write_card(folder, figures={"FD-digits": 9.5})
    after = (folder / "README.md").read_text()
    assert "| FD-digits | 9.5 |" in after
    assert "## Figures" not in before
    write_card(folder)
    assert (folder / "README.md").read_text() == before
    load_model(folder)
