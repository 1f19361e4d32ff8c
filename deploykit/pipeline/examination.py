"""What this machine can do, for `deploykit doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deploykit import backends, machine

# What the fast CPU kernels ask for: FP32, INT8 dot products, BF16, matrix tiles.
_SHOWN = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


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
        m = self.machine
        memory = m.get("memory_bytes")
        features = [f for f in _SHOWN if f in m["features"]]
        lacking = [f for f in _SHOWN if f not in m["features"]]
        gpus = [f"{g.get('name')} (driver {g.get('driver_version', g.get('driver', '?'))})" for g in m["gpus"]]
        return [
            f"cpu      {m['cpu']}, {m['cores']} cores, {m['threads']} usable" + (f", {memory / 2**30:.1f} GiB" if memory else ""),
            f"has      {', '.join(features) or 'none of the extensions that quantized kernels use'}",
            f"lacks    {', '.join(lacking) or 'nothing'}",
            f"gpu      {'; '.join(gpus) or 'none (TensorRT engines are built here and run elsewhere)'}",
            f"system   {m['os']}, Python {m['python']}",
        ]

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
