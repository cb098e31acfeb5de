"""Errors that a user can act on. Each says the file, what was found, what was expected and the next step."""

from __future__ import annotations

import os


class VerglasError(Exception):
    """Base of all errors meant for the user: the command line prints the text as one paragraph and exits with code 2."""


class InputError(VerglasError):
    """Something given to verglas is not what it needs.

    where: the file, option or column at fault; found: what is there; expected: what was needed; fix: the next step.
    """

    def __init__(self, where: str | os.PathLike[str], found: str, expected: str = "", fix: str = "") -> None:
        self.where, self.found, self.expected, self.fix = str(where), found, expected, fix
        text = f"{self.where}: {found}"
        text += f"; expected {expected}." if expected else "."
        super().__init__(f"{text} {fix}".strip())

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str, str]]:
        return type(self), (self.where, self.found, self.expected, self.fix)  # to travel from one process to another


class OutputError(VerglasError):
    """A result could not be written (folder exists, disk full, no permission); nothing half-written is left behind."""
