"""consistency, interpolate, transfer, img2img and inpaint as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffstill.cli import main
from diffstill.data.dataset import to_float, to_uint8
from diffstill.diffusion.guidance import Constant
from diffstill.diffusion.sampling import Predict, ddim_encode, ddim_sample
from diffstill.diffusion.schedule import spaced_indices
from diffstill.evaluation.encoding import decode, encode
from diffstill.evaluation.features import make_extractor
from diffstill.evaluation.sampling import sample_images
from diffstill.jobs.opened import data_of, held_out
from diffstill.models.denoiser import Denoiser
from diffstill.models.folder import load_model, save_model

TILE, GAP, FACTOR = 48, 3, 6
"""Of report/pictures.py, for images of 8 pixels."""


def tiles(path: Path, rows: int, columns: int, *, head: bool) -> np.ndarray:
    """(rows, columns, 8, 8) of a picture of grey digits, read back from the right and bottom edge."""
    sheet = np.asarray(Image.open(path).convert("RGBA"))
    top, left = 20 if head else 0, sheet.shape[1] - columns * (TILE + GAP) + GAP
    assert sheet.shape[0] == top + rows * (TILE + GAP) - GAP
    assert left > 0, "rows are labelled"
    found = np.empty((rows, columns, 8, 8), np.uint8)
    for row in range(rows):
        for column in range(columns):
            y, x = top + row * (TILE + GAP), left + column * (TILE + GAP)
            found[row, column] = sheet[y : y + TILE : FACTOR, x : x + TILE : FACTOR, 0]
    return found


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main([*arguments, "--quiet", "--json"]) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert Path(told["out"]).exists()
    return told


def test_consistency(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c.png"
    command = ["consistency", str(tiny_run / "model"), "--teacher", str(tiny_run / "teacher"), "-n", "30"]
    command += ["--steps", "4", "--teacher-steps", "8", "--out", str(out)]
    told = run(command, capsys)
    assert (told["steps"], told["teacher_steps"], told["guidance"]) == (4, 8, "1")
    assert told["teacher"] == "digits-teacher"
    assert {"out": str(out), **json.loads(out.with_suffix(".json").read_text())} == told
    shown = tiles(out, 6, 10, head=True)
    for row, (folder, steps) in enumerate((("teacher", 8), ("model", 4))):
        images = sample_images(load_model(tiny_run / folder).denoiser, 30, guidance=Constant(1.0), steps=steps)
        for noise in range(3):
            wanted = images[10 * noise : 10 * noise + 10, 0].numpy()
            assert np.abs(shown[2 * noise + row].astype(int) - wanted).max() <= 1
    assert main([*command, "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "digits-dash in 4 steps against digits-teacher in 8 steps: 30 images at guidance 1" in text
    assert "same noise" in text
    assert "FD-digits" in text


def test_interpolate_ends_at_ordinary_samples(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "n.png"
    command = ["interpolate", str(tiny_run / "model"), "--steps", "5", "--pairs", "2", "--frames", "4", "--seed", "3"]
    command += ["--guidance", "2", "--out", str(out)]
    told = run([*command, "--label", "3,8", "--teacher", str(tiny_run / "teacher"), "--teacher-steps", "6"], capsys)
    assert told["labels"] == [[3, 8], [3, 8]]
    shown = tiles(out, 4, 4, head=True).astype(int)
    for row, (folder, steps) in enumerate((("model", 5), ("teacher", 6))):
        images = sample_images(
            load_model(tiny_run / folder).denoiser, 4, guidance=Constant(2.0), steps=steps, seed=3,
            labels=torch.tensor([3, 8, 3, 8]),
        )[:, 0].numpy().astype(int)  # fmt: skip
        for pair in range(2):
            assert np.abs(shown[2 * pair + row, [0, -1]] - images[2 * pair : 2 * pair + 2]).max() <= 1
            assert np.abs(shown[2 * pair + row, 1] - images[2 * pair]).max() > 1
    assert run([*command, "--mode", "lerp", "--batch-size", "3"], capsys)["labels"] == [[0, 0], [1, 1]]
    straight = tiles(out, 2, 4, head=True)
    run([*command, "--mode", "lerp"], capsys)
    assert np.abs(straight.astype(int) - tiles(out, 2, 4, head=True)).max() <= 1
    run(command, capsys)
    curved = tiles(out, 2, 4, head=True)
    assert np.abs(straight[:, [0, -1]].astype(int) - curved[:, [0, -1]]).max() <= 1
    assert np.abs(straight[:, 1:-1].astype(int) - curved[:, 1:-1]).max() > 1


def bridged(model: Denoiser, images: Tensor, label: int, goals: dict[str, tuple[Denoiser, int, float, int]]) -> Tensor:
    """Images encoded in 10 steps at s = 1 and decoded by each of ``goals``: (denoiser, label, scale, steps)."""

    def predict(denoiser: Denoiser, y: int) -> Predict:
        return lambda x, t, s: denoiser.guided(x, t, torch.full_like(t, y), s)

    rows = []
    with model.evaluating():
        up = spaced_indices(1000, 10, "trailing")
        x = ddim_encode(predict(model, label), to_float(images), model.schedule, Constant(1.0), timesteps=up)
        for by, goal, scale, steps in goals.values():
            down = spaced_indices(1000, steps, "trailing")[::-1]
            rows.append(to_uint8(ddim_sample(predict(by, goal), x, by.schedule, Constant(scale), timesteps=down)))
    return torch.stack(rows)[:, :, 0]


def test_transfer_encodes_and_decodes(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, teacher, student = tmp_path / "t.png", load_model(tiny_run / "teacher"), load_model(tiny_run / "model")
    originals = held_out(data_of(teacher, None)[0], [3, 3, 3])
    command = ["transfer", str(tiny_run / "teacher"), "--from", "3", "--to", "8", "-n", "3", "--out", str(out)]
    command += ["--encoder-steps", "10", "--guidance", "2.5"]
    for extra, by, steps in (
        ([], teacher, 10),
        (["--to-model", str(tiny_run / "model"), "--steps", "20", "--batch-size", "2"], student, 20),
    ):
        told = run([*command, *extra], capsys)
        assert (told["model"], told["to_model"]) == ("digits-teacher", by.lineage.name if by.lineage else "")
        assert (told["encoder_steps"], told["steps"]) == (10, steps)
        shown = tiles(out, 4, 3, head=False).astype(int)
        assert np.array_equal(shown[0], originals[:, 0].numpy())
        goals = {"back": (teacher.denoiser, 3, 1.0, 10), "moved": (by.denoiser, 8, 2.5, steps)}
        wanted = bridged(teacher.denoiser, originals, 3, goals).numpy().astype(int)
        assert np.abs(shown[2:] - wanted).max() <= 1
        error = ((shown[2] - shown[0]) / 255) ** 2
        assert told["reconstruction_psnr"] == pytest.approx(-10 * np.log10(error.mean()), abs=0.01)
        right = make_extractor("classifier", data_of(by, None)[0]).read(torch.tensor(shown[3][:, None]).byte())[1]
        assert right is not None
        assert told["called_goal"]["value"] == pytest.approx(float((right.argmax(1) == 8).double().mean()))
    assert main([*command, "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "called 8 by the classifier" in text
    assert f"wrote {out}" in text


def test_img2img_from_nothing_to_everything(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, teacher = tmp_path / "i.png", str(tiny_run / "teacher")
    command = ["img2img", teacher, "-n", "3", "--steps", "10", "--guidance", "2", "--seed", "5", "--out", str(out)]
    told = run([*command, "--strength", "0"], capsys)
    assert (told["steps_taken"], told["from"], told["to"]) == (0, [0, 1, 2], [0, 1, 2])
    shown = tiles(out, 3, 3, head=True)
    assert np.array_equal(shown[0], shown[1])
    assert np.array_equal(shown[0], shown[2])
    told = run([*command, "--strength", "1", "--from", "3", "--to", "8"], capsys)
    assert (told["steps_taken"], told["from"], told["to"]) == (10, [3, 3, 3], [8, 8, 8])
    drawn = tiles(out, 3, 3, head=True)[2].astype(int)
    sampled = sample_images(
        load_model(teacher).denoiser, 3, guidance=Constant(2.0), steps=10, seed=5, labels=torch.tensor([8, 8, 8])
    )
    assert np.abs(drawn - sampled[:, 0].numpy()).max() <= 1
    assert run([*command, "--strength", "0.6"], capsys)["steps_taken"] == 6
    part = tiles(out, 3, 3, head=True)[2].astype(int)
    run([*command, "--strength", "0.6", "--batch-size", "2"], capsys)
    assert np.abs(part - tiles(out, 3, 3, head=True)[2]).max() <= 1


def test_inpaint_draws_under_the_mask_alone(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.png"
    command = ["inpaint", str(tiny_run / "teacher"), "--labels", "7,2", "-n", "4", "--steps", "5", "--out", str(out)]
    painted = np.zeros((8, 8), np.uint8)
    painted[2:5, 1:7] = 255
    Image.fromarray(painted).save(tmp_path / "mask.png")
    masks = {
        "right": np.s_[:, 4:],
        "top": np.s_[:4],
        "centre": np.s_[2:6, 2:6],
        str(tmp_path / "mask.png"): np.s_[2:5, 1:7],
    }
    for name, place in masks.items():
        told = run([*command, "--mask", name], capsys)
        assert told["labels"] == [7, 2, 7, 2]
        test, masked, drawn = tiles(out, 3, 4, head=True)
        known = np.ones((8, 8), bool)
        known[place] = False
        assert np.array_equal(test[:, known], drawn[:, known])
        assert np.array_equal(test[:, known], masked[:, known])
        assert (masked[:, ~known] == 128).all()
        assert (test[:, ~known] != drawn[:, ~known]).any()
    once = tiles(out, 3, 4, head=True)[2].astype(int)
    run([*command, "--mask", name, "--batch-size", "3"], capsys)
    assert np.abs(once - tiles(out, 3, 4, head=True)[2]).max() <= 1
    run([*command, "--mask", name, "--resample", "2"], capsys)
    assert np.abs(once - tiles(out, 3, 4, head=True)[2]).max() > 1


def test_a_mid_grey_image_survives_the_way_through_floats() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1), every)


TEACHER, STUDENT, RANDOM = "TEACHER", "STUDENT", "RANDOM"
FROM_TO = ["--from", "3", "--to", "8"]
BAD = [
    (["consistency", STUDENT], "--teacher"),
    (["consistency", STUDENT, "--teacher", "nowhere"], "teacher: 'nowhere'"),
    (["consistency", STUDENT, "--teacher", TEACHER, "-n", "1"], "n: 1"),
    (["consistency", STUDENT, "--teacher", TEACHER, "--teacher-steps", "1001"], "teacher-steps: 1001"),
    (["consistency", STUDENT, "--teacher", TEACHER, "--guidance", "loud"], "guidance"),
    (["consistency", STUDENT, "--teacher", TEACHER, "--data", "nowhere"], "data.source"),
    (["consistency", STUDENT, "--teacher", TEACHER, "--out", "c.gif"], "name a .png file"),
    (["consistency", RANDOM, "--teacher", TEACHER], "takes random steps"),
    (["consistency", STUDENT, "--teacher", RANDOM], "teacher: "),
    (["interpolate", STUDENT, "--frames", "1"], "frames: 1"),
    (["interpolate", STUDENT, "--pairs", "0"], "pairs: 0"),
    (["interpolate", STUDENT, "--label", "1,2,3"], "label: '1,2,3'"),
    (["interpolate", STUDENT, "--label", "cat"], "label: 'cat'"),
    (["interpolate", STUDENT, "--mode", "jump"], "jump"),
    (["interpolate", STUDENT, "--seed", "-1"], "seed: -1"),
    (["interpolate", RANDOM], "takes random steps"),
    (["transfer", TEACHER, "--to", "8"], "--from"),
    (["transfer", TEACHER, "--from", "3", "--to", "10"], "to: '10'"),
    (["transfer", TEACHER, "--from", "3,4", "--to", "8"], "from: '3,4'"),
    (["transfer", TEACHER, *FROM_TO, "-n", "400"], "n: 400 asks for 400 test images of class 3"),
    (["transfer", TEACHER, *FROM_TO, "--encoder-steps", "0"], "encoder-steps: 0"),
    (["transfer", TEACHER, *FROM_TO, "--steps", "0"], "steps: 0"),
    (["transfer", TEACHER, *FROM_TO, "--encode-guidance", "x"], "encode-guidance"),
    (["transfer", TEACHER, *FROM_TO, "--to-model", "nowhere"], "to-model"),
    (["transfer", RANDOM, *FROM_TO], "takes random steps"),
    (["img2img", TEACHER, "--strength", "1.5"], "strength: 1.5"),
    (["img2img", TEACHER, "--strength", "nan"], "strength: nan"),
    (["img2img", TEACHER, "--batch-size", "0"], "batch-size: 0"),
    (["img2img", TEACHER, "-n", "0"], "n: 0"),
    (["img2img", RANDOM], "takes random steps"),
    (["inpaint", TEACHER], "--mask"),
    (["inpaint", TEACHER, "--mask", "middle"], "use left, right, top, bottom, centre, or the path"),
    (["inpaint", TEACHER, "--mask", "README.md"], "cannot be read"),
    (["inpaint", TEACHER, "--mask", "big.png"], "mask: 'big.png' is 9x9 pixels; use"),
    (["inpaint", TEACHER, "--mask", "black.png"], "masks nothing"),
    (["inpaint", TEACHER, "--mask", "left", "--resample", "0"], "resample: 0"),
    (["inpaint", RANDOM, "--mask", "left"], "takes random steps"),
]


@pytest.fixture(scope="module")
def random_model(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student, as if it were made for the stochastic sampler."""
    loaded = load_model(tiny_run / "model")
    assert loaded.lineage is not None
    made = loaded.denoiser.respaced([250, 500, 750, 999])
    made.sampler = "stochastic"
    folder = tmp_path_factory.mktemp("random") / "model"
    save_model(made, folder, lineage=loaded.lineage, class_names=loaded.class_names)
    return folder


@pytest.fixture(scope="module")
def encoder_model(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, as if it were an encoder of four steps from the clean image to its noisiest."""
    loaded = load_model(tiny_run / "teacher")
    assert loaded.lineage is not None
    made, top = loaded.denoiser.respaced([0, 250, 500, 750]), loaded.denoiser.schedule.alphas_cumprod[-1:]
    made.sampler, made.end = "encode", (top.sqrt(), (1 - top).sqrt())
    folder = tmp_path_factory.mktemp("encoder") / "model"
    save_model(made, folder, lineage=loaded.lineage, class_names=loaded.class_names, guided=False)
    return folder


def test_transfer_to_a_model_of_few_steps_decodes_from_its_noisiest(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fifty even ones of its 96 would begin at a half-clean level."""
    teacher = load_model(tiny_run / "teacher")
    assert teacher.lineage is not None
    few = teacher.denoiser.respaced(spaced_indices(teacher.denoiser.schedule.T, 96, "trailing"))
    save_model(few, tmp_path / "few", lineage=teacher.lineage, class_names=teacher.class_names)
    command = ["transfer", str(tiny_run / "teacher"), *FROM_TO, "-n", "1", "--out", str(tmp_path / "t.png")]
    told = run([*command, "--to-model", str(tmp_path / "few")], capsys)
    assert (told["encoder_steps"], told["steps"]) == (50, 96)


def test_transfer_by_an_encoder(
    tiny_run: Path, encoder_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It encodes in its own steps; the other model decodes, as what it was and as what it shall be."""
    out, teacher = tmp_path / "t.png", str(tiny_run / "teacher")
    command = ["transfer", str(encoder_model), *FROM_TO, "-n", "3", "--quiet", "--out", str(out)]
    told = run([*command, "--to-model", teacher, "--steps", "10", "--guidance", "2"], capsys)
    assert (told["encoder_steps"], told["steps"], told["encode_guidance"], told["guidance"]) == (4, 10, "1", "2")
    encoder, decoder = load_model(encoder_model).denoiser, load_model(teacher).denoiser
    images = held_out(data_of(load_model(teacher), None)[0], [3, 3, 3])
    with encoder.evaluating(), decoder.evaluating():
        noise = encode(encoder, to_float(images), torch.full((3,), 3), Constant(1.0))
        back = decode(decoder, noise, torch.full((3,), 3), Constant(1.0), steps=10)
        moved = decode(decoder, noise, torch.full((3,), 8), Constant(2.0), steps=10)
    shown = tiles(out, 4, 3, head=False).astype(int)
    assert np.abs(shown[2:] - to_uint8(torch.stack([back, moved]))[:, :, 0].numpy()).max() <= 1
    assert run([*command, "--to-model", teacher], capsys)["steps"] == 50
    for extra, named in (
        ([], "to-model: is missing: the model is an encoder"),
        (["--to-model", str(encoder_model)], "to-model: "),
        (["--to-model", teacher, "--encoder-steps", "3"], "encoder-steps: 3"),
    ):
        assert main([*command, *extra]) == 2
        assert named in capsys.readouterr().err
    assert main(["inpaint", str(encoder_model), "--mask", "left", "--quiet", "--out", str(out)]) == 2
    assert "is an encoder" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "named"), BAD, ids=[" ".join(command) for command, _ in BAD])
def test_bad_input_ends_in_one_line_and_writes_nothing(
    command: list[str],
    named: str,
    tiny_run: Path,
    random_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("no picture")
    for name, side in (("big.png", 9), ("black.png", 8)):
        Image.new("L", (side, side), 255 if side == 9 else 0).save(name)
    before = sorted(tmp_path.iterdir())
    models = {TEACHER: str(tiny_run / "teacher"), STUDENT: str(tiny_run / "model"), RANDOM: str(random_model)}
    assert main([models.get(word, word) for word in command] + ["--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffstill: ")
    assert error.count("\n") == 1
    assert named in error
    assert sorted(tmp_path.iterdir()) == before


def test_models_that_do_not_fit_each_other_are_refused(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = load_model(tiny_run / "teacher")
    assert teacher.lineage is not None
    early = teacher.denoiser.respaced([0, 100, 300])
    save_model(early, tmp_path / "early", lineage=teacher.lineage, class_names=teacher.class_names)
    out = ["--quiet", "--out", str(tmp_path / "x.png")]
    assert main(["transfer", str(tiny_run / "teacher"), *FROM_TO, "--to-model", str(tmp_path / "early"), *out]) == 2
    assert "noisiest steps are alike" in capsys.readouterr().err
    (tmp_path / "early" / "lineage.json").unlink()
    assert main(["img2img", str(tmp_path / "early"), *out]) == 2
    assert "data: None is not known from the model; name it with --data" in capsys.readouterr().err
    assert main(["img2img", str(tmp_path / "early"), *out, "--data", "digits", "--guidance", "1"]) == 0
    assert main(["img2img", str(tiny_run / "teacher"), *out, "--data", "digits", "--steps", "2"]) == 0
