"""One engine of an .onnx file: what `build` and `build-trt` do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from deploykit import backends, children
from deploykit.artifact import Artifact, Json
from deploykit.calibration_table import IMPORTED, CalibrationTable
from deploykit.errors import BackendFailed, ChecksFailed, InputError, MissingBackend, ModelError
from deploykit.pipeline import int8, limited, prediction, prepare
from deploykit.pipeline.delivered import deliver_engine, scratch_beside
from deploykit.pipeline.int8 import Int8Recipe
from deploykit.pipeline.limited import Limits
from deploykit.pipeline.request import DataRequest, Narrator
from deploykit.pipeline.single import make_table, open_model, table_and_recipe
from deploykit.pipeline.workshop import STAGE_TIMEOUT_S
from deploykit.session import BuildRequest
from deploykit.signature import ShapeRange, Signature
from deploykit.verdict import Finding


@dataclass(frozen=True)
class Extras:
    """What else a build may be asked for. allow: build what the backend would not vouch for; explain: where to write the
    smallest part of the graph that still fails, when the build does; limits: of the child that builds,
    None for half an hour beside the search that was asked for; notes: what the engine's
    manifest should say of its graph; predicted: asked once the engine stands, for its manifest's 'predicted'."""

    allow: bool = False
    notes: tuple[str, ...] = ()
    explain: Path | None = None
    limits: Limits | None = None
    predicted: Callable[[], dict[str, Json]] | None = None


class Graphs:
    """The graphs that engines of one .onnx file are made of, each made once, in a child process that stays open between them:
    importing what makes them takes as long as some of the steps. A context manager.

    judge_n: how many samples of DATA, at most, judge the graphs (see `predicted`); then at most half of it calibrates. None:
    nothing is judged, and all of it may.
    """

    def __init__(
        self,
        path: Path,
        request: DataRequest,
        narrator: Narrator,
        shapes: Mapping[str, ShapeRange],
        out: Path,
        judge_n: int | None = None,
    ) -> None:
        self._request, self._narrator, self._shapes, self._judge_n = request, narrator, shapes, judge_n
        self._made: dict[str, Artifact] = {}
        self._imported: dict[str, tuple[str, ...]] = {}
        self._predicted: dict[str, dict[str, Json]] = {}
        self._shares: prediction.Shares | None = None
        self._table: CalibrationTable | None = None
        self._resources = ExitStack()
        try:
            if path.is_dir():
                raise InputError(f"{path} is a folder, not an .onnx file")
            self.folder = self._resources.enter_context(scratch_beside(out / "engine"))
            self._child = self._resources.enter_context(children.Child("read"))
            self.model = open_model(path, self._run)
        except BaseException as exc:
            if not self._resources.__exit__(type(exc), exc, exc.__traceback__):
                raise

    def __enter__(self) -> Graphs:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._resources.__exit__(kind, exc, trace)

    def _run(self, name: str, function: Callable[..., Any], *args: Any, **how: Any) -> Any:
        self._child.name = name
        return self._child.call(function, *args, **how)

    def of(self, kind: str) -> Artifact:
        """The graph of that kind; the model file itself where it has that precision already."""
        if kind not in self._made:
            self._made[kind] = self._make(kind)
        return self._made[kind]

    def notes(self, kind: str) -> tuple[str, ...]:
        """What there is to say of the ranges of the graph of that kind, where another tool found them."""
        return self._imported.get(kind, ())

    def lint(self, kind: str, backend_name: str) -> tuple[Finding, ...]:
        """What the backend's rules say of the graph of that kind, where it is to run in integers: before its parser sees it.
        Raises ChecksFailed for what the parser would refuse."""
        if not (kind == "mixed" or kind.startswith("int8")):
            return ()
        made = self.of(kind)
        found: list[Finding] = self._run("check", _lint, made.path, backend_name)
        if made is not self.model.artifact:  # the scales of our own graphs are chosen among those that FP16 holds
            found = [finding for finding in found if finding.code != "DK112"]
        for finding in found:
            if finding.severity == "error":
                where = f" (node {finding.node})" if finding.node else ""
                raise ChecksFailed(f"{finding.code}: {finding.message}{where}", finding.remedy)
        return tuple(found)

    def predicted(self, kind: str) -> dict[str, Json]:
        """The prediction for engines of the graph of that kind (see `prediction.of`), made once; empty for the float model."""
        if kind not in self._predicted:
            made, given = self.of(kind), self.model.artifact
            reference = given if made is not given else None
            self._predicted[kind] = (
                {} if kind == "fp32" else prediction.of(made, reference, self._split(), self._shapes, self._narrator)
            )
        return self._predicted[kind]

    def _split(self) -> prediction.Shares:
        if self._shares is None:
            table = self._given_table() if self._request.calib_table is not None and self._request.data is not None else None
            self._shares = prediction.shares(self.model, self._request, self._shapes, table, self._judge_n or 0)
        return self._shares

    def _given_table(self) -> CalibrationTable:
        """The table that --calib names. Raises what reading it raises."""
        if self._table is None:
            self._table = make_table(self.model, self.model.artifact.path, self._request, None, self._narrator, self._run)
        return self._table

    def _table_and_recipe(self) -> tuple[CalibrationTable, Int8Recipe]:
        path = self.model.artifact.path
        if self._judge_n is None:
            return table_and_recipe(self.model, path, self._request, self._narrator, self._shapes, self._run)
        chosen = self._split().calibrate
        recipe = Int8Recipe(self._request.int8, chosen)
        if self._request.calib_table is not None:
            return self._given_table(), recipe
        return make_table(self.model, path, self._request, chosen, self._narrator, self._run), recipe

    def _make(self, kind: str) -> Artifact:
        given = self.model.artifact
        quantized = kind == "mixed" or kind.startswith("int8")
        if kind == "fp32" or (quantized and self._run("read", _is_quantized, given.path)):
            return given
        if kind == "mixed":
            raise InputError(
                f"{given.path.name} is a float model, and mixed precision needs a search",
                "make the graph first: deploykit quantize MODEL --mode mixed --min-sqnr 25 --data DATA -o mixed.onnx",
            )
        table, recipe = None, Int8Recipe()
        if kind in ("int8-cpu", "int8-tensorrt"):
            table, recipe = self._table_and_recipe()
            self._imported[kind] = table.notes if table.method == IMPORTED else ()
        self._narrator.step(f"write the {kind} graph")
        place = self.folder / kind
        place.mkdir()
        made: Artifact = self._run(
            kind,
            int8.graph_of_kind,
            given.path,
            kind,
            table,
            recipe,
            place / "graph.onnx",
            timeout_s=STAGE_TIMEOUT_S,
            progress=self._narrator.progress,
        )
        return replace(made, facts={**_kept(given), **made.facts}).save()


def build_file(
    path: Path,
    backend_name: str,
    wanted: BuildRequest,
    out: Path,
    request: DataRequest,
    narrator: Narrator,
    limits: Limits | None = None,
) -> Artifact:
    """One engine of an .onnx file in the folder `out`, with its manifest; `limits` of the child that builds."""
    kind = require_buildable(backend_name, wanted)
    with Graphs(path, request, narrator, wanted.shapes, out) as graphs:
        found = tuple(f"{f.code}: {f.message}; {f.remedy}" for f in graphs.lint(kind, backend_name))
        batches, fixed = at_fixed_batch(wanted.batches, graphs.model.artifact.signature)
        extras = Extras(notes=(*fixed, *found, *graphs.notes(kind)), limits=limits)
        asked = replace(wanted, batches=batches)
        return build_engine(graphs.of(kind), path, backend_name, asked, out, graphs.folder, narrator, extras)


def at_fixed_batch(asked: tuple[int, ...], signature: Signature) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The batches to build for, and what to say where the graph has one baked in: that is a warning, not an error."""
    fixed = signature.fixed_batch
    if fixed is None or asked == (fixed,):
        return asked, ()
    others = ", ".join(str(batch) for batch in asked if batch != fixed)
    return (fixed,), (f"the graph has batch {fixed} baked in: built for that, not for {others}",)


def kind_of(backend_name: str, wanted: BuildRequest, *, allow: bool = False) -> str:
    """The kind of graph that the backend makes this engine of. Raises MissingBackend where it cannot."""
    backend = backends.get(backend_name)
    missing = backend.missing() or (None if allow else backend.unsupported(wanted.precision, wanted.target))
    if missing is not None:
        raise MissingBackend(f"{backend_name} {wanted.precision}: {missing.why}", missing.remedy)
    return "fp32" if wanted.options.get("calibration") else backend.graph(wanted.precision)  # implicit INT8: the float graph


def require_buildable(backend_name: str, wanted: BuildRequest, *, allow: bool = False) -> str:
    """`kind_of`. Raises InputError where the backend takes no .onnx file."""
    kind = kind_of(backend_name, wanted, allow=allow)
    if kind.startswith("source"):
        raise InputError(
            f"{backend_name} makes its engines of PyTorch sources, not of .onnx files",
            f"give the source: deploykit build SOURCE --backend {backend_name} ...",
        )
    return kind


def build_engine(
    graph: Artifact,
    path: Path,
    backend_name: str,
    wanted: BuildRequest,
    out: Path,
    scratch: Path,
    narrator: Narrator,
    extras: Extras | None = None,
) -> Artifact:
    """The engine of a prepared graph of the model at `path`, in `out`, made in a folder of its own under `scratch`."""
    extras = extras or Extras()
    narrator.step(f"build {backend_name} {wanted.precision} {wanted.target}")
    start = time.perf_counter()
    place = scratch / f"built-{backend_name}-{wanted.precision}-{wanted.target}"
    place.mkdir()
    name = f"build {backend_name}"
    limits = extras.limits or limited.Limits(STAGE_TIMEOUT_S + float(wanted.options.get("tune", 0)))
    try:
        made: Artifact = limited.run(
            name, prepare.build_engine, backend_name, graph, wanted, place, limits=limits, progress=narrator.progress
        )
    except BackendFailed as exc:
        if extras.explain is None:
            raise
        from deploykit.pipeline.explaining import explained

        narrator.step("explain: looking for the smallest part of the graph that still fails")
        raise explained(exc, backend_name, graph, wanted, extras.explain, limits, scratch) from exc
    options = {
        "backend": backend_name,
        "precision": wanted.precision,
        "target": wanted.target,
        "batches": list(wanted.batches),
        "model": path.stem,
    }
    found = {"build_s": time.perf_counter() - start, **_kept(graph), **made.facts}
    if notes := [*extras.notes, *made.facts.get("notes", [])]:
        found["notes"] = notes
    if predicted := extras.predicted() if extras.predicted is not None else {}:
        found["predicted"] = predicted
    made = replace(
        made,
        stage="engine",
        precision=wanted.precision,
        device=wanted.target,
        parent=graph.sha256,
        options={**made.options, **options},
        versions={**made.versions, **backends.get(backend_name).versions()},
        facts=found,
    )
    folder = f"{path.stem}-{backend_name}-{wanted.precision}" + ("" if wanted.target == "cpu" else f"-{wanted.target}")
    return deliver_engine(made, out / folder)


def _kept(model: Artifact) -> dict[str, Json]:
    """What `predict` and `package` need to know of a model, in every engine of it."""
    return {name: model.facts[name] for name in ("preprocess", "classes") if model.facts.get(name)}


def _lint(path: Path, backend_name: str) -> list[Finding]:
    from deploykit.stages import checks

    return checks.lint(path, backend_name)


def _is_quantized(path: Path) -> bool:
    from deploykit import graph, observation

    try:
        observation.require_float(graph.load(path), path)
    except ModelError:
        return True
    return False
