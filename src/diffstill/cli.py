"""The command line: parsing and printing only. Exit codes: 0 done, 1 a failed run, 2 bad input, 130/143 stopped."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import __version__, cli_edit
from .cli_parser import Parser, unknown_option
from .errors import DiffstillError, InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    if not (sys.argv[1:] if argv is None else argv):
        build_parser().print_help()
        return 0
    try:
        arguments = parse(argv)
        _quieten()
        return int(arguments.run(arguments) or 0)
    except DiffstillError as error:
        print(f"diffstill: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("diffstill: stopped; run the same command again to resume from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if os.environ.get("DIFFSTILL_DEBUG"):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"diffstill: {where}cannot be read or written ({error.strerror or error})", file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("DIFFSTILL_DEBUG"):
            raise
        print(f"diffstill: {unforeseen(error)}", file=sys.stderr)
        return 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; overrides may also follow options, which argparse by itself refuses.

    Raises:
        InputError: for whatever it does not understand.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    late = [word for word in rest if not word.startswith("-")]
    if rest and (late != rest or not hasattr(arguments, "overrides")):
        raise unknown_option(parser, arguments, rest)
    if late:
        arguments.overrides = [*arguments.overrides, *late]
    return arguments


def unforeseen(error: Exception) -> str:
    """The line for an exception that is none of ours: memory that ran out, or a bug."""
    text = " ".join(str(error).split())[:400]
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return (
            f"out of memory ({text}); in training set training.micro_batch or a smaller training.batch_size, in "
            "evaluation a smaller evaluation.batch_size, in sampling a smaller --batch-size"
        )
    return f"unexpected {type(error).__name__}: {text} (a bug: set DIFFSTILL_DEBUG=1 for the traceback and report it)"


def _quieten() -> None:
    """Chatter of the libraries underneath is no news to the user."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is first imported
    for name in ("diffusers", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def build_parser() -> Parser:
    parser = Parser(
        prog="diffstill",
        description="Distil diffusion models: smaller, fewer steps, the guidance dial still alive.",
        epilog="example: diffstill demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffstill {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str, run: Any, text: str, example: str, *, out: str | None = None, device: str = "auto"
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, epilog=f"example: {example}", allow_abbrev=False)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        if out is not None:
            made.add_argument("--out", type=Path, default=None, help=f"where to write (default {out})")
            made.add_argument("--device", default=None, help=f"auto, cpu, cuda or mps (default: {device})")
            made.add_argument("--quiet", action="store_true", help="no progress bars")
        return made

    def recipe_command(name: str, run: Any, text: str, example: str, out: str = "runs/NAME") -> argparse.ArgumentParser:
        made = command(name, run, text, example, out=out, device="the recipe's")
        made.add_argument("recipe", help="a name from `diffstill list recipes`, or a YAML path")
        made.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides: training.lr=1e-3 seed=1")
        made.add_argument("--fresh", action="store_true", help="throw an earlier run in --out away and start over")
        made.add_argument("--dry-run", action="store_true", help="print the resolved recipe and its predicted cost")
        return made

    demo = command("demo", _demo, "teacher, DASH student, evaluation and report on real digits, in minutes",
                   "diffstill demo", out="runs/demo", device="the recipe's")  # fmt: skip
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe digits-dash")
    demo.add_argument("--fresh", action="store_true", help="throw an earlier demo away and start over")
    recipe_command("train", _train, "train a model from data: a teacher", "diffstill train digits-teacher")
    recipe_command("distill", _train, "distil a student from a teacher", "diffstill distill digits-dash seed=1")
    recipe_command("chain", _train, "stages one after another: smaller, then fewer steps",
                   "diffstill chain cascade-digits")  # fmt: skip
    arena = recipe_command("arena", _arena, "train several methods against one teacher in one pass, and compare",
                           "diffstill arena digits-arena --methods dash,composite --seeds 3",
                           out="runs/arena-NAME")  # fmt: skip
    arena.add_argument("--methods", default=None, help="comma-separated arms or methods (default: the recipe's arms)")
    arena.add_argument("--seeds", type=int, default=3, help="number of training seeds (default 3)")

    sample = command("sample", _sample, "draw images from a model",
                     "diffstill sample runs/demo/model --guidance 2 --labels 0,1,2 --out grid.png",
                     out="samples.png")  # fmt: skip
    sample.add_argument("model", help="a model folder or hub id")
    sample.add_argument("--guidance", default=None, help="2, tag:1,4,5 or interval:3,0.2,0.8 (default: the model's)")
    sample.add_argument("--steps", type=int, help="default: 50, or all of a model of fewer")
    sample.add_argument("--labels", default=None, help="class numbers or names, comma-separated")
    sample.add_argument("-n", "--count", type=int, default=None, help="how many images (default: 8 a class)")
    cli_edit.sampling_options(sample)

    cli_edit.declare(command, _picture)

    evaluate = command("eval", _eval, "measure a model, or images of any origin",
                       "diffstill eval runs/demo/model --teacher runs/demo/teacher",
                       out="runs/eval-RUN-MODEL")  # fmt: skip
    evaluate.add_argument(
        "model", help="a model folder or hub id; or images: an .npz, a folder of pictures, npz:PATH, folder:PATH"
    )
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the protocol: samples=5000 steps=20; of the data: data.limit=500",
    )
    evaluate.add_argument("--teacher", default=None, help="measure guidance fidelity against this model")
    evaluate.add_argument("--data", default=None, help="digits, folder:PATH, npz:PATH, parquet:PATH or hub:NAME")

    report = command("report", _report, "rewrite a run's report, or compare several",
                     "diffstill report runs/a runs/b --out compare.html")  # fmt: skip
    report.add_argument("runs", nargs="+", type=Path, help="run folders (or receipt.json files)")
    report.add_argument("--out", type=Path, default=None, help="the page (default report.html, or compare.html)")

    listing = command("list", _list, "list recipes, methods, data sources or metrics", "diffstill list recipes")
    listing.add_argument("what", choices=("recipes", "methods", "data", "metrics"))
    check = command("check", _check, "check that a method or a model keeps its promises", "diffstill check dash")
    check.add_argument("target", help="a method's name, path/to/file.py:Class, or a model folder")
    check.add_argument("--quick", action="store_true", help="skip the slow proofs (two processes, compile)")
    command("doctor", _doctor, "tell what is installed, what would not work and why", "diffstill doctor")
    return parser


def _print(arguments: argparse.Namespace, value: Any, text: str, *, speaks: bool = True) -> int:
    """The result, as JSON where asked; of several processes the first alone speaks."""
    if speaks:
        print(json.dumps(value) if arguments.json else text)
    return 0


@contextmanager
def _session(arguments: argparse.Namespace, device: str = "auto") -> Iterator[tuple[Any, Any]]:
    """The runtime, closed in the end, and the ui; of several processes the first alone speaks."""
    from .console import make_ui
    from .engine.runtime import Runtime

    runtime = Runtime(arguments.device or device)
    try:
        yield runtime, make_ui(quiet=arguments.quiet or arguments.json, speaks=runtime.is_main)
    finally:
        runtime.close()


def _load(arguments: argparse.Namespace, name: str | None = None) -> Any:
    from .recipe import load_recipe

    return load_recipe(name or arguments.recipe, arguments.overrides)


def _demo(arguments: argparse.Namespace) -> int:
    from .jobs.distill import distill

    recipe = _load(arguments, "digits-dash")
    out = arguments.out or Path("runs/demo")
    with _session(arguments, recipe.device) as (runtime, ui):
        finished = distill(recipe, out, runtime, ui, fresh=arguments.fresh, kind="demo")
    return _tell(arguments, finished, runtime)


def _train(arguments: argparse.Namespace) -> int:
    from .jobs.chain import chain
    from .jobs.distill import distill
    from .jobs.plan import plan
    from .jobs.train import require_kind, train

    recipe = _load(arguments)
    require_kind(recipe, arguments.command)
    with _session(arguments, recipe.device) as (runtime, ui):
        if arguments.dry_run:
            planned = plan(recipe, runtime)
            return _print(arguments, planned.as_json(), planned.as_text(), speaks=runtime.is_main)
        out = arguments.out or Path("runs") / recipe.name
        job: Any = {"train": train, "distill": distill, "chain": chain}[recipe.kind]
        finished = job(recipe, out, runtime, ui, fresh=arguments.fresh)
    return _tell(arguments, finished, runtime)


def _arena(arguments: argparse.Namespace) -> int:
    from .jobs.arena import arena, choose_arms
    from .jobs.plan import plan
    from .jobs.train import require_kind
    from .report.arena import markdown_table

    recipe = _load(arguments)
    require_kind(recipe, "distill")
    if arguments.seeds < 1:
        raise InputError("seeds", arguments.seeds, "use 1 or more")
    chosen = arguments.methods.split(",") if arguments.methods else None
    arms = choose_arms(recipe, chosen)
    with _session(arguments, recipe.device) as (runtime, ui):
        if arguments.dry_run:
            planned = plan(recipe, runtime, arms, seeds=arguments.seeds)
            return _print(arguments, planned.as_json(), planned.as_text(), speaks=runtime.is_main)
        out = arguments.out or Path("runs") / f"arena-{recipe.name}"
        result = arena(recipe, out, runtime, ui, methods=chosen, seeds=arguments.seeds, fresh=arguments.fresh)
    tables = [f"{budget.replace('_', ' ')}\n\n{markdown_table(result, budget)}" for budget in result.budgets()]
    told = "\n".join([*tables, f"report: {out / 'report.html'}"])
    return _print(arguments, result.model_dump(mode="json"), told, speaks=runtime.is_main)


def _tell(arguments: argparse.Namespace, finished: Any, runtime: Any) -> int:
    if not runtime.is_main:
        return 0
    from .report.words import beside, verdict

    receipt = finished.receipt
    lines = ["all done already; --fresh starts over"] if finished.already else []
    lines += [*verdict(receipt), *beside(receipt)]
    lines += [f"warning: {text}" for text in receipt.warnings]
    lines += [f"report:  {finished.folder / 'report.html'}", f"receipt: {finished.folder / 'receipt.json'}"]
    if (finished.folder / "model").exists():
        lines.append(f"model:   {finished.folder / 'model'}")
    return _print(arguments, receipt.model_dump(mode="json"), "\n".join(lines))


def _sample(arguments: argparse.Namespace) -> int:
    from .jobs.evaluate import sample

    if arguments.batch_size < 1:
        raise InputError("batch-size", arguments.batch_size, "use 1 or more")
    with _session(arguments) as (runtime, ui):
        path = sample(
            arguments.model, arguments.out or Path("samples.png"), runtime, ui, guidance=arguments.guidance,
            steps=arguments.steps, labels=arguments.labels, count=arguments.count, seed=arguments.seed,
            clip=arguments.clip, batch_size=arguments.batch_size,
        )  # fmt: skip
    return _print(arguments, {"out": str(path)}, f"wrote {path}", speaks=runtime.is_main)


def _picture(arguments: argparse.Namespace) -> int:
    """The commands of ``cli_edit``."""
    with _session(arguments) as (runtime, ui):
        told = arguments.job(arguments, runtime, ui)
    return _print(arguments, told.as_json(), told.as_text(), speaks=runtime.is_main)


def _eval(arguments: argparse.Namespace) -> int:
    from .jobs.evaluate import evaluate, of_data, protocol_of
    from .jobs.images import evaluate_images, holds_images, protocol_of_images, refuse_pictures

    named = Path(arguments.model.partition(":")[2] or arguments.model)
    name = "-".join(named.resolve().parts[-2:])
    out = arguments.out or Path("runs") / f"eval-{name.removesuffix('.npz').removesuffix('.parquet')}"
    data_overrides, overrides = of_data(arguments.overrides)
    asked = {"data": arguments.data, "data_overrides": data_overrides}
    with _session(arguments) as (runtime, ui):
        if holds_images(arguments.model):
            if arguments.teacher is not None:
                mend = "leave it out: images have no guidance to compare"
                raise InputError("teacher", arguments.teacher, mend, problem="goes with a model")
            protocol = protocol_of_images(overrides)
            finished = evaluate_images(arguments.model, out, runtime, ui, spec=protocol, **asked)
        else:
            refuse_pictures(arguments.model)
            told = protocol_of(arguments.model, overrides)
            finished = evaluate(arguments.model, out, runtime, ui, teacher=arguments.teacher, spec=told, **asked)
    return _tell(arguments, finished, runtime)


def _report(arguments: argparse.Namespace) -> int:
    from .jobs.report import report

    path = report(arguments.runs, arguments.out)
    return _print(arguments, {"out": str(path)}, f"wrote {path}")


def _list(arguments: argparse.Namespace) -> int:
    from .jobs.listing import listing

    rows = listing(arguments.what)
    widths = [max(map(len, column)) for column in zip(*(row.values() for row in rows), strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row.values(), widths, strict=True)) for row in rows)
    return _print(arguments, rows, "\n".join(line.rstrip() for line in lines))


def _check(arguments: argparse.Namespace) -> int:
    from .checks import run_check

    found = run_check(arguments.target, quick=arguments.quick)
    _print(arguments, found.model_dump(mode="json"), str(found))
    return 0 if found.ok else 1


def _doctor(arguments: argparse.Namespace) -> int:
    from .console import doctor_text
    from .jobs.doctor import examine

    found = examine()
    _print(arguments, found, doctor_text(found))
    return 0 if found["ok"] else 1
