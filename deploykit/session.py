"""The seams between deploykit and the engines: Backend makes and opens them, Session runs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from deploykit.artifact import Artifact, Json
from deploykit.samples import Samples
from deploykit.signature import Feeds, Outputs, ShapeRange, Signature

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-dynamic", "mixed")
# How a session keeps images and filters in memory; the first is what nobody has to ask for.
LAYOUTS = ("channels-first", "channels-last")


@dataclass(frozen=True)
class Missing:
    """Why something cannot run here, and the command or the hardware that would change it."""

    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.why}; {self.remedy}"


@dataclass(frozen=True)
class BuildRequest:
    """What an engine is to be: precision by name, hardware target ('cpu', 'sm75', ...), batches, other axes' ranges.

    `calibration`: the samples for a backend that quantizes by itself (its `graph` says 'source-calibrated'), else None.
    """

    precision: str
    target: str = "cpu"
    batches: tuple[int, ...] = (1, 8)
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    options: Mapping[str, Json] = field(default_factory=dict)
    calibration: Samples | None = None


@dataclass(frozen=True)
class OpenRequest:
    """How an engine is to be opened: at one batch, on so many threads."""

    precision: str
    batch: int
    threads: int
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    options: Mapping[str, Json] = field(default_factory=dict)


class Session(Protocol):
    """An open engine. `precision`, `device` and `threads` say what it really uses, not what was asked for.

    A session may have `streams`: how many calls that `bind` made may run at once, each in a thread of its own; without it,
    one at a time. It does where its backend says `concurrent = True` and `OpenRequest.options['streams']` asked for it.
    """

    signature: Signature
    precision: str
    device: str
    threads: int
    notes: tuple[str, ...]

    def infer(self, feeds: Feeds) -> Outputs:
        """Finished outputs on the host, by name, for inputs of exactly the opened batch."""
        ...

    def bind(self, feeds: Feeds) -> Callable[[], object]:
        """A call that runs once on these inputs and returns when finished outputs lie on the host.

        What it does is what the bench times: host in, host out. Input arrays may be bound beforehand, where the
        engine's API allows that without leaving work out of the call.
        """
        ...

    def close(self) -> None:
        """Frees the engine."""
        ...


class Backend(Protocol):
    """One engine kind. Importing its module is free; `missing` and `versions` import nothing heavy.

    A backend may also say `concurrent = True` (its sessions can run several requests at once), `layouts` (those of LAYOUTS that
    `OpenRequest.options['layout']` can ask of it; without it, its engines choose by themselves), `from_fp32` (precisions for which
    `build` takes its own FP32 engine in place of the source, so that one conversion serves them all) and `opening_s` (about how
    long a process takes to open an engine and warm it up).
    """

    name: str
    extra: str

    def missing(self) -> Missing | None:
        """Why this backend cannot build here, and the fix; None when it can."""
        ...

    def cannot_run(self) -> Missing | None:
        """Why a finished engine cannot run here (no runtime, no GPU), and the fix; None when it can. Asks nothing that only
        building needs: an engine from another machine may be all there is."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the packages whose change makes another engine."""
        ...

    def precisions(self) -> tuple[str, ...]:
        """The precisions it offers by default on this machine, best known first."""
        ...

    def unsupported(self, precision: str, target: str) -> Missing | None:
        """Why this precision cannot be had from this backend on this target; None when it can."""
        ...

    def targets(self) -> tuple[str, ...]:
        """The hardware targets it builds for by default: ('cpu',) or ('sm75', 'sm89')."""
        ...

    def all_targets(self) -> tuple[str, ...]:
        """Every hardware target it knows how to build for."""
        ...

    def graph(self, precision: str) -> str:
        """What it makes an engine of, for a precision: a graph ('fp32' | 'fp16' | 'int8-cpu' | 'int8-tensorrt' | 'int8-dynamic' |
        'mixed'), or the PyTorch source: 'source', and 'source-calibrated' where it quantizes the source by itself, from
        the samples in `BuildRequest.calibration`."""
        ...

    def build(self, artifact: Artifact, request: BuildRequest, folder: Path) -> Artifact:
        """The engine, written into `folder` (unsaved manifest). Raises BackendFailed or ModelError."""
        ...

    def open(self, engine: Artifact, request: OpenRequest) -> Session:
        """A session on an engine of this backend. Raises InputError, MissingBackend or BackendFailed."""
        ...
