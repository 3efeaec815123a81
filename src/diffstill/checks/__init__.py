"""Conformance: does a method, or a model, keep the rules that the engine, the samplers and the metrics rely on?

``diffstill check dash``, ``diffstill check my_method.py:MyMethod``, ``diffstill check runs/a/model``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..methods import METHODS, Method
from ..models.denoiser import Denoiser
from ..models.folder import load_model
from . import denoisers, losses, training
from .bench import Bench
from .report import Check, Outcome, Report, run_checks
from .targets import find_method

__all__ = ["Outcome", "Report", "check_denoiser", "check_method", "run_check"]


def check_method(
    method: type[Method] | str,
    options: dict[str, Any] | None = None,
    *,
    teacher: Denoiser | None = None,
    student: Denoiser | None = None,
    quick: bool = False,
) -> Report:
    """Tries a method against the rules of docs/own-method.md, on the CPU, in seconds (``quick``) or a minute or two.

    Args:
        method: a subclass of ``Method``, its registered name, or ``file.py:Class``.
        options: as a recipe would give them.
        teacher, student: copied, never changed; tiny U-Nets and random images where none are given.
        quick: skip the two processes and torch.compile.

    Raises:
        InputError: an unknown method, options that do not fit, networks that do not go together.
    """
    found = find_method(method) if isinstance(method, str) else method
    try:
        bench = Bench(found, options, teacher, student)
    except InputError:
        raise
    except Exception as error:  # whatever a class that is being written may raise
        said = f"{type(error).__name__}: {error}"
        raise InputError("method", found.__name__, said, problem="cannot be built") from error
    rules: list[Check] = [
        ("options", partial(losses.options, bench)),
        ("modules", partial(losses.modules, bench)),
        ("gradients", partial(losses.gradients, bench)),
        ("phases", partial(losses.phases, bench)),
        ("null branch", partial(losses.null_branch, bench)),
        ("copy of the teacher", partial(losses.copy_of_teacher, bench)),
        ("finite", partial(losses.finite, bench)),
        ("deterministic", partial(losses.deterministic, bench)),
        ("order of samples", partial(losses.order, bench)),
        ("micro-batches", partial(losses.halves, bench)),
        ("hooks", partial(losses.hooks, bench)),
        ("teacher unchanged", partial(training.teacher_unchanged, bench)),
        ("ema", partial(training.ema, bench)),
        ("resume", partial(training.resume, bench)),
        ("resume with dropout", partial(training.resume, bench, 0.1)),
    ]
    if not quick:
        rules += [
            ("two processes", partial(training.two_processes, bench)),
            ("compiled", partial(training.compiled, bench)),
        ]
    return run_checks(f"method {found.name}", rules)


def check_denoiser(denoiser: Denoiser, *, guided: bool = True) -> Report:
    """Tries a denoiser against what methods, samplers and metrics rely on. It is left as it was.

    Args:
        guided: False where there is no null label.
    """
    points = denoisers.Points(denoiser, guided)
    rules = {
        "outputs": denoisers.outputs,
        "finite": denoisers.finite,
        "deterministic": denoisers.deterministic,
        "rows independent": denoisers.rows_independent,
        "labels": denoisers.labels,
        "null label": denoisers.null_label,
        "branches": denoisers.branches,
        "conversions": denoisers.conversions,
        "scheduler": denoisers.scheduler,
    }
    name = type(denoiser.network).__name__
    return run_checks(f"denoiser {name}", [(rule, partial(check, points)) for rule, check in rules.items()])


def run_check(target: str, quick: bool = False) -> Report:
    """What ``diffstill check TARGET`` does.

    Args:
        target: a method's name, ``path/to/file.py:Class``, a model folder or a hub id.

    Raises:
        InputError: where it is none of these.
    """
    is_code = target.endswith(".py") or ".py:" in target
    is_model = "/" in target or Path(target).exists()
    if target in METHODS or is_code or not is_model:
        return check_method(target, quick=quick)
    loaded = load_model(target)
    return check_denoiser(loaded.denoiser, guided=loaded.guided)
