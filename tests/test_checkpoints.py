"""Checkpoints: whole or not at all, any damage seen, no pickle, a full disk survived."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import DASH, assert_same, names, one_line
from folders import largest_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffstill.engine.state import load_latest, save_checkpoint
from diffstill.errors import RunFailed

# Checkpoints

TENSORS = {"arm": {"a/b": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}, "other": {"x": torch.zeros(2)}}
META = {"seconds": 1.25, "arms": {"arm": {"count": 3, "alarm": False, "failed": None}}, "warnings": []}


def saved(folder: Path, *steps: int) -> Path:
    for step in steps:
        save_checkpoint(folder, step, {**META, "step": step}, TENSORS)
    return folder


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") == (None, [])
    found, warnings = load_latest(saved(tmp_path, 8))
    assert found is not None
    assert warnings == []
    assert found.images_seen == 8
    assert found.meta == {**META, "step": 8}
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensors in TENSORS.items():
        assert_same(found.tensors[name], tensors)


def test_the_newest_two_are_kept_and_nothing_half_written(tmp_path: Path) -> None:
    saved(tmp_path, 8, 16, 24, 1000, 999_999_999_999)
    assert names(tmp_path) == ["000000001000", "999999999999"]
    (tmp_path / ".writing-000000002000").mkdir()
    found, _ = load_latest(tmp_path)
    assert found is not None
    assert found.images_seen == 999_999_999_999
    assert len(names(tmp_path)) == 2


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_any_file_is_seen_and_the_one_before_is_taken(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    newest = saved(folder, 8, 16) / "000000000016"
    file = newest / data.draw(st.sampled_from(names(newest)))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    file.write_bytes(content)
    found, warnings = load_latest(folder)
    assert found is not None
    if found.images_seen == 16:
        # Only white space or an escape of state.json may change without a change of what it says.
        assert file.name == "state.json"
        assert found.meta == {**META, "step": 16}
        assert warnings == []
    else:
        assert found.images_seen == 8
        assert found.meta["step"] == 8
        (warning,) = warnings
        assert warning.startswith("checkpoint 000000000016 is damaged and was passed over")
        assert names(folder) == ["000000000008", "damaged-000000000016"]
    for name, tensors in TENSORS.items():
        assert_same(found.tensors[name], tensors)


def test_no_digit_of_the_description_can_change_unseen(tmp_path: Path) -> None:
    file = saved(tmp_path, 8) / "000000000008" / "state.json"
    text = file.read_text()
    name = text.index('"sha256"')  # without its name the hash is not looked for, but nothing else is changed
    digits = [at for at, sign in enumerate(text) if sign in "0123456789" and not name <= at < name + 8]
    assert len(digits) > 100
    for at in digits:
        file.write_text(text[:at] + str(9 - int(text[at])) + text[at + 1 :])
        with pytest.raises(RunFailed, match="can be read"):
            load_latest(tmp_path)
    file.write_text(text)
    assert load_latest(tmp_path)[0] is not None


def test_damaged_checkpoints_do_not_push_good_ones_out(tmp_path: Path) -> None:
    (saved(tmp_path, 8, 16) / "000000000016" / "state.json").unlink()
    load_latest(tmp_path)
    saved(tmp_path, 12)
    assert names(tmp_path) == ["000000000008", "000000000012", "damaged-000000000016"]
    found, warnings = load_latest(tmp_path)
    assert found is not None
    assert (found.images_seen, warnings) == (12, [])


def test_only_damaged_checkpoints_are_a_failed_run_not_a_fresh_start(tmp_path: Path) -> None:
    for name in names(saved(tmp_path, 8, 16)):
        (tmp_path / name / "arm.safetensors").write_bytes(b"")
    with pytest.raises(RunFailed, match=r"no checkpoint in .* can be read .*--fresh") as caught:
        load_latest(tmp_path)
    one_line(caught.value)
    assert names(tmp_path) == ["000000000008", "000000000016"]


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("wrapped", [False, True], ids=["pickle", "torch"])
def test_a_pickle_that_poses_as_safetensors_is_refused_and_never_run(tmp_path: Path, wrapped: bool) -> None:
    proof = tmp_path / "executed"
    content = pickle.dumps(Bomb(proof))
    if wrapped:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("archive/data.pkl", content)
        content = archive.getvalue()
    folder = saved(tmp_path / "run", 8, 16)
    newest = folder / "000000000016"
    (newest / "arm.safetensors").write_bytes(content)
    # Even where someone also corrects the recorded hashes.
    state = json.loads((newest / "state.json").read_text())
    state["files"]["arm"] = hashlib.sha256(content).hexdigest()
    del state["sha256"]
    (newest / "state.json").write_text(json.dumps(state))
    found, warnings = load_latest(folder)
    assert found is not None
    assert found.images_seen == 8
    assert "damaged" in warnings[0]
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bomb(proof)))  # the bomb does work
    assert proof.exists()


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    first = DASH.trainer(tmp_path, steps=2)
    first.run()
    again = DASH.trainer(tmp_path, steps=4)
    with largest_file(50_000), pytest.raises(RunFailed) as caught:
        again.run()
    told = one_line(caught.value)
    assert "could not save the checkpoint" in told
    assert "last good checkpoint: 000000000016" in told
    assert "free some space" in told
    assert names(tmp_path / "checkpoints") == ["000000000016"]
    found, warnings = load_latest(tmp_path / "checkpoints")
    assert found is not None
    assert (found.images_seen, warnings) == (16, [])
    # With space again, the same command ends as if nothing had been.
    DASH.trainer(tmp_path, steps=4).run()
    found, _ = load_latest(tmp_path / "checkpoints")
    assert found is not None
    assert found.images_seen == 32


def test_a_log_that_cannot_be_written_is_a_failed_run_too(tmp_path: Path) -> None:
    with largest_file(100), pytest.raises(RunFailed, match="could not write to") as caught:
        DASH.trainer(tmp_path).run()
    assert "no checkpoint had been saved" in one_line(caught.value)
