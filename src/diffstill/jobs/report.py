"""``diffstill report``: pages from receipts."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..report.arena import ArenaResult
from ..report.page import write_arena, write_comparison, write_report
from ..report.receipt import Receipt


def report(runs: list[Path], out: Path | None) -> Path:
    """One run: its page again. Several: one page that compares them.

    Raises:
        InputError: no run, or a folder or another file in the page's place.
    """
    if out is not None and out.is_dir():
        raise InputError("out", str(out), f"name the page: {out / 'report.html'}", problem="is a folder")
    if out is not None and out.suffix not in (".html", ".htm"):
        raise InputError("out", str(out), "name a page that ends in .html", problem="is no page")
    if len(runs) == 1 and (runs[0] / "arena.json").is_file():
        path = out or runs[0] / "report.html"
        write_arena(ArenaResult.load(runs[0] / "arena.json"), path, runs[0])
        return path
    found = [(run, Receipt.load(receipt_of(run))) for run in runs]
    if len(found) == 1:
        run_dir = receipt_of(runs[0]).parent
        path = out or run_dir / "report.html"
        write_report(found[0][1], run_dir, path)
        return path
    path = out or Path("compare.html")
    write_comparison([(receipt_of(run).parent, receipt) for run, receipt in found], path)
    return path


def receipt_of(run: Path) -> Path:
    """The receipt of a run folder, or the file itself."""
    path = run / "receipt.json" if run.is_dir() else run
    if not path.is_file():
        raise InputError("run", str(run), "give a finished run folder", problem="has no receipt.json")
    return path
