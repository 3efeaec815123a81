"""What is compiled, and that a compiler which gives other gradients is found out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import DASH, losses
from torch import Tensor

from diffstill.checks.bench import BATCH
from diffstill.engine.arm import Arm
from diffstill.engine.compiled import compiled_fault


def backend(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A compiler that changes every output of the graph."""

    def compile_graph(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(change(out) for out in graph(*args))

    return compile_graph


def refuse(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no code for this")


@pytest.mark.parametrize(
    ("compiler", "wanted"),
    [
        (backend(lambda g: g), None),
        (backend(lambda g: g * 1.01), None),
        (backend(torch.zeros_like), "its gradient is off by 100%"),
        (backend(lambda g: 1.2 * g), "its gradient is off by 20%"),
        (refuse, "it failed with BackendCompilerFailed"),
    ],
    ids=["right", "rounding", "zeros", "off", "fails"],
)
def test_a_compiler_that_gives_other_gradients_is_found_out(compiler: Any, wanted: str | None) -> None:
    torch._dynamo.reset()
    x = torch.linspace(1, 2, 5)
    compiled = torch.compile(lambda x: x * 3, backend=compiler)
    assert compiled_fault(lambda: compiled(x)) == wanted


def test_what_auto_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = DASH.runtime
    assert runtime.compiles(True, 1)
    assert not runtime.compiles(False, 10**6, frozen=True)
    assert not runtime.compiles("auto", 10**6), "a CPU gains nothing by compiling what it trains"
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not runtime.compiles("auto", 10**6, frozen=True), "no compiler"
    monkeypatch.setenv("CXX", sys.executable)
    assert runtime.compiles("auto", 3000, frozen=True)
    assert not runtime.compiles("auto", 2999, frozen=True), "too short to earn it back"


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (backend(lambda out: out), None),
        (backend(lambda out: 1.2 * out), "the teacher runs without torch.compile: its output is off by 20%"),
        (refuse, "the teacher runs without torch.compile: it failed with BackendCompilerFailed"),
    ],
    ids=["right", "off", "fails"],
)
def test_a_teacher_is_compiled_only_where_its_outputs_stay(
    compiler: Any, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    plain = DASH.trainer(tmp_path / "plain", steps=2)
    plain.run()
    eager = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **how: eager(network, **how, backend=compiler))
    monkeypatch.setattr(Arm, "_prove_compiled", lambda arm, *_: setattr(arm, "_unproven", False))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: None)
    other = DASH.trainer(tmp_path / "other", steps=2, compile=True)
    other.run()
    assert other.warnings == ([] if said is None else [said])
    assert other.teacher is not None
    assert hasattr(other.teacher.network, "_orig_mod") is (said is None)
    a, b = losses(tmp_path / "plain"), losses(tmp_path / "other")
    assert [value for _, value in a] == pytest.approx([value for _, value in b], rel=1e-5)


def test_every_stage_is_compiled_for_its_own_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later stages of a chain find room for their code, and their graphs have no symbolic shapes."""
    sizes: list[object] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        sizes.extend(value.shape[0] if isinstance(value, Tensor) else value for value in inputs)
        return graph

    as_torch_has_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **how: as_torch_has_it(network, **how, backend=compiler))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: None)
    torch._dynamo.reset()
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    with torch._dynamo.config.patch({limit: 1}):
        for images in (BATCH, BATCH // 2, BATCH // 4):
            before = len(sizes)
            trainer = DASH.trainer(tmp_path / str(images), steps=1, compile=True, micro_batch=images)
            trainer.arms[0]._unproven = False
            trainer.run()
            assert trainer.warnings == []
            assert 2 * images in sizes[before:], "the teacher's two branches in one forward"
    assert all(isinstance(size, int) for size in sizes)


@pytest.mark.slow
def test_an_arm_whose_compiled_form_is_wrong_trains_eagerly_and_says_so(tmp_path: Path) -> None:
    """Whatever this machine's compiler makes of a U-Net, the losses are eager's."""
    plain, compiled = (DASH.trainer(tmp_path / str(way), steps=3, compile=way) for way in (False, True))
    plain.run()
    compiled.run()
    a, b = losses(tmp_path / "False"), losses(tmp_path / "True")
    assert [v for _, v in a] == pytest.approx([v for _, v in b], rel=1e-3)
    assert all("trained without torch.compile" in line for line in compiled.warnings)
    assert compiled.arms[0].method.student.network.training
