"""The two kinds of failure a user meets: bad input (exit code 2) and a failed run (exit code 1)."""

from __future__ import annotations


def counted(number: int, word: str) -> str:
    """``1 class``, ``3 classes``: for messages."""
    return f"{number} {word}" if number == 1 else f"{number} {word}{'es' if word.endswith('s') else 's'}"


def install(extra: str) -> str:
    """How to install what an extra brings. diffstill is on no index: it is installed from its checkout."""
    return f"pip install '.[{extra}]' in the checkout of diffstill"


class DiffstillError(Exception):
    """Base of every error whose message is meant for the user: one line, printed without a traceback."""

    exit_code = 1


class InputError(DiffstillError):
    """Bad input: says which field, which value, and what would mend it. Exit code 2.

    Example: ``InputError("student.block_out_channels", [30, 60], "use multiples of norm_num_groups (8)")``
    prints ``student.block_out_channels: [30, 60] is not usable; use multiples of norm_num_groups (8)``.
    """

    exit_code = 2

    def __init__(self, field: str, value: object, mend: str, *, problem: str = "is not usable") -> None:
        self.field, self.value, self.mend = field, value, mend
        shown = repr(value) if isinstance(value, str) else str(value)
        if isinstance(value, bool):
            shown = shown.lower()  # as YAML and the command line spell it
        elif value is None and problem == "is not usable":
            shown = "null"
        elif value is None and problem.startswith("is missing"):
            shown = ""
        if len(shown) > 200:
            shown = shown[:197] + "..."
        super().__init__(" ".join(f"{field}: {shown} {problem}; {mend}".split()))

    @classmethod
    def about(cls, field: str, message: str) -> InputError:
        """For a message that names key, value and mend by itself: ``training: images 7 is no multiple of ...``."""
        made = cls(field, None, message)
        made.args = (" ".join(f"{field}: {message}".split()),)
        return made

    def renamed(self, field: str) -> InputError:
        """The same complaint about another field: an inner section's, as the outer one calls it."""
        return InputError.about(field, str(self).removeprefix(f"{self.field}: "))


class RunFailed(DiffstillError):
    """A run that began and could not go on (NaN loss, full disk, lost data). Exit code 1."""


class Interrupted(DiffstillError):
    """Stopped by a signal after the step was finished and saved. Exit code 128 + signal number."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
