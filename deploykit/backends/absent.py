"""Backends that deploykit knows by name and does not have yet: asked for, each is a skipped row, never an unknown name."""

# ruff: noqa: ARG002 - the parameters are the protocol's, and nothing is ever made of them

from __future__ import annotations

from pathlib import Path

from deploykit.artifact import Artifact
from deploykit.errors import MissingBackend
from deploykit.session import BuildRequest, Missing, OpenRequest, Session


class Absent:
    """A backend that is not in this version; `title` is the engine's own name."""

    def __init__(self, name: str, title: str) -> None:
        self.name = self.extra = name
        self.title = title

    def missing(self) -> Missing:
        """That it is not in this version, and what is."""
        return Missing(f"{self.title} is not in this version of deploykit", "choose one that `deploykit doctor` shows as ready")

    def cannot_run(self) -> Missing:
        """The same as `missing`."""
        return self.missing()

    def versions(self) -> dict[str, str]:
        """None."""
        return {}

    def precisions(self) -> tuple[str, ...]:
        """FP32, so that a backend asked for by name has one row that says why it is skipped."""
        return ("fp32",)

    def unsupported(self, precision: str, target: str) -> Missing:
        """The same as `missing`, whatever the precision and the target."""
        return self.missing()

    def targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def all_targets(self) -> tuple[str, ...]:
        """The CPU."""
        return ("cpu",)

    def graph(self, precision: str) -> str:
        """The FP32 graph; none is ever made for it."""
        return "fp32"

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """Raises MissingBackend."""
        raise MissingBackend(f"{self.name}: {self.missing().why}", self.missing().remedy)

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """Raises MissingBackend."""
        raise MissingBackend(f"{self.name}: {self.missing().why}", self.missing().remedy)


BACKENDS: dict[str, Absent] = {}
