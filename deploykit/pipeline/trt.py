"""build-trt: TensorRT engines of an .onnx file, one per target and precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deploykit import backends
from deploykit.artifact import Artifact, Json
from deploykit.errors import EXIT_BACKEND, EXIT_FAILED, EXIT_PASSED, BackendFailed, InputError, MissingBackend, UnknownName
from deploykit.pipeline import building, prediction
from deploykit.pipeline.limited import Limits
from deploykit.pipeline.request import DataRequest, Narrator
from deploykit.session import Backend, BuildRequest
from deploykit.signature import ShapeRange
from deploykit.trt import plan

INT8_MODES = ("explicit", "implicit")
_IMPLICIT = ("with implicit INT8 TensorRT chooses what runs in INT8, so no graph says it", "--int8-mode explicit has one")
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
    profile_each_batch: bool = False
    timing_cache: Path | None = None
    workspace_bytes: int | None = None
    judge_n: int = prediction.DEFAULT_N  # samples of DATA that judge the graphs on the CPU, at most; 0: none


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
    if "tensorrt" in backends.names() and backends.get("tensorrt").missing() is None:
        return "tensorrt"
    return "tensorrt-rtx"


def build(
    request: TrtRequest, data: DataRequest, out: Path, narrator: Narrator, tell: Callable[[str], None] = lambda _: None
) -> TrtResult:
    """Builds every engine asked for. An engine whose layers run in another precision than asked is a failure, unless
    fallback is allowed; a target asked for by name that cannot have the precision at all is one too (where none was named, the
    default ones that can are built, and the others told). Where one of several fails to build, the
    others are built all the same.

    `tell` hears what is to be expected of each engine before anything is built.
    """
    backend = _able_backend(request)
    chosen, refused, left = _chosen(request, backend, _implicit(request, backend.name, data))
    for line in _expected(request, data, backend.name, [wanted for wanted, _ in chosen], left):
        tell(line)
    if not chosen:
        raise BackendFailed("; ".join([*refused, *left]), "choose another --target or precision")
    with building.Graphs(request.model, data, narrator, request.shapes, out, request.judge_n) as graphs:
        builds = _Builds(request, backend.name, graphs, out, narrator, refused)
        builds.lint(chosen, tell)
        for asked, allow in chosen:
            builds.add(asked, allow, alone=len(chosen) == 1)
    if not builds.engines:
        raise BackendFailed("; ".join(builds.warnings), "build one at a time to see more, with --explain for the node")
    return TrtResult(tuple(builds.engines), (*left, *builds.warnings), builds.exit_code)


def _able_backend(request: TrtRequest) -> Backend:
    """The backend to build with. Raises MissingBackend where it is not here, UnknownName for a target it does not know."""
    backend = backends.get(backend_for(request.backend))
    missing = backend.missing()
    if missing is not None:
        raise MissingBackend(f"{backend.name}: {missing.why}", missing.remedy)
    for target in request.targets or ():
        if target not in backend.all_targets():
            raise UnknownName("target", target, backend.all_targets())
    return backend


def _expected(
    request: TrtRequest, data: DataRequest, name: str, chosen: Sequence[BuildRequest], left: Sequence[str]
) -> list[str]:
    """What to expect of the engines, one sentence an item: each once."""
    lines = [line for wanted in chosen for line in plan.expectations(wanted.precision, wanted.target, name)]
    lines += left
    if any(wanted.precision != "fp32" for wanted in chosen):
        judged = data.data is not None and request.judge_n > 0 and request.int8_mode == "explicit"
        lines.append(plan.PREDICTED if judged else plan.NOT_PREDICTED)
    return list(dict.fromkeys(lines))


class _Builds:
    """The engines of one request as they are built, one after the other."""

    def __init__(
        self, request: TrtRequest, name: str, graphs: building.Graphs, out: Path, narrator: Narrator, refused: Sequence[str]
    ) -> None:
        self._request, self._name, self._graphs, self._out, self._narrator = request, name, graphs, out, narrator
        self._batches, self._fixed = building.at_fixed_batch(request.batches, graphs.model.artifact.signature)
        self.engines: list[Artifact] = []
        self.warnings = list(refused)
        self.exit_code = EXIT_FAILED if refused else EXIT_PASSED

    def lint(self, chosen: Sequence[tuple[BuildRequest, bool]], tell: Callable[[str], None]) -> None:
        """Holds each graph against the rules before any is built. Raises ChecksFailed for what the parser would refuse."""
        for kind in dict.fromkeys(building.require_buildable(self._name, wanted, allow=allow) for wanted, allow in chosen):
            for finding in self._graphs.lint(kind, self._name):
                tell(f"{finding.code}: {finding.message}; {finding.remedy}")

    def add(self, asked: BuildRequest, allow: bool, *, alone: bool) -> None:
        """Builds one more. A failure is a warning, and raised where it is `alone`."""
        wanted = replace(asked, batches=self._batches)
        try:
            engine = self._built(wanted, allow)
        except BackendFailed as exc:
            if alone:
                raise
            remedy = f"; {exc.remedy}" if exc.remedy else ""
            self.warnings.append(f"not built: {wanted.precision} for {wanted.target}: {exc.message}{remedy}")
            self.exit_code = EXIT_BACKEND
            return
        self.engines.append(engine)
        fell_back = engine.facts.get("fell_back")
        if fell_back and not self._request.allow_fallback:
            self.warnings.append(f"{engine.path.parent.name}: {fell_back}; --allow-fallback accepts it")
            self.exit_code = max(self.exit_code, EXIT_FAILED)

    def _built(self, wanted: BuildRequest, allow: bool) -> Artifact:
        request, graphs = self._request, self._graphs
        kind = building.require_buildable(self._name, wanted, allow=allow)
        implicit = bool(wanted.options.get("calibration"))
        part = f"{request.model.stem}-{wanted.precision}-{wanted.target}-failing.onnx"
        extras = building.Extras(
            allow,
            (*self._fixed, *_left_out(graphs.of(kind), kind), *graphs.notes(kind)),
            self._out / part if request.explain else None,
            request.limits,
            functools.partial(prediction.none, *_IMPLICIT) if implicit else functools.partial(graphs.predicted, kind),
        )
        return building.build_engine(
            graphs.of(kind), request.model, self._name, wanted, self._out, graphs.folder, self._narrator, extras
        )


def _left_out(graph: Artifact, kind: str) -> tuple[str, ...]:
    """What of the graph does not have the precision that was asked for, and why, where the stage that wrote it says so."""
    rows = graph.facts.get("left_in_float") or []
    if not rows or not isinstance(rows, list):
        return ()
    what = "are not quantized" if kind.startswith("int8") else "stay in float32"
    first = rows[0]
    return (
        f"{len(rows)} nodes of the {kind.split('-')[0].upper()} graph {what}, for one {first['operator']} '{first['node']}': {first['reason']}",
    )


def _chosen(
    request: TrtRequest, backend: Backend, implicit: Mapping[str, str]
) -> tuple[list[tuple[BuildRequest, bool]], list[str], list[str]]:
    """What is to be built, with whether the backend would not vouch for it; why the rest of what was asked for is not; and why
    default targets are left out."""
    chosen: list[tuple[BuildRequest, bool]] = []
    refused: list[str] = []
    left: list[str] = []
    may_fall_back = backend.name == "tensorrt-rtx"  # full TensorRT refuses only what it cannot build at all
    tuned = _tuning(request, backend)
    for target in request.targets or backend.targets():
        for precision in request.precisions:
            cannot = backend.unsupported(precision, target)
            allowable = precision == "int8" and may_fall_back
            if cannot is not None and not (request.allow_fallback and allowable):
                way = "; --allow-fallback builds it all the same" if allowable else ""
                (refused if request.targets else left).append(f"not built: {precision} for {target}: {cannot}{way}")
                continue
            options = {"allow_fallback": request.allow_fallback, **tuned, **(implicit if precision == "int8" else {})}
            wanted = BuildRequest(precision, target, request.batches, dict(request.shapes), options)
            chosen.append((wanted, cannot is not None))
    return chosen, refused, left


def _tuning(request: TrtRequest, backend: Backend) -> dict[str, Json]:
    """The build options beside precision and batch, those that were asked for. Raises InputError for what the backend ignores."""
    found: dict[str, Json] = {}
    if request.profile_each_batch:
        found["profile_each_batch"] = True
    if request.workspace_bytes is not None:
        found["workspace_bytes"] = request.workspace_bytes
    if request.timing_cache is not None:
        if backend.name != "tensorrt":
            raise InputError(
                f"{backend.name} keeps no timing cache: it times nothing while it builds", "leave --timing-cache out"
            )
        if request.timing_cache.is_dir():
            raise InputError(f"--timing-cache {request.timing_cache} is a folder", "name a file")
        found["timing_cache"] = str(request.timing_cache)
    return found


def _implicit(request: TrtRequest, name: str, data: DataRequest) -> dict[str, str]:
    """The build options of implicit INT8: none for explicit. Raises InputError where there is no calibrator, or no cache."""
    if request.int8_mode not in INT8_MODES:
        raise UnknownName("--int8-mode", request.int8_mode, INT8_MODES)
    if request.int8_mode == "explicit":
        return {}
    if "int8" not in request.precisions:
        raise InputError("--int8-mode says how INT8 engines are made, and none was asked for", "add --int8")
    if name != "tensorrt":
        raise InputError(
            f"{name} has no INT8 calibrators, so there is no implicit INT8", "leave --int8-mode out, or use --backend tensorrt"
        )
    if data.calib_table is None:
        raise InputError("implicit INT8 reads a calibration cache", "give --calib: our calib.json, or TensorRT's text cache")
    return {"calibration": str(data.calib_table)}
