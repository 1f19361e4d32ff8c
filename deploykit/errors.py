"""The errors a user can meet, and the exit code each one ends with.

    DeploykitError                    one message: what was found, what was expected, what to do next
    ├── InputError            exit 2  the user's input: a file, a name, an option, the data
    │   ├── ModelError                a model that cannot be read, or is not what it claims to be
    │   ├── DataError                 samples, labels, images
    │   ├── UnknownName               a name that matches nothing; lists the choices and the closest one
    │   ├── StaleCalibration          a calibration table made for something else
    │   └── OutOfSpace                the disk is full
    ├── ChecksFailed          exit 1  an error-level finding: no engine could load the graph
    ├── MissingBackend        exit 3  a backend, a package or hardware that is not here
    │   └── NotForThisGraph           a precision that this graph cannot have: its rows are skipped
    └── BackendFailed         exit 4  a backend was here and failed
        └── ChildDied                 its process was killed (signal, out of memory)

Outcomes of a check are values (Finding, Verdict), never errors: exit codes 1 and 5 come from those.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_PASSED = 0
EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_MISSING = 3
EXIT_BACKEND = 4
EXIT_INCONCLUSIVE = 5
EXIT_INTERRUPTED = 130


class DeploykitError(Exception):
    """One thing that went wrong, and what to do about it.

    `message` says what was found and what was expected; `remedy` what to do next.
    """

    exit_code = EXIT_INPUT

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.remedy}" if self.remedy else self.message


class InputError(DeploykitError):
    """The user's input cannot be used as it is."""

    exit_code = EXIT_INPUT


class ModelError(InputError):
    """A model file or factory cannot be read or is not what it claims to be."""


class DataError(InputError):
    """Samples, images or labels cannot be used as they are."""


class StaleCalibration(InputError):
    """A calibration table was made for another model, data set or preprocessing."""


class OutOfSpace(InputError):
    """No room on the disk; whatever was half-written has been removed."""


class UnknownName(InputError):
    """A name that matches none of the choices; the message names the closest one."""

    def __init__(self, kind: str, name: str, choices: Iterable[str]) -> None:
        known = sorted(choices)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'? " if close else ""
        shown = ", ".join(known[:40]) + (f", ... ({len(known)} in all)" if len(known) > 40 else "")
        super().__init__(f"unknown {kind} '{name}'", f"{hint}choose from: {shown}")
        self.args = (kind, name, tuple(known))


class ChecksFailed(DeploykitError):
    """An error-level finding about the graph stops the line."""

    exit_code = EXIT_FAILED


class MissingBackend(DeploykitError):
    """A backend, package or device that this machine does not have."""

    exit_code = EXIT_MISSING


class NotForThisGraph(MissingBackend):
    """A precision that the graph cannot be given: nothing in it can be quantized, say."""


class BackendFailed(DeploykitError):
    """A backend that is here could not build, open or run the model."""

    exit_code = EXIT_BACKEND


class ChildDied(BackendFailed):
    """A child process ended by a signal or without an answer."""
