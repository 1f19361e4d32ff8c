"""The whole line: sources -> rows -> engines -> measurements -> report. `run` and `bench` are both this."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploykit import backends, calibration_table, data, machine, preprocess
from deploykit.artifact import Artifact
from deploykit.children import side_by_side
from deploykit.data.images import ImageReader
from deploykit.errors import (
    ChecksFailed,
    DataError,
    DeploykitError,
    InputError,
    MissingBackend,
    OutOfSpace,
    StaleCalibration,
    UnknownName,
)
from deploykit.pipeline import assemble, engines, measuring, mixed, prepare
from deploykit.pipeline.int8 import Int8Recipe
from deploykit.pipeline.measuring import Entry
from deploykit.pipeline.plan import PlannedRow, check_names, plan
from deploykit.pipeline.prepare import Workshop
from deploykit.pipeline.request import DataRequest, Narrator, RowsRequest, Silent, SourceRequest
from deploykit.preprocess import Preprocess
from deploykit.report_document import Report
from deploykit.row import Row
from deploykit.samples import Samples
from deploykit.signature import Feeds, ShapeRange, Signature
from deploykit.stages import bench
from deploykit.stages.mixed import Budget
from deploykit.store import Store

_CALIBRATED = ("int8-cpu", "int8-tensorrt", "int8-dynamic", "mixed")


@dataclass(frozen=True)
class LineRequest:
    """What a run or a bench is asked for. `targets` are sources, engines or folders of engines."""

    targets: tuple[SourceRequest, ...]
    data: DataRequest = field(default_factory=DataRequest)
    rows: RowsRequest = field(default_factory=RowsRequest)
    store: Path = Path("engines")
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class LineResult:
    """The report, and what it was made from: the engines of its rows and the per-sample outcomes."""

    report: Report
    entries: tuple[Entry, ...]
    built: tuple[Artifact, ...]
    results: measuring.Results | None
    exit_code: int
    made: tuple[str, ...]
    reused: tuple[str, ...]
    workshops: tuple[Workshop, ...] = ()


@dataclass
class _Model:
    """One target on its way: its planned rows, and per engine the artifact or what stopped it."""

    name: str
    signature: Signature
    rows: list[PlannedRow]
    shop: Workshop | None
    built: dict[tuple[str, str, str, str], Artifact | DeploykitError] = field(default_factory=dict)

    def runs(self) -> set[tuple[str, str, str, str]]:
        """The engines that were built and can run here."""
        return {
            r.engine_key for r in self.rows if not r.skip and r.runnable and isinstance(self.built.get(r.engine_key), Artifact)
        }


def run(request: LineRequest, narrator: Narrator | None = None) -> LineResult:
    """Everything that was asked for, as a report. Rows that cannot run say why; only a target that no engine could load
    raises (ModelError, ChecksFailed), and a name that deploykit does not know (UnknownName)."""
    say = narrator or Silent()
    _check(request)
    store = Store(request.store)
    models = [m for target in request.targets for m in _open(target, request, store, say)]
    _name_apart(models)
    first = models[0]
    samples = _samples(first, request.data, request.rows)
    shapes = _shapes(first.signature, samples.judge, request.rows)
    rows = replace(request.rows, shapes=shapes)
    for model in models:
        if model.shop is not None:
            _build(model, samples, request.data, rows)
    reference = assemble.one_reference(first.rows, [r for m in models for r in m.rows], {k for m in models for k in m.runs()})
    entries = [e for m in models for e in _entries(m, reference)]
    predictions = [p for m in models if m.shop is not None for p in engines.predictions(m.shop, m.rows, m.built)]
    results = None
    if entries:
        pools, pool_digest = _pools(first.signature, samples.judge, entries, rows)
        results = measuring.take(entries, predictions, samples.judge, pools, pool_digest, rows, store, say)
    table = [row for m in models for row in assemble.rows_of(m.rows, m.built, results, rows)]
    report = _report(request, models, samples, table, results, reference)
    built = tuple(a for m in models for a in m.built.values() if isinstance(a, Artifact))
    return LineResult(
        report,
        tuple(entries),
        built,
        results,
        assemble.exit_code(table, [r for m in models for r in m.rows], request.rows, results),
        made=tuple(x for m in models if m.shop for x in m.shop.made),
        reused=tuple(x for m in models if m.shop for x in m.shop.reused),
        workshops=tuple(m.shop for m in models if m.shop),
    )


def _check(request: LineRequest) -> None:
    """Raises what is wrong with the request by itself, before anything is spent on it."""
    check_names(request.rows)
    bench.duration(request.rows.duration)
    if not request.rows.batches or min(request.rows.batches) < 1:
        raise InputError(f"--batch must name positive sizes, not {request.rows.batches}", "example: --batch 1,8")
    if request.data.method not in calibration_table.METHODS:
        raise UnknownName("calibration method", request.data.method, calibration_table.METHODS)
    if request.data.calib_table is not None:
        calibration_table.load(request.data.calib_table)


def _open(target: SourceRequest, request: LineRequest, store: Store, say: Narrator) -> list[_Model]:
    path = Path(target.text)
    found = engines.find(path)
    if found:
        return [_engine_model(engine, request.rows) for engine in found]
    if path.is_dir():
        raise InputError(
            f"the folder {path} holds no deploykit engines (*.manifest.json)", "give an .onnx file, an engine or a SOURCE"
        )
    shop = prepare.open_source(target, store, say, batches=request.rows.batches)
    chosen = request.rows.backends or backends.names()
    prepare.check(shop, tuple(b for b in chosen if b not in ("torch", "torch-compile")))
    errors = [f for f in shop.findings if f.severity == "error" and f.target == "any"]
    if errors:
        raise ChecksFailed(
            f"{errors[0].code}: {errors[0].message}" + (f" (node {errors[0].node})" if errors[0].node else ""), errors[0].remedy
        )
    base = shop.base_precision
    rows = plan(shop.name, shop.spec.kind, shop.signature, request.rows, base_precision=base, findings=shop.findings)
    return [_Model(shop.name, shop.signature, rows, shop)]


def _engine_model(engine: Artifact, request: RowsRequest) -> _Model:
    """A ready-made engine as a target: one row a batch on the backend that made it."""
    backend_name = str(engine.options.get("backend", ""))
    backend = backends.get(backend_name)
    name = str(engine.options.get("model") or engine.path.stem)
    if request.backends is not None and backend_name not in request.backends:
        raise InputError(f"{engine.path.name} is an engine of {backend_name}, not of {', '.join(request.backends)}")
    missing = backend.missing() or backend.cannot_run()
    if missing is not None:
        raise MissingBackend(f"{engine.path.name} cannot run here: {missing.why}", missing.remedy)
    fixed = engine.signature.fixed_batch
    batches = (fixed,) if fixed is not None else request.batches
    rows = [PlannedRow(name, backend_name, engine.precision, engine.device, batch) for batch in batches]
    return _Model(name, engine.signature, rows, None, {rows[0].engine_key: engine})


def _name_apart(models: Sequence[_Model]) -> None:
    """Gives two targets of one name and the same rows names of their own: model, model#2."""
    seen: dict[tuple[str, str, str, str], int] = {}
    for model in models:
        keys = {row.engine_key for row in model.rows}
        clash = max((seen.get(key, 0) for key in keys), default=0)
        for key in keys:
            seen[key] = clash + 1
        if clash:
            model.name = f"{model.name}#{clash + 1}"
            renamed = [replace(row, name=model.name) for row in model.rows]
            model.built = {(model.name, *key[1:]): value for key, value in model.built.items()}
            model.rows = renamed


@dataclass(frozen=True)
class Shares:
    """Which samples judge and which calibrate; None where no data was given."""

    judge: Samples | None = None
    calibrate: Samples | None = None
    tune: Samples | None = None  # of a mixed row's search


def _samples(model: _Model, request: DataRequest, rows: RowsRequest) -> Shares:
    """The two disjoint shares of the data, made ready for the model."""
    if request.data is None and request.calib_data is None:
        return Shares()
    classes, own = _classes(model, request.classes), _preprocess(model, request.preprocess)

    def opened(spec: str, *, judges: bool) -> Samples:
        found = data.open(spec, model.signature, preprocess=own, classes=classes, limit=request.limit, shapes=rows.shapes)
        if judges and classes is None:
            _needs_class_order(model, found)
        return found

    calib = opened(request.calib_data, judges=False) if request.calib_data is not None else None
    if request.data is None:
        return Shares(None, calib)
    everything = opened(request.data, judges=True)
    if calib is None and (not _calibrates(model) or len(everything) == 1):
        held_out = data.held_out(everything, exclude=_trained_on(model, everything))
        return Shares(held_out, None)
    searches = _searches(model)
    wanted = request.calib_n + (mixed.TUNE_N if searches else 0)
    calibrate, judge = data.split(everything, calib=calib, calib_n=wanted, exclude=_trained_on(model, everything))
    if not searches:
        return Shares(judge, calibrate)
    return Shares(judge, *mixed.tuning_share(calibrate))


def _calibrates(model: _Model) -> bool:
    """Whether a row to come needs calibration samples."""
    return any(not row.skip and backends.get(row.backend).graph(row.precision) in _CALIBRATED for row in model.rows)


def _searches(model: _Model) -> bool:
    """Whether a row to come is mixed precision on a budget, which samples of its own tune."""
    return any(not row.skip and backends.get(row.backend).graph(row.precision) == "mixed" for row in model.rows)


def _aim(model: _Model, samples: Shares, request: DataRequest) -> mixed.Aim | None:
    """What a mixed row is to keep; None without such a row. Raises InputError where nothing says it, or nothing can tune it."""
    if not _searches(model):
        return None
    budget = request.budget or Budget()  # which raises: there is none
    if samples.tune is None:
        raise InputError("mixed precision needs samples to calibrate and to tune on", "add --data DATA")
    return mixed.Aim(budget, samples.tune)


def _needs_class_order(model: _Model, samples: Samples) -> None:
    """Raises InputError for class folders and a graph that names no classes: the order of its outputs is never guessed."""
    bare = model.shop is None or model.shop.spec.kind == "onnx"
    if bare and samples.labels is not None and isinstance(samples.reader, ImageReader):
        names = samples.classes or ()
        shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
        raise InputError(
            f"{samples.spec} has a sub-folder a class ({shown}), and nothing says in which order the model's outputs are",
            f"add --classes FILE, one class name a line in the model's order; where that is the alphabetical one: "
            f"ls {samples.spec} > classes.txt",
        )


def _preprocess(model: _Model, text: str | None) -> Preprocess | None:
    kept = model.shop.model.facts.get("preprocess") if model.shop is not None else None
    own = Preprocess.from_json(kept) if kept else None
    if text is None:
        return own
    if text == "timm":
        if own is None:
            raise InputError(
                "--preprocess timm: this source is no timm model with a preprocessing of its own",
                "give resize=..,crop=..,mean=..,std=..",
            )
        return own
    return preprocess.parse(text)


def _classes(model: _Model, file: Path | None) -> tuple[str, ...] | None:
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise InputError(
                f"cannot read the class names in {file}: {exc}", "one class name a line, in the model's order"
            ) from exc
        return tuple(line.strip() for line in lines if line.strip())
    known = model.shop.model.facts.get("classes") if model.shop is not None else None
    return tuple(known) if known else None


def _trained_on(model: _Model, samples: Samples) -> tuple[int, ...]:
    """Indices of the samples that the weights were trained on, where their manifest says so."""
    weights = model.shop.spec.weights if model.shop is not None else "none"
    side = Path(weights + ".manifest.json")
    if not side.is_file():
        return ()
    try:
        doc = json.loads(side.read_text())["trained_on"]
        return tuple(int(i) for i in doc["indices"]) if doc["content"] == samples.content else ()
    except (ValueError, KeyError, TypeError) as exc:
        raise InputError(
            f"{side} does not say what the weights were trained on ({exc!r})", "train again, or remove the file"
        ) from exc


def _shapes(signature: Signature, judge: Samples | None, rows: RowsRequest) -> Mapping[str, ShapeRange]:
    """Ranges of the axes beside the batch: the ones given, else the data's own shapes."""
    found = dict(rows.shapes)
    for name in found:
        signature.input(name)
    open_inputs = [s for s in signature.inputs if signature.free_axes(s) and s.name not in found]
    if open_inputs and judge is not None and len(judge):
        feeds = judge.reader.read([judge.indices[0]])
        for spec in open_inputs:
            shape = tuple(feeds[spec.name].shape)
            found[spec.name] = ShapeRange(shape, shape, shape)
    return found


def _build(model: _Model, samples: Shares, request: DataRequest, rows: RowsRequest) -> None:
    """Fills in the engine, or what stopped it, of every row that is to have one."""
    shop = model.shop
    assert shop is not None

    def table() -> Artifact:
        if request.calib_table is None and samples.calibrate is None:
            had = "no data was given" if samples.judge is None else "the only sample there is judges"
            raise MissingBackend(f"INT8 needs samples to calibrate with, and {had}", "give them with --data, or --calib FILE")
        if request.calib_table is not None:
            return prepare.given_table(shop, request.calib_table)
        assert samples.calibrate is not None
        return prepare.calibrate(shop, samples.calibrate, request)

    recipe = Int8Recipe(request.int8, samples.calibrate) if _calibrates(model) else None
    aim = _aim(model, samples, request)
    wanted: dict[tuple[str, str, str, str], tuple[PlannedRow, Artifact]] = {}
    for row in model.rows:
        if row.skip or row.engine_key in model.built or row.engine_key in wanted:
            continue
        try:
            wanted[row.engine_key] = (row, prepare.graph_for(shop, _graph_kind(row, shop), table, recipe, aim))
        except (DataError, OutOfSpace, StaleCalibration):
            raise  # the user's to mend, and no row's own
        except DeploykitError as exc:
            model.built[row.engine_key] = exc

    def make(row: PlannedRow, graph: Artifact) -> Artifact | DeploykitError:
        usable = tuple(sorted({r.batch for r in model.rows if r.engine_key == row.engine_key and not r.skip}))
        try:
            return prepare.engine(shop, row.backend, row.precision, row.target, usable, rows.shapes, graph)
        except OutOfSpace:
            raise
        except DeploykitError as exc:
            return exc

    made = side_by_side([functools.partial(make, row, graph) for row, graph in wanted.values()])
    model.built.update(zip(wanted, made, strict=True))


def _graph_kind(row: PlannedRow, shop: Workshop) -> str:
    kind = backends.get(row.backend).graph(row.precision)
    return kind if kind == "source" or shop.base_precision == "fp32" else "fp32"  # the graph as it was given


def _entries(model: _Model, reference: tuple[str, str, str, str] | None) -> list[Entry]:
    found = []
    for row in model.rows:
        engine = model.built.get(row.engine_key)
        if row.skip or not row.runnable or not isinstance(engine, Artifact):
            continue
        found.append(Entry(replace(row, reference=row.engine_key == reference), engine, {}))
    return found


def _pools(
    signature: Signature, judge: Samples | None, entries: Sequence[Entry], rows: RowsRequest
) -> tuple[dict[int, list[Feeds]], str]:
    """For each batch the different inputs that every row of it is fed in turn: real ones where there are any."""
    batches = sorted({e.row.batch for e in entries})
    samples = judge
    if samples is None or not len(samples):
        samples = data.open(f"random:{measuring.POOL_SIZE * max(batches)}", signature, shapes=rows.shapes)
    pools: dict[int, list[Feeds]] = {}
    for batch in batches:
        wanted = [i % len(samples) for i in range(batch * measuring.POOL_SIZE)]
        pools[batch] = [feeds for feeds, _ in samples.take(wanted, samples.role).batches(batch, pad=True)]
    return pools, samples.digest


def _report(
    request: LineRequest,
    models: Sequence[_Model],
    samples: Shares,
    table: Sequence[Row],
    results: measuring.Results | None,
    reference: tuple[str, str, str, str] | None,
) -> Report:
    shop = models[0].shop
    named = dict(zip(("name", "backend", "precision"), reference or (), strict=False))
    shares = {s.role: s.describe() for s in (samples.judge, samples.calibrate) if s is not None}
    model: dict[str, Any] = {"name": models[0].name, "signature": models[0].signature.to_json()}
    if shop is not None:
        model |= {
            "source": shop.spec.text,
            "sha256": shop.model.sha256,
            "summary": dict(shop.summary),
            "export": dict(shop.model.facts),
        }
    else:
        given = next((a for a in models[0].built.values() if isinstance(a, Artifact)), None)
        model |= {"sha256": given.parent or given.sha256} if given is not None else {}
    versions: dict[str, str] = {}
    for name in {r.backend for m in models for r in m.rows}:
        versions.update(backends.get(name).versions())
    notes = list(dict.fromkeys(n for s in (samples.judge, samples.calibrate) if s is not None for n in s.notes))
    notes.extend(note for note in assemble.shared_notes(results) if note not in notes)
    if samples.judge is None:
        notes.append("no data was given: accuracy was not measured; timed on random inputs")
    if results is not None and results.reused:
        notes.append(f"measurements reused from {results.taken_at}: nothing changed since (--remeasure takes them anew)")
    return Report(
        rows=tuple(table),
        reference=named,
        model=model,
        environment=machine.describe(),
        samples=shares,
        findings=tuple(f for m in models if m.shop for f in m.shop.findings),
        measured_at=results.taken_at if results is not None else "",
        command=request.command,
        versions=dict(sorted(versions.items())),
        notes=tuple(notes),
        drifts=assemble.drift_documents(models, results),
        measurements=assemble.measurement_documents(models, results),
    )
