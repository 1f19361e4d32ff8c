"""build-trt: TensorRT engines of an .onnx file, one per target and precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.errors import EXIT_FAILED, EXIT_PASSED, BackendFailed, InputError, MissingBackend, UnknownName
from deploykit.pipeline import building
from deploykit.pipeline.limited import Limits
from deploykit.pipeline.request import DataRequest, Narrator
from deploykit.session import Backend, BuildRequest
from deploykit.signature import ShapeRange
from deploykit.trt import plan

INT8_MODES = ("explicit", "implicit")
CHOICES = {"auto": "", "rtx": "tensorrt-rtx", "tensorrt-rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class TrtRequest:
    """Which engines to build."""

    model: Path
    precisions: tuple[str, ...]
    targets: tuple[str, ...] | None
    batches: tuple[int, ...]
    backend: str
    allow_fallback: bool
    shapes: Mapping[str, ShapeRange]
    explain: bool = False
    int8_mode: str = "explicit"
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class TrtResult:
    """The engines, what to know about them, and the exit code."""

    engines: tuple[Artifact, ...]
    warnings: tuple[str, ...]
    exit_code: int


def backend_for(choice: str) -> str:
    """The backend that --backend names; auto: full TensorRT where it imports and a GPU is there, else TensorRT-RTX."""
    if choice not in CHOICES:
        raise UnknownName("TensorRT backend", choice, CHOICES)
    if CHOICES[choice]:
        return CHOICES[choice]
    if "tensorrt" in backends.names():
        full = backends.get("tensorrt")
        if full.missing() is None and full.cannot_run() is None:
            return "tensorrt"
    return "tensorrt-rtx"


def build(
    request: TrtRequest, data: DataRequest, out: Path, narrator: Narrator, tell: Callable[[str], None] = lambda _: None
) -> TrtResult:
    """Builds every engine asked for. An engine whose layers run in another precision than asked is a failure, unless
    fallback is allowed; a target that cannot have the precision at all is one too.

    `tell` hears what is to be expected of each engine before anything is built.
    """
    name = backend_for(request.backend)
    backend = backends.get(name)
    missing = backend.missing()
    if missing is not None:
        raise MissingBackend(f"{name}: {missing.why}", missing.remedy)
    for target in request.targets or ():
        if target not in backend.all_targets():
            raise UnknownName("target", target, backend.all_targets())
    implicit = _implicit(request, name, data)
    chosen, warnings = _chosen(request, backend, implicit)
    lines = [line for wanted, _ in chosen for line in plan.expectations(wanted.precision, wanted.target, name)]
    for line in dict.fromkeys(lines):
        tell(line)
    if not chosen:
        raise BackendFailed("; ".join(warnings), "choose another --target or precision")
    engines: list[Artifact] = []
    failed = bool(warnings)
    with building.Graphs(request.model, data, narrator, request.shapes, out) as graphs:
        for wanted, allow in chosen:
            kind = building.require_buildable(name, wanted, allow=allow)
            part = out / f"{request.model.stem}-{wanted.precision}-{wanted.target}-failing.onnx" if request.explain else None
            for finding in graphs.lint(kind, name):
                tell(f"{finding.code}: {finding.message}; {finding.remedy}")
            graph = graphs.of(kind)
            extras = building.Extras(allow, graphs.notes(kind), part, request.limits)
            engine = building.build_engine(graph, request.model, name, wanted, out, graphs.folder, narrator, extras)
            engines.append(engine)
            fell_back = engine.facts.get("fell_back")
            if fell_back and not request.allow_fallback:
                warnings.append(f"{engine.path.name} for {wanted.target}: {fell_back}; --allow-fallback accepts it")
                failed = True
    return TrtResult(tuple(engines), tuple(warnings), EXIT_FAILED if failed else EXIT_PASSED)


def _chosen(
    request: TrtRequest, backend: Backend, implicit: Mapping[str, str]
) -> tuple[list[tuple[BuildRequest, bool]], list[str]]:
    """What is to be built, with whether the backend would not vouch for it, and why the rest of what was asked for is not."""
    chosen, refused = [], []
    for target in request.targets or backend.targets():
        for precision in request.precisions:
            cannot = backend.unsupported(precision, target)
            if cannot is not None and not (request.allow_fallback and precision == "int8"):
                refused.append(f"not built: {precision} for {target}: {cannot}; --allow-fallback builds it all the same"
                               if precision == "int8" else f"not built: {precision} for {target}: {cannot}")  # fmt: skip
                continue
            options = {"allow_fallback": request.allow_fallback, **(implicit if precision == "int8" else {})}
            wanted = BuildRequest(precision, target, request.batches, dict(request.shapes), options)
            chosen.append((wanted, cannot is not None))
    return chosen, refused


def _implicit(request: TrtRequest, name: str, data: DataRequest) -> dict[str, str]:
    """The build options of implicit INT8: none for explicit. Raises InputError where there is no calibrator, or no cache."""
    if request.int8_mode not in INT8_MODES:
        raise UnknownName("--int8-mode", request.int8_mode, INT8_MODES)
    if request.int8_mode == "explicit":
        return {}
    if name != "tensorrt":
        raise InputError(
            f"{name} has no INT8 calibrators, so there is no implicit INT8", "leave --int8-mode out, or use --backend tensorrt"
        )
    if data.calib_table is None:
        raise InputError("implicit INT8 reads a calibration cache", "give --calib: our calib.json, or TensorRT's text cache")
    return {"calibration": str(data.calib_table)}
