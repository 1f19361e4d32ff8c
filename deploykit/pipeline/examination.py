"""What this machine can do, for `deploykit doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploykit import backends, machine


@dataclass(frozen=True)
class Examination:
    """The machine and its backends, as values and as lines."""

    machine: dict[str, Any]
    backends: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"machine": self.machine, "backends": list(self.backends), "warnings": list(self.warnings)}

    @property
    def machine_lines(self) -> list[str]:
        """The machine in a few lines."""
        return machine.lines(self.machine)

    @property
    def backend_rows(self) -> list[list[str]]:
        """name, versions, precisions, what it can do here."""
        return [
            [
                b["name"],
                ", ".join(f"{k} {v}" for k, v in b["versions"].items()) or "-",
                " ".join(b["precisions"]) or "-",
                b["here"],
            ]
            for b in self.backends
        ]


def examine() -> Examination:
    """Looks at the machine and asks every backend; imports no engine."""
    found = []
    for name in backends.names():
        backend = backends.get(name)
        missing = backend.missing()
        cannot = None if missing else backend.cannot_run()
        if missing:
            here = f"missing: {missing.why} -> {missing.remedy}"
        elif cannot:
            here = f"builds for {', '.join(backend.targets())}; cannot run here: {cannot.why} -> {cannot.remedy}"
        else:
            here = "ready"
        found.append(
            {
                "name": name,
                "versions": {} if missing else backend.versions(),
                "precisions": [] if missing else list(backend.precisions()),
                "available": missing is None,
                "runs_here": missing is None and cannot is None,
                "here": here,
            }
        )
    clash = machine.clash()
    return Examination(machine.describe(), tuple(found), (clash,) if clash else ())
