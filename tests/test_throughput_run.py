"""The speed ladder as a script: its file, its arguments, and how it goes on where it was killed."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import throughput
import torch
from ladder import Begun, Ladder, rungs_of
from problem import DIGITS, Problem
from sampling import SamplingTimes
from step import step_flops

CPU = torch.device("cpu")


def test_the_committed_file_is_read() -> None:
    """Fields that came later may be missing in it."""
    file = Path(throughput.__file__).with_name("results") / "throughput-cpu.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["format"] == throughput.FORMAT
    assert all(Ladder.of(plain).library.ratio for plain in report["ladders"])
    assert len([SamplingTimes.of(plain) for plain in report["sampling"]]) == 2


QUICK = ["--nets", "digits", "--work", "train", "--digits-batch", "2,3", "--quick", "--device", "cpu"]
"""Two ladders without a teacher, whose compilation would take most of the time."""


class _Tripwire(io.StringIO):
    """Standard output of a run that is interrupted when it prints a word for the second time."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word, self.seen = word, 0

    def write(self, text: str) -> int:
        self.seen += self.word in text
        if self.seen == 2:
            raise KeyboardInterrupt
        return super().write(text)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The JSON file of a run that was interrupted after the second rung of its second ladder."""
    out = tmp_path_factory.mktemp("killed") / "throughput.json"
    with pytest.raises(KeyboardInterrupt), contextlib.redirect_stdout(_Tripwire("fused AdamW")):
        throughput.main([*QUICK, "--resume", "--out", str(out)])
    assert list(out.parent.iterdir()) == [out]
    return out.read_text(encoding="utf-8")


def test_resume_goes_on_at_the_next_rung(killed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = json.loads(killed), tmp_path / "throughput.json"
    assert before["complete"] is False
    assert [ladder["batch"] for ladder in before["ladders"]] == [2]
    assert [rung["name"] for rung in before["unfinished"]["rungs"]] == ["foreach EMA", "fused AdamW"]
    out.write_text(killed, encoding="utf-8")

    assert throughput.main([*QUICK, "--resume", "--out", str(out)]) == 0
    after = json.loads(out.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert "batch 2:" not in printed
    assert "foreach EMA" not in printed
    assert "device-resident uint8 data" in printed
    assert (after["complete"], after["processes"], after["unfinished"]) == (True, 2, None)
    assert after["machine"]["matrix_rate"] == before["machine"]["matrix_rate"]
    assert after["settings"]["seconds"] >= before["settings"]["seconds"]
    first, second = after["ladders"]
    assert first == before["ladders"][0]
    assert second["rungs"][:2] == before["unfinished"]["rungs"]
    assert second["units_per_turn"] == before["unfinished"]["units_per_turn"]
    assert [rung["process"] for rung in (*second["rungs"], second["library"])] == [1, 1, 2, 2, 2, 2, 2, 2]
    _assert_whole(Ladder.of(second), after["machine"]["matrix_rate"])

    text = out.read_text(encoding="utf-8")
    assert throughput.main([*QUICK, "--resume", "--out", str(out)]) == 0
    assert "complete already" in capsys.readouterr().out
    assert out.read_text(encoding="utf-8") == text


def _assert_whole(ladder: Ladder, rates: dict[str, float]) -> None:
    """All rungs in their order, each on top of what was kept before it, with its utilisation."""
    problem = Problem(DIGITS, "train", ladder.batch, CPU)
    flops = step_flops(problem)
    assert ladder.flops_step == flops.step
    assert ladder.baseline_utilisation == pytest.approx(flops.step / ladder.baseline_step_s / rates["fp32"])
    rungs = rungs_of(problem, host_together=False)
    assert [rung.name for rung in ladder.rungs] == [rung.name for rung in rungs]
    for number, (rung, found) in enumerate(zip(rungs, ladder.rungs, strict=True)):
        kept, _ = Begun("digits", "train", ladder.batch, 1, ladder.rungs[:number]).standing()
        assert found.switches == asdict(replace(kept, **rung.switches)), rung.name
        assert found.peak_memory_mb is None
        if found.skipped is None:
            assert found.dtype == ("bf16" if found.switches["bf16"] else "fp32")
            assert found.step_s is not None
            assert found.utilisation == pytest.approx(flops.step / found.step_s / rates[found.dtype])


def _changed(*path: str, to: Any) -> Callable[[str], str]:
    def change(text: str) -> str:
        report = json.loads(text)
        where = report
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] = to
        return json.dumps(report)

    return change


@pytest.mark.parametrize(
    ("argv", "change", "told"),
    [
        (["--rounds", "3"], str, "--rounds is None in the file and 3 here"),
        (["--digits-batch", "2"], str, "--digits-batch is [2, 3] in the file and [2] here"),
        ([], _changed("machine", "device", to="NVIDIA H200"), "device is 'NVIDIA H200' in the file and 'cpu' here"),
        ([], _changed("machine", "packages", "torch", to="1.0"), "torch is '1.0' in the file"),
        ([], _changed("format", to="diffstill-throughput/0"), "format is 'diffstill-throughput/0' in the file"),
        ([], _changed("ladders", to=[{}]), "no report of this benchmark"),
        ([], lambda text: text[:100], "no report of this benchmark"),
    ],
)
def test_resume_refuses_another_runs_file(
    argv: list[str], change: Callable[[str], str], told: str, killed: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "throughput.json"
    out.write_text(change(killed), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        throughput.main([*QUICK, *argv, "--resume", "--out", str(out)])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--resume {out}: " in last
    assert told in last
    assert out.read_text(encoding="utf-8") == change(killed)


@pytest.mark.slow
def test_a_run_that_is_terminated_again_and_again_comes_to_its_end(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    command = [sys.executable, "-u", throughput.__file__, *QUICK, "--resume", "--out", str(out)]
    for word in ("fused AdamW", "no host sync"):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
            assert run.stdout is not None
            assert any(word in line for line in run.stdout)
            run.send_signal(signal.SIGTERM)
            run.stdout.read()
        assert run.returncode == -signal.SIGTERM
        assert json.loads(out.read_text(encoding="utf-8"))["complete"] is False
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert (report["complete"], report["processes"]) == (True, 3)
    made = [rung["process"] for ladder in report["ladders"] for rung in (*ladder["rungs"], ladder["library"])]
    assert made == sorted(made)
    assert set(made) == {1, 2, 3}


@pytest.mark.parametrize("argv", [["--nets", "mnist"], ["--rounds", "0"], ["--digits-batch", "0"], ["--work", "x"]])
def test_bad_arguments_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        throughput.main(argv)
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err.splitlines()[-1]


def test_the_library_alone_is_a_ladder_without_rungs(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    asked = ["--nets", "digits", "--work", "train", "--quick", "--library-only", "--no-sampling", "--device", "cpu"]
    assert throughput.main([*asked, "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    (ladder,) = (Ladder.of(plain) for plain in report["ladders"])
    assert report["complete"]
    assert ladder.rungs == []
    assert ladder.library.ratio is not None
    assert ladder.library.loss_difference is not None
    assert ladder.library.loss_difference < 1e-4


@pytest.mark.slow
def test_quick_run_writes_the_whole_report(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    assert throughput.main(["--nets", "digits", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["format"] == throughput.FORMAT
    assert report["complete"] is True
    assert {"cpu", "cores", "threads", "bf16_native", "packages"} <= set(report["machine"])
    assert [(ladder["nets"], ladder["work"]) for ladder in report["ladders"]] == [
        ("digits", "distil"),
        ("digits", "train"),
    ]
    for ladder in report["ladders"]:
        for rung in (*ladder["rungs"], ladder["library"]):
            assert rung["skipped"] or (rung["ratio"]["median"] > 0 and rung["rounds"]), rung["name"]
            exact = rung["switches"] and not (rung["switches"]["bf16"] or rung["switches"]["teacher_bf16"])
            assert rung["skipped"] or not exact or rung["loss_difference"] < 1e-4, rung["name"]
        assert all(not rung["kept"] for rung in ladder["rungs"] if rung["optional"] or rung["skipped"])
    assert report["sampling"][0]["scaled"] is True
