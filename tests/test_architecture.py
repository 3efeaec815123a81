"""The house rules that a reader can rely on, read from the source: who imports whom, and one home for guidance."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffstill

ROOT = Path(diffstill.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "disk": set(),
    "yaml_text": set(),
    "diffusion": set(),
    "data": {"errors", "diffusion"},
    "pipelines": {"diffusion"},
    "models": {"errors", "disk", "diffusion", "pipelines"},
    "analytic": {"errors", "diffusion", "models"},
    "evaluation": {"errors", "disk", "diffusion", "data", "models"},
    "methods": {"errors", "diffusion", "data", "models", "evaluation"},
    "engine": {"errors", "disk", "diffusion", "data", "models", "evaluation", "methods"},
    "report": {"errors", "yaml_text", "disk", "diffusion", "data", "models", "evaluation", "methods"},
    "recipe": {"errors", "yaml_text", "diffusion", "data", "models", "evaluation", "methods", "engine"},
    "checks": {"errors", "diffusion", "data", "models", "evaluation", "methods", "engine", "recipe", "analytic"},
    "jobs": {
        "errors",
        "yaml_text",
        "disk",
        "diffusion",
        "data",
        "models",
        "evaluation",
        "methods",
        "engine",
        "report",
        "recipe",
    },
    "console": {"jobs"},
    "cli_edit": {"jobs"},
    "cli_parser": {"engine", "errors"},
    "cli": {"errors", "engine", "report", "recipe", "checks", "jobs", "console", "cli_edit", "cli_parser"},
    "__main__": {"cli"},
}
"""Room -> the rooms below it. ``diffstill`` itself (the version) may be imported by all."""


def room_of(file: Path) -> str:
    """``models/folder.py`` -> ``models``; ``recipe.py`` -> ``recipe``."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(source: str, package: list[str]) -> Iterator[str]:
    """Absolute names of all modules that a file of ``package`` imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            # `from . import x` in the package's root names the room x.
            yield from ([f"{base}.{alias.name}" for alias in node.names] if base == "diffstill" else [base])


def modules_of(file: Path) -> Iterator[str]:
    package = ["diffstill", *file.relative_to(ROOT).parts[:-1]]
    return imported(file.read_text(encoding="utf-8"), package)


def rooms_used(file: Path) -> set[str]:
    used = {name.split(".")[1] for name in modules_of(file) if name.startswith("diffstill.")}
    return used - {room_of(file), "__version__"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downward(file: Path) -> None:
    room = room_of(file)
    allowed = MAY_IMPORT.get(room, set())
    assert room in MAY_IMPORT or room == "__init__", f"a new room: say in MAY_IMPORT what {room} stands on"
    assert rooms_used(file) <= allowed


def test_the_order_has_no_circle() -> None:
    done: set[str] = set()
    while left := set(MAY_IMPORT) - done:
        free = {room for room in left if MAY_IMPORT[room] <= done}
        assert free, f"in a circle: {sorted(left)}"
        done |= free


def test_import_reader_sees_every_form() -> None:
    source = (
        "from . import checks\nfrom ..recipe import x\nimport torch.nn\ndef f():\n    from diffstill.cli import main\n"
    )
    assert set(imported(source, ["diffstill", "jobs"])) == {
        "diffstill.jobs",
        "diffstill.recipe",
        "torch.nn",
        "diffstill.cli",
    }
    assert set(imported("from . import __version__", ["diffstill"])) == {"diffstill.__version__"}


def test_diffusion_stands_on_torch_alone() -> None:
    for file in (ROOT / "diffusion").glob("*.py"):
        foreign = {name.split(".")[0] for name in modules_of(file)} - set(sys.stdlib_module_names)
        assert foreign <= {"torch", "diffstill"}, file.name


def test_console_knows_of_jobs_only_how_they_tell_their_progress() -> None:
    assert [name for name in modules_of(ROOT / "console.py") if name.startswith("diffstill.")] == ["diffstill.jobs.ui"]


def test_torchvision_is_never_imported() -> None:
    for file in FILES:
        assert not any(name.split(".")[0] == "torchvision" for name in modules_of(file)), file.name


def test_nothing_is_unpickled() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "pickle.load", "pickle.loads"), file.name
                if called in ("np.load", "numpy.load"):
                    assert "allow_pickle=False" in ast.unparse(node), file.name


BRANCH_WORDS = ("cond", "null", "uncond")


def guidance_formulas(source: str) -> list[str]:
    """Expressions that combine two branches as guidance does, however they are written.

    ``a + s * (b - a)``, ``(1 - s) * a + s * b`` and ``lerp`` where the operands are named after branches.
    """
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if _extrapolates(node)]


def _extrapolates(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        return name.endswith("lerp") and _branches(node) >= 2
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub))) or _branches(node) < 2:
        return False
    sides = [_factors(node.left), _factors(node.right)]
    if any(len(side) > 1 and any(_is_difference(f) and _branches(f) >= 2 for f in side) for side in sides):
        return True
    # (1 - s) * a + s * b: both sides products of a branch and something.
    return all(len(side) > 1 and sum(_branches(f) for f in side) == 1 for side in sides)


def _factors(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _factors(node.left) + _factors(node.right)
    return [node]


def _is_difference(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub)


def _branches(node: ast.AST) -> int:
    """How many different names (or attributes) in ``node`` are called after a branch."""
    names = {
        n.attr if isinstance(n, ast.Attribute) else n.id
        for n in ast.walk(node)
        if isinstance(n, (ast.Attribute, ast.Name))
    }
    return sum(any(part in BRANCH_WORDS for part in name.lower().split("_")) for name in names)


@pytest.mark.parametrize(
    "source",
    [
        "null + scale * (cond - null)",
        "cond + (s - 1) * (cond - null)",
        "out.null + (out.cond - out.null) * s",
        "eps_uncond + 2 * w * (eps_cond - eps_uncond)",
        "(1 - s) * null + s * cond",
        "s * cond - (s - 1) * null",
        "torch.lerp(null, cond, s)",
        "null.lerp(cond, s)",
    ],
)
def test_the_formula_is_recognised(source: str) -> None:
    assert guidance_formulas(source)


@pytest.mark.parametrize(
    "source",
    [
        "cond - null",
        "a * im + b * un",
        "lr_min + (lr - lr_min) * x",
        "weight * cond_mse + weight * total",
        "cond.lerp(x, s)",
    ],
)
def test_other_arithmetic_is_not(source: str) -> None:
    assert not guidance_formulas(source)


def test_guidance_has_one_home() -> None:
    homes = {
        str(f.relative_to(ROOT)): found for f in FILES if (found := guidance_formulas(f.read_text(encoding="utf-8")))
    }
    assert list(homes) == ["diffusion/guidance.py"], homes
    assert len(homes["diffusion/guidance.py"]) == 1
