"""The documentation holds: commands parse, recipes load, links resolve, code runs, tables are the schema's.

``python tests/test_docs.py`` writes the tables of docs/recipes.md anew.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from tiny import TINY

from diffstill.cli import build_parser, parse
from diffstill.data.sources import DataSpec
from diffstill.errors import InputError
from diffstill.jobs.arena import choose_arms
from diffstill.jobs.evaluate import of_data
from diffstill.jobs.stages import stages_of
from diffstill.methods import METHODS, CurriculumOptions
from diffstill.models.adapters import FAMILIES, guided_unet2d
from diffstill.recipe import (
    ChainRecipe,
    DistillRecipe,
    EvaluationSpec,
    StageSpec,
    builtin_recipes,
    load_recipe,
    override_section,
    schema,
)
from diffstill.recipe.chain import BaselineSpec

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh", "console")
SECTION = re.compile(r"\b([\w-]+\.md) (\d+(?:\.\d+)*)((?:, \d+(?:\.\d+)*)*)")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def shell_lines(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines]


def diffstill_arguments(line: str) -> list[str] | None:
    """What follows ``diffstill`` in a shell line, whatever launches it; None where the line runs something else."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    end = next((i for i, word in enumerate(words) if word in ("|", "&&", ">", ";")), len(words))
    words = words[:end]
    if words[:1] == ["diffstill"]:
        return words[1:]
    for i in range(len(words) - 1):
        if words[i : i + 2] == ["-m", "diffstill"]:
            return words[i + 2 :]
    return None


def commands(page: Path) -> list[str]:
    """Every command line of ``diffstill`` on a page: in shell blocks, and in the running text with arguments."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, *SHELL) for line in shell_lines(block)]
    lines += re.findall(r"(?<!`)`(diffstill [^`\n]+)`(?!`)", FENCE.sub("", text))
    return [line for line in lines if diffstill_arguments(line) is not None]


def known_commands() -> set[str]:
    holder = next(action for action in build_parser()._actions if action.dest == "command")
    return set(holder.choices or ())


COMMANDS = [pytest.param(line, id=f"{page_id(page)}: {line}") for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_understood(line: str) -> None:
    words = diffstill_arguments(line)
    assert words is not None
    if len(words) == 1 and words[0] in known_commands():  # `diffstill distill` as a name in the running text
        return
    if {"--help", "--version"} & set(words):
        with pytest.raises(SystemExit, match="0"):
            parse(words)
        return
    arguments = parse(words)
    name = getattr(arguments, "recipe", None)
    overrides = [item for item in getattr(arguments, "overrides", ()) if not item.startswith("[")]
    if name in builtin_recipes():
        recipe = load_recipe(name, overrides)
        assert arguments.command in (recipe.kind, "arena")
        if isinstance(recipe, ChainRecipe):
            stages_of(recipe)
        if arguments.command == "arena":
            assert isinstance(recipe, DistillRecipe)
            choose_arms(recipe, arguments.methods.split(",") if arguments.methods else None)
    elif arguments.command == "eval":
        about_data, of_protocol = of_data(overrides)
        override_section(EvaluationSpec(), of_protocol, "evaluation")
        override_section(DataSpec(source="digits"), about_data, "data")
    elif arguments.command == "demo":
        load_recipe("digits-dash", overrides)
    elif name is not None:
        assert name.isupper() or name.endswith(".yaml"), f"no recipe is called {name}"


def benchmark_lines() -> list[tuple[str, str]]:
    """(page, line) of every ``python benchmarks/...`` with its arguments, in shell blocks and in the running text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in blocks(page, *SHELL) for line in shell_lines(block)]
        lines += re.findall(r"`(python benchmarks/[^`\n]+)`", FENCE.sub("", text))
        found += [(page_id(page), m[1]) for line in lines if (m := re.search(r"python (benchmarks/[^;|&#]+)", line))]
    return found


class Parsed(Exception):
    """The arguments of a script were understood."""


@pytest.mark.parametrize(("page", "line"), benchmark_lines())
def test_benchmark_is_understood(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *arguments = shlex.split(line)
    as_it_is = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser, argv: Any = None, namespace: Any = None) -> Any:
        as_it_is(parser, argv, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    if "parse_args" not in (ROOT / script).read_text(encoding="utf-8"):
        assert not arguments, f"{script} takes none"
        return
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_wrong_commands_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Run `diffstill evil x`.\n```bash\nA=1 torchrun -m diffstill train digits-teacher \\\n  --sedes 3\n```\n"
    )
    found = commands(page)
    assert len(found) == 2
    for line in found:
        with pytest.raises(InputError, match=r"^command"):
            parse(diffstill_arguments(line))


def test_the_pages_do_show_commands() -> None:
    shown = {(diffstill_arguments(line) or [""])[0] for line in commands(ROOT / "README.md")}
    assert shown >= {"demo", "train", "distill", "sample", "eval", "report", "arena", "list", "check", "doctor"}


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_resolve(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page_id(page)} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), f"{page_id(page)} links to {target}"


def test_sections_named_in_the_code_exist() -> None:
    """``dash.md 5.1`` in a docstring is a heading of that page."""
    numbers = {page.name: set(re.findall(r"^#+ (\d+(?:\.\d+)*) ", page.read_text("utf-8"), re.M)) for page in PAGES}
    named = []
    for folder in ("src", "tests", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            for page, first, more in SECTION.findall(file.read_text(encoding="utf-8")):
                named += [(file.name, page, number) for number in [first, *re.findall(r"\d+(?:\.\d+)*", more)]]
    assert len(named) > 30
    assert [(file, page, n) for file, page, n in named if page in numbers and n not in numbers[page]] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_blocks_compile(page: Path) -> None:
    for number, body in enumerate(blocks(page, "python"), 1):
        compile(body, f"{page_id(page)}, block {number}", "exec")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_whole_recipes_load(page: Path, tmp_path: Path) -> None:
    for body in blocks(page, "yaml"):
        if re.search(r"^(kind|extends):", body, re.MULTILINE):
            file = tmp_path / "recipe.yaml"
            file.write_text(body, encoding="utf-8")
            load_recipe(str(file))


def test_readme_snippet_runs_without_diffstill(tiny_run: Path, tmp_path: Path) -> None:
    """The snippet that loads a student in plain diffusers, run where importing diffstill is an error."""
    snippet = next(body for body in blocks(ROOT / "README.md", "python") if "DiffusionPipeline" in body)
    assert "diffstill" not in snippet
    ban = "import sys\nsys.modules['diffstill'] = None\n"
    snippet = ban + snippet.replace("runs/demo/model", str(tiny_run / "model"))
    made = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]


def test_the_python_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks one after the other, as a script has them; shorter by its overrides alone."""
    script = "\n".join(blocks(ROOT / "docs" / "python.md", "python"))
    overrides = '{"training.images": 25600, "seed": 1}'
    assert overrides in script
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(script.replace(overrides, repr(TINY)), names)
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[:4]] == ["teacher", "teacher", "student", "student"]
    assert sum(line.startswith("gap ratio ") for line in told) == 1
    assert any("training {" in line and "/loss'" in line for line in told)
    assert names["images"].shape == (20, 1, 8, 8)
    assert names["cond"].shape == names["null"].shape == (4, 1, 8, 8)


def test_measured_tables_are_those_of_the_result_files() -> None:
    import tables  # of benchmarks/, which is on the path of pytest alone

    for page in tables.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert "<!-- begin: measured" in text
        assert tables.with_tables(text) == text, f"{page}: results have changed; run: python benchmarks/tables.py"


# The tables of docs/recipes.md

RECIPES_PAGE = ROOT / "docs" / "recipes.md"
SECTIONS: dict[str, type[BaseModel]] = {
    "schedule": schema.ScheduleSpec,
    "training": schema.TrainSettings,
    "evaluation": schema.EvaluationSpec,
    "teacher": schema.TeacherSpec,
    "prompts": schema.PromptSpec,
    "lora": schema.LoraSpec,
    "respace": schema.RespaceSpec,
    "arena": schema.ArenaSpec,
    "arm": schema.ArmSpec,
    "chain": ChainRecipe,
    "stage": StageSpec,
    "baseline": BaselineSpec,
    "curriculum": CurriculumOptions,
    **{f"method {name}": method.options_class for name, method in METHODS.items()},
}
WORDS = {int: "whole number", float: "number", str: "text", bool: "true, false"}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def kind_of(annotation: Any) -> str:
    """``whole number``, ``` `a`, `b` ```, ``list of numbers``, ..."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if origin is Literal:
        return ", ".join(f"`{_plain(value)}`" for value in inside)
    if origin in (Union, types.UnionType):
        return ", ".join(kind_of(part) for part in inside if part is not type(None))
    if origin is tuple:
        return f"list of {kind_of(inside[0])}" + ("s" if inside[0] in (int, float) else "")
    return "section" if isinstance(annotation, type) and issubclass(annotation, BaseModel) else "mapping"


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_plain(part) for part in value)}]"
    if isinstance(value, BaseModel):
        return "{}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def value_of(field: FieldInfo) -> str:
    """Kind, bounds and whether null is one of the values."""
    bounds = [
        f" {sign} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(bound, name, None) is not None
    ]
    null = ", `null`" if type(None) in get_args(field.annotation) else ""
    return kind_of(field.annotation) + " and".join(bounds) + null


def table_of(model: type[BaseModel]) -> str:
    if not model.model_fields:
        return "No options."
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.default is PydanticUndefined else f"`{_plain(field.default)}`"
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{name}` | {value_of(field)} | {default} | {meaning} |")
    return "\n".join(rows)


def options_table(options: dict[str, Any]) -> str:
    rows = ["| key | default |", "|---|---|"]
    rows += [f"| `{name}` | {'required' if v is None and name == 'block_out_channels' else f'`{_plain(v)}`'} |"
             for name, v in options.items()]  # fmt: skip
    return "\n".join(rows)


def generated() -> dict[str, str]:
    tables = {name: table_of(model) for name, model in SECTIONS.items()}
    tables |= {f"family {name}": options_table(family.options) for name, family in FAMILIES.items()}
    tables["family guided_unet2d"] = options_table(guided_unet2d.OPTIONS)  # the rest is unet2d's
    tables["recipes"] = "\n".join(
        ["| recipe | command | |", "|---|---|---|"]
        + [f"| `{name}` | {commands_of(name)} | {load_recipe(name).description} |" for name in builtin_recipes()]
    )
    return tables


def commands_of(name: str) -> str:
    """The commands that take a recipe."""
    recipe = load_recipe(name)
    arms = isinstance(recipe, DistillRecipe) and recipe.arena.arms
    return f"`{recipe.kind}`" + (", `arena`" if arms else "")


MARKED = re.compile(r"<!-- begin: ([\w -]+) -->\n(.*?)<!-- end -->", re.DOTALL)


def with_tables(text: str) -> str:
    tables = generated()
    return MARKED.sub(lambda m: f"<!-- begin: {m[1]} -->\n{tables[m[1]]}\n<!-- end -->", text)


def test_the_schema_is_documented_whole() -> None:
    text = RECIPES_PAGE.read_text(encoding="utf-8")
    assert {name for name, _ in MARKED.findall(text)} == set(generated())
    assert with_tables(text) == text, "the schema has changed; run: python tests/test_docs.py"


if __name__ == "__main__":
    RECIPES_PAGE.write_text(with_tables(RECIPES_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
