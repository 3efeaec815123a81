"""Uni-DAD on a tiny text-to-image pipeline: who is shown which prompt, one subject, adapters, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusers import StableDiffusionPipeline
from tiny_sd import IMAGES, LOW_RANK, SIDE, build_pipeline, prepared, recipe_of, shaken

from diffstill.cli import main
from diffstill.data.dataset import to_float
from diffstill.data.sources import DataSpec, load_data
from diffstill.engine.arm import Arm, checkpoint_activations
from diffstill.engine.runtime import Runtime
from diffstill.errors import InputError
from diffstill.evaluation.cost import held_bytes
from diffstill.jobs.subject import subject_data
from diffstill.models.text_to_image import load_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


@contextmanager
def watched(roles: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, bool]]]:
    """(role, prompt embeddings, whether gradients were on) of each forward of a role's U-Net."""
    seen: list[tuple[str, Tensor, bool]] = []
    handles = []
    for name, network in roles.items():
        unet: Any = network.unet  # type: ignore[assignment]

        def told(module: nn.Module, args: Any, name: str = name) -> None:
            seen.append((name, args[2].detach().clone(), torch.is_grad_enabled()))

        handles.append(unet.register_forward_pre_hook(told))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# Who sees what.


@pytest.mark.parametrize("more", [(), (LOW_RANK,)], ids=["whole", "lora"])
def test_the_source_teacher_never_sees_the_rare_token_and_the_others_always_do(
    tiny_subject: list[str], tiny_pipeline: Path, more: tuple[str, ...]
) -> None:
    made, batch = prepared(tiny_subject, *more)
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    rows = {p: stock.encode_prompt(p, "cpu", 1, False)[0][0] for p in ("a dog", "a prt dog", "")}
    method = made.method
    roles = {name: net for name, net in method.roles.items() if name != "heads"} | {"teacher": made.teacher.network}
    assert set(roles) == {"teacher", "student", "critic", "target_teacher"}
    shown: dict[str, Counter[str]] = {role: Counter() for role in roles}
    with watched(roles) as seen:
        for phase in method.phases:
            with method.in_phase(phase):
                method.phase_loss(phase.name, batch, None)
    for role, embeddings, _ in seen:
        for one in embeddings:
            shown[role][next(p for p, row in rows.items() if torch.equal(row, one))] += 1
    assert set(shown["teacher"]) == {"a dog", ""}, "guided: both of its branches, of the class"
    assert shown["teacher"]["a dog"] == shown["teacher"][""]
    assert set(shown["student"]) == {"a prt dog"}
    assert set(shown["critic"]) == {"a prt dog"}, "at scale 1"
    assert set(shown["target_teacher"]) == {"a prt dog", ""}
    assert shown["target_teacher"]["a prt dog"] == 2 * shown["target_teacher"][""], "guided once, trained once"


def test_the_teachers_are_guided_by_the_formula_and_the_critic_is_not(tiny_subject: list[str]) -> None:
    made, batch = prepared(tiny_subject)
    method: Any = made.method
    x, t, labels = torch.randn(2, 4, 16, 16), torch.tensor([300.5, 700.0]), torch.zeros(2, dtype=torch.int64)
    one = torch.ones(2, 1, 1, 1)
    network: Any = made.teacher.network
    cond, null = (network.unet(x, t, network.table[[row, row]]).sample for row in (0, 1))
    for scale, eps in ((7.5, null + 7.5 * (cond - null)), (1.0, cond)):
        x0 = method._x0(made.teacher, x, t, labels, one * 0.6, one * 0.8, scale)
        assert torch.allclose(x0, (x - 0.8 * eps) / 0.6, atol=1e-4)
    # What matching subtracts: the guided teachers from the plain critic.
    asked: list[tuple[str, float]] = []
    named = {id(method.critic): "critic", id(method.teacher): "teacher", id(method._target): "target"}
    kept = method._x0
    method._x0 = lambda model, *args: (
        asked.append((named[id(model)], args[5] if len(args) > 5 else 1.0)),
        kept(model, *args),
    )[1]
    method.matching(batch.x0, batch)
    assert asked == [("critic", 1.0), ("teacher", 7.5), ("target", 7.5)]


def test_the_recipe_is_the_papers_personalisation(tiny_subject: list[str]) -> None:
    recipe = recipe_of(["subject-sd15"])
    o: Any = recipe.method.build_options()
    assert (o.steps, o.guidance, o.a, o.student_every, o.target_every) == (1, 7.5, 0.75, 10, 1)
    assert (o.dmd_weight, o.gan_weight, o.gan_critic_weight) == (1, 0.001, 0.01)
    s = recipe.training
    assert (s.lr, s.images, s.batch_size, s.grad_clip, s.warmup_images, s.ema_decay) == (5e-6, 5000, 1, 10, 500, 0)
    made, _ = prepared(tiny_subject)
    method: Any = made.method
    assert [len(layer.weight.flatten()) for layer in method.roles["heads"].layers] == [16, 16, 32, 32, 32]
    assert method._taps == ("down.0", "down.1", "down.2", "down.3", "mid")
    assert method.student.time_index.tolist() == [999.0], "one step from the noisiest level"


# One subject.


def test_exactly_one_subject_is_trained_on(tiny_subjects: Path) -> None:
    source = f"folder:{tiny_subjects}"
    kept = {"val_fraction": 0, "test_fraction": 0}
    data = subject_data(DataSpec(source=source, classes=("dog6",), **kept), SIDE)
    every = load_data(DataSpec(source=source, size=SIDE, channels=3, **kept)).train
    assert data.class_names == ("dog6",)
    assert torch.equal(data.train.images, every.images[every.labels == every.class_names.index("dog6")])
    assert subject_data(DataSpec(source=source, classes=("-cat2",), **kept), SIDE).class_names == ("dog6",)
    with pytest.raises(InputError, match=r"^data.classes: 'cat2, dog6' are 2 subjects; name exactly one"):
        subject_data(DataSpec(source=source), SIDE)
    with pytest.raises(InputError, match=r"^data.unlabelled: true would mix"):
        subject_data(DataSpec(source=source, unlabelled=True), SIDE)
    with pytest.raises(InputError, match=r"^data.classes: .*dog7"):
        subject_data(DataSpec(source=source, classes=("dog7",)), SIDE)
    with pytest.raises(InputError, match=r"^data.size: 64 is not the pipeline's 32"):
        subject_data(DataSpec(source=source, classes=("dog6",), size=64), SIDE)


def test_mirrored_images_are_encoded_not_mirrored_latents(tiny_subject: list[str], tiny_pipeline: Path) -> None:
    made, _ = prepared(tiny_subject, "data.flip=true")
    plain, _ = prepared(tiny_subject)
    latents, own = made.encode().images, plain.encode().images
    assert len(latents) == 2 * IMAGES
    assert torch.equal(latents[:IMAGES], own)
    mirrored = to_float(made.data.train.images).flip(-1)
    assert torch.equal(latents[IMAGES:], load_pipeline(str(tiny_pipeline)).encode_images(mirrored))
    assert not torch.allclose(latents[IMAGES:], own.flip(-1), atol=1e-3)


@pytest.mark.parametrize("options", ["taps: blocks", "taps: all", "r1: 0.1", "gan: wgan"])
def test_gradient_checkpointing_changes_no_gradient(tiny_subject: list[str], options: str) -> None:
    found = []
    for checkpointing in (False, True):
        name, value = options.split(": ")
        made, batch = prepared(tiny_subject, f"method.{name}={value}", LOW_RANK)
        method = shaken(made)
        if checkpointing:
            for network in method.roles.values():
                checkpoint_activations(network)
            assert method.roles["critic"].unet.is_gradient_checkpointing
        gradients = []
        for phase in method.phases:
            with method.in_phase(phase):
                method.phase_loss(phase.name, batch, None).total.backward()
            for role in phase.roles:
                gradients += [p.grad for p in method.roles[role].parameters() if p.grad is not None]
        found.append(gradients)
    assert len(found[0]) == len(found[1]) > 50
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*found, strict=True))


def test_the_shared_base_never_moves(tiny_subject: list[str], tiny_pipeline: Path) -> None:
    made, _ = prepared(tiny_subject, LOW_RANK)
    base = {name: p.data_ptr() for name, p in made.parts.unet.named_parameters()}
    for role in ("student", "critic", "target_teacher"):
        own: Any = made.method.roles[role]
        held = {p.data_ptr() for p in own.parameters()}
        assert held > set(base.values()), role
        assert not any(p.requires_grad for p in own.parameters() if p.data_ptr() in base.values())
    assert {p.data_ptr() for p in made.teacher.network.parameters()} == set(base.values())
    arm = Arm("dog", made.method, recipe_of(tiny_subject, "training.channels_last=true").training, Runtime("cpu"))
    average = arm.ema["student"].network
    for network in (*(net for role, net in made.method.roles.items() if role != "heads"), average):
        assert {p.data_ptr() for p in network.parameters()} > {p.data_ptr() for p in made.parts.unet.parameters()}
    state = load_file(tiny_pipeline / UNET)
    assert all(torch.equal(value, state[name]) for name, value in made.parts.unet.state_dict().items())


def test_what_is_held_is_what_the_page_says(tiny_subject: list[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "subject.md").read_text(encoding="utf-8")
    held = []
    for more in ((), ("lora.rank=8",)):
        made, _ = prepared(tiny_subject, *more)
        networks = [made.teacher.network, *(net for role, net in made.method.roles.items() if role != "heads")]
        assert len(networks) == 4
        held += [held_bytes(networks[:1]), held_bytes(networks)]
    one, whole, base, low = held
    assert one == base
    assert low < 1.2 * one < whole
    for figure in (one, whole, low):
        assert f"{figure:,} bytes" in page


def test_roles_may_start_from_other_pipelines(tiny_subject: list[str], tmp_path: Path) -> None:
    """As the released recipe does: student and critic from a distilled one-step checkpoint."""
    other = build_pipeline(tmp_path / "other", seed=4)
    made, _ = prepared(
        tiny_subject, f"roles.student={other}", f"roles.target_teacher={other}", "method.target_teacher=frozen"
    )
    state = load_file(other / UNET)
    for network in (made.method.roles["student"], made.method.frozen["target_teacher"]):
        unet: Any = network.unet
        assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
        assert torch.equal(network.table, made.method.roles["critic"].table), "the subject's prompt"  # type: ignore[arg-type]
    assert set(made.inputs["roles"]) == {"student", "target_teacher"}


# What is refused, in one line and before anything is written.


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["prompts=null"], r"prompts: say what the models are shown"),
        (["prompts.target=" + "a " * 20], r"prompts: .*tokens"),
        (["data.classes=[cat2, dog6]"], r"data.classes: .*2 subjects"),
        (["method={name: dash}"], r"method 'dash' has no text-to-image form"),
        (["respace={steps: 2}"], r"respace, beside and arena have no text-to-image form"),
        (["student={family: unet2d, block_out_channels: [8]}"], r"student: of a text-to-image teacher it is its copy"),
        ([LOW_RANK, "roles.student=x/y"], r"roles: with lora all start from the teacher"),
        (["lora.targets=[nothing]"], r"lora.targets: .*nothing.* name no layers"),
        (["lora.rank=0"], r"lora.rank: 0"),
        (["method.target_teacher=frozen"], r"method.target_teacher: 'frozen' has no model; name the finished pipeline"),
        (["teacher.pipeline=/nowhere/at/all"], r"teacher.pipeline: '/nowhere/at/all' does not exist"),
        (["evaluation.steps=2000"], r"evaluation.steps: 2000"),
        (["evaluation.distance=pixels"], r"evaluation.distance has no text-to-image form"),
        (["training.teacher_reuse=2"], r"training.teacher_reuse: 2 would only repeat batches"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_subject: list[str], more: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distill", *tiny_subject, *more, "--out", str(tmp_path / "run"), "--quiet"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffstill:")]
    assert len(lines) == 1
    assert re.search(told, lines[0]), lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("role", "scheduler", "more", "told"),
    [
        ("critic", {"prediction_type": "v_prediction"}, [], "predicts v_prediction, and the teacher epsilon"),
        ("critic", {"beta_end": 0.02}, [], "'a model of another noise schedule' does not fit the teacher"),
        ("target_teacher", {}, ["method.target_teacher=none", "method.target_weight=0"], "would never be asked"),
    ],
)
def test_roles_of_other_pipelines_must_fit(
    tiny_subject: list[str],
    tiny_pipeline: Path,
    tmp_path: Path,
    role: str,
    scheduler: dict[str, Any],
    more: list[str],
    told: str,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline, other)
    config = other / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **scheduler}))
    with pytest.raises(InputError, match=rf"^roles.{role}: .*{told}"):
        prepared(tiny_subject, f"roles.{role}={other}", *more)


def test_prompts_need_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "digits-dash", "prompts={source: a, target: b}", "--dry-run"]) == 2
    assert "prompts and lora are for a text-to-image teacher" in capsys.readouterr().err


def test_a_dry_run_predicts_and_an_arena_is_refused(
    tiny_subject: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = prepared(tiny_subject)
    parameters = sum(p.numel() for p in made.parts.unet.parameters())
    assert main(["distill", *tiny_subject, "--dry-run"]) == 0
    assert f"{parameters:,}" in capsys.readouterr().out
    assert main(["arena", *tiny_subject, "--methods", "unidad", "--seeds", "1", "--out", str(tmp_path / "a")]) == 2
    assert not (tmp_path / "a").exists()


def test_the_training_images_are_seen_as_they_are(tiny_subject: list[str]) -> None:
    made, batch = prepared(tiny_subject)
    pixels = to_float(made.data.train.images)
    assert (float(pixels.min()) >= -1) & (float(pixels.max()) <= 1)
    latents = made.encode().images
    assert any(torch.equal(batch.x0[0], z) for z in latents)
