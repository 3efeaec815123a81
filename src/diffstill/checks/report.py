"""What a conformance check says: named outcomes, readable by people and machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from pydantic import BaseModel, ConfigDict, computed_field

Check = tuple[str, Callable[[], str]]
"""A name, and a function that returns a detail for the reader, or raises ``Broken`` or ``NotApplicable``."""


class Broken(Exception):
    """The rule is broken; the message says how, with numbers."""


class NotApplicable(Exception):
    """The rule cannot be tried here; the message says why."""


class Outcome(BaseModel):
    """One rule. ``ok`` is also True where it was skipped."""

    model_config = ConfigDict(frozen=True)

    name: str
    ok: bool
    detail: str = ""
    seconds: float = 0.0
    skipped: bool = False

    def __str__(self) -> str:
        mark = "skip" if self.skipped else "ok" if self.ok else "FAIL"
        return f"{mark:<5} {self.name:<22} {self.detail}".rstrip()


class Report(BaseModel):
    """The outcomes of all rules for one target."""

    model_config = ConfigDict(frozen=True)

    target: str
    outcomes: tuple[Outcome, ...]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """True unless a rule is broken."""
        return all(outcome.ok for outcome in self.outcomes)

    def __getitem__(self, name: str) -> Outcome:
        """The outcome of a rule by its name."""
        for outcome in self.outcomes:
            if outcome.name == name:
                return outcome
        raise KeyError(name)

    def __str__(self) -> str:
        failed = sum(not outcome.ok for outcome in self.outcomes)
        skipped = sum(outcome.skipped for outcome in self.outcomes)
        held = len(self.outcomes) - failed - skipped
        verdict = "conforms" if self.ok else "does not conform"
        lines = [f"{self.target} {verdict}: {held} rules hold, {failed} broken, {skipped} skipped"]
        return "\n".join(lines + [f"  {outcome}" for outcome in self.outcomes])


def run_checks(target: str, checks: Iterable[Check]) -> Report:
    """Tries every rule; an unforeseen exception counts as a broken rule and the others are still tried."""
    return Report(target=target, outcomes=tuple(_outcome(name, check) for name, check in checks))


def _outcome(name: str, check: Callable[[], str]) -> Outcome:
    began = time.monotonic()
    ok, skipped = True, False
    try:
        detail = check()
    except NotApplicable as reason:
        detail, skipped = str(reason), True
    except Broken as reason:
        detail, ok = str(reason), False
    except Exception as error:  # a method under test may raise anything; the report is where its author reads it
        detail, ok = f"raised {type(error).__name__}: {error}", False
    seconds = round(time.monotonic() - began, 3)
    return Outcome(name=name, ok=ok, detail=" ".join(detail.split())[:400], seconds=seconds, skipped=skipped)
