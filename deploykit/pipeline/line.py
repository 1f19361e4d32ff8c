"""The whole line: sources -> rows -> engines -> measurements -> report. `run` and `bench` are both this."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploykit import backends, children, data, machine, nonfinite
from deploykit.artifact import Artifact
from deploykit.children import BugInChild, side_by_side
from deploykit.errors import (
    BackendFailed,
    DataError,
    DeploykitError,
    InputError,
    MissingBackend,
    ModelError,
    OutOfSpace,
    StaleCalibration,
)
from deploykit.pipeline import (
    assemble,
    bottlenecks,
    engines,
    given,
    layer_drifts,
    measuring,
    prepare,
    ranges,
    rooflines,
    scenarios,
)
from deploykit.pipeline.int8 import Int8Recipe
from deploykit.pipeline.measuring import Entry
from deploykit.pipeline.plan import PlannedRow, check_names
from deploykit.pipeline.request import DataRequest, Narrator, RowsRequest, Silent, SourceRequest
from deploykit.pipeline.scenarios import Loads
from deploykit.pipeline.shares import Shares, aim_of, calibrates, samples_for, shapes_of
from deploykit.pipeline.target import Target, name_apart, open_targets
from deploykit.pipeline.workshop import STAGE_TIMEOUT_S, Workshop
from deploykit.report_document import Report
from deploykit.roofline import Ceilings
from deploykit.row import Row
from deploykit.samples import Samples
from deploykit.signature import Feeds, Signature
from deploykit.stages import bench
from deploykit.store import Store

LINTED = ("tensorrt", "tensorrt-rtx")  # whose rules for a quantized graph are known


@dataclass(frozen=True)
class LineRequest:
    """What a run or a bench is asked for. `targets` are sources, engines or folders of engines."""

    targets: tuple[SourceRequest, ...]
    data: DataRequest = field(default_factory=DataRequest)
    rows: RowsRequest = field(default_factory=RowsRequest)
    store: Path = Path("engines")
    command: tuple[str, ...] = ()
    explain: bool = False  # say of each INT8 engine why it is not faster (its profile), and where its graph lost accuracy


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
    loads: Loads = field(default_factory=Loads)


@dataclass(frozen=True)
class Ready:
    """All that stands before a measurement: the targets with their engines, the shares of the data, the rows that will run."""

    models: tuple[Target, ...]
    samples: Shares
    rows: RowsRequest
    store: Store
    reference: tuple[str, str, str, str] | None
    entries: tuple[Entry, ...]


def ready(request: LineRequest, say: Narrator) -> Ready:
    """Targets opened, data split, engines built; nothing is measured. Raises as `run` does."""
    _check(request)
    store = Store(request.store)
    models = [m for target in request.targets for m in open_targets(target, request.rows, store, say)]
    name_apart(models)
    first = models[0]
    to_measure = [row.backend for model in models for row in model.rows if not row.skip and row.runnable]
    before = " of measuring, after the builds and the accuracy" if to_measure else ""
    say.step(f"plan: {measuring.expectation(to_measure, request.rows.duration)}{before}")
    samples = samples_for(first, request.data, request.rows)
    rows = replace(request.rows, shapes=shapes_of(first.signature, samples.judge, request.rows))
    for model in models:
        if model.shop is not None:
            _build(model, samples, request.data, rows)
    reference = assemble.one_reference(first.rows, [r for m in models for r in m.rows], {k for m in models for k in m.runs()})
    entries = tuple(e for m in models for e in _entries(m, reference, rows))
    return Ready(tuple(models), samples, rows, store, reference, entries)


def run(request: LineRequest, narrator: Narrator | None = None) -> LineResult:
    """Everything that was asked for, as a report. Rows that cannot run say why; only a target that no engine could load
    raises (ModelError, ChecksFailed), and a name that deploykit does not know (UnknownName)."""
    say = narrator or Silent()
    made = ready(request, say)
    models, samples, rows, store = list(made.models), made.samples, made.rows, made.store
    first, reference, entries = models[0], made.reference, list(made.entries)
    predictions = [p for m in models if m.shop is not None for p in engines.predictions(m.shop, m.rows, m.built)]
    results = None
    if entries:
        pools, pool_digest = pools_for(first.signature, samples.judge, {e.row.batch for e in entries}, rows)
        results = measuring.take(entries, predictions, samples.judge, pools, pool_digest, rows, store, say)
    by_target = [assemble.rows_of(m.rows, m.built, results, rows) for m in models]
    table = [row for found in by_target for row in found]
    codes = [assemble.exit_code(table, [r for m in models for r in m.rows], request.rows, results)]
    for asked in dict.fromkeys(m.asked for m in models if m.shop is None):
        mine = [row for m, found in zip(models, by_target, strict=True) if m.asked == asked for row in found]
        codes.append(assemble.exit_code_of_engines(mine))
    origin = _first_nan(first, results, samples.judge, say)
    loads = scenarios.take(entries, first.signature, samples.judge, rows, store, say)
    table = scenarios.said(table, [r for m in models for r in m.rows], results, loads)
    brief = rows.duration == "smoke"  # which is for trying the line: it spends no seconds on ceilings
    table, ceilings = rooflines.placed(models, table, store, rows.threads or machine.threads(), say, only_kept=brief)
    report = _report(request, models, samples, table, results, reference, ceilings, origin, loads)
    if results is not None and request.explain:
        report = replace(report, explanations=bottlenecks.of_entries(entries, results, pools, pool_digest, rows, store, say))
    if request.explain and not brief:
        report = replace(report, layer_drifts=layer_drifts.of_targets(models, samples.judge))
    built = tuple(a for m in models for a in m.built.values() if isinstance(a, Artifact))
    return LineResult(
        report,
        tuple(entries),
        built,
        results,
        max(*codes, loads.exit_code()),
        made=tuple(x for m in models if m.shop for x in m.shop.made),
        reused=tuple(x for m in models if m.shop for x in m.shop.reused),
        workshops=tuple(m.shop for m in models if m.shop),
        loads=loads,
    )


def _first_nan(model: Target, results: measuring.Results | None, judge: Samples | None, say: Narrator) -> str:
    """Which node of the float model first gives NaN, where its outputs hold some on the samples that judge; '' elsewhere."""
    failed = results is not None and any(isinstance(drift, ModelError) for drift in results.drifts.values())
    if not failed or judge is None or model.shop is None:
        return ""
    say.step("look for the node that gives NaN")
    try:
        found = children.run(
            "look for NaN", nonfinite.in_outputs, model.shop.model.path, judge, timeout_s=STAGE_TIMEOUT_S, progress=say.progress
        )
    except (DeploykitError, BugInChild):  # said beside the rows already: this only adds where
        return ""
    return "" if found is None else f"the float model itself: {found}"


def _check(request: LineRequest) -> None:
    """Raises what is wrong with the request by itself, before anything is spent on it."""
    check_names(request.rows)
    bench.duration(request.rows.duration)
    if not request.rows.batches or min(request.rows.batches) < 1:
        raise InputError(f"--batch must name positive sizes, not {request.rows.batches}", "example: --batch 1,8")
    ranges.require_known(request.data.method)
    if request.data.calib_table is not None:
        given.require_readable(request.data.calib_table)


def _build(model: Target, samples: Shares, request: DataRequest, rows: RowsRequest) -> None:
    """Fills in the engine, or what stopped it, of every row that is to have one."""
    shop = model.shop
    assert shop is not None

    def table() -> Artifact:
        if request.calib_table is None and samples.calibrate is None:
            raise _needs_samples(samples)
        if request.calib_table is not None:
            return prepare.given_table(shop, request.calib_table)
        assert samples.calibrate is not None
        return prepare.calibrate(shop, samples.calibrate, request)

    recipe = Int8Recipe(request.int8, samples.calibrate) if calibrates(model) else None
    aim = aim_of(model, samples, request)
    wanted: dict[tuple[str, str, str, str], tuple[PlannedRow, Artifact]] = {}
    for row in model.rows:
        if row.skip or row.engine_key in model.built or row.engine_key in wanted:
            continue
        try:
            kind = _graph_kind(row, shop)
            graph = prepare.graph_for(shop, kind, table, recipe, aim)
            if row.backend in LINTED and kind in ("int8-tensorrt", "mixed"):
                prepare.lint(shop, graph, kind, row.backend)
            wanted[row.engine_key] = (row, graph)
        except (DataError, OutOfSpace, StaleCalibration):
            raise  # the user's to mend, and no row's own
        except DeploykitError as exc:
            model.built[row.engine_key] = exc
        except BugInChild as exc:
            model.built[row.engine_key] = _as_failure(row, exc)

    def make(row: PlannedRow, graph: Artifact) -> Artifact | DeploykitError:
        usable = tuple(sorted({r.batch for r in model.rows if r.engine_key == row.engine_key and not r.skip}))
        try:
            own = backends.get(row.backend).graph(row.precision) == "source-calibrated"
            if own and samples.calibrate is None:
                raise _needs_samples(samples)
            calibration = samples.calibrate if own else None
            return prepare.engine(shop, row.backend, row.precision, row.target, usable, rows.shapes, graph, calibration)
        except OutOfSpace:
            raise
        except DeploykitError as exc:
            return exc
        except BugInChild as exc:
            return _as_failure(row, exc)

    # those made of another row's engine last, when that is there
    ordered = sorted(wanted.items(), key=lambda item: backends.from_fp32(item[1][0].backend, item[1][0].precision))
    made = side_by_side([functools.partial(make, row, graph) for _, (row, graph) in ordered])
    model.built.update(zip((key for key, _ in ordered), made, strict=True))


def _as_failure(row: PlannedRow, bug: BugInChild) -> BackendFailed:
    """What one backend's unforeseen exception costs its own row; the traceback stays with it as its cause."""
    failed = BackendFailed(f"{row.backend}: {children.in_a_line(bug)}", "please report it, or leave this backend out")
    failed.__cause__ = bug
    return failed


def _needs_samples(samples: Shares) -> MissingBackend:
    had = "no data was given" if samples.judge is None else "the only sample there is judges"
    return MissingBackend(f"INT8 needs samples to calibrate with, and {had}", "give them with --data, or --calib FILE")


def _graph_kind(row: PlannedRow, shop: Workshop) -> str:
    kind = backends.get(row.backend).graph(row.precision)
    return kind if kind.startswith("source") or shop.base_precision == "fp32" else "fp32"  # the graph as it was given


def _entries(model: Target, reference: tuple[str, str, str, str] | None, rows: RowsRequest) -> list[Entry]:
    found = []
    for row in model.rows:
        engine = model.built.get(row.engine_key)
        if row.skip or not row.runnable or not isinstance(engine, Artifact):
            continue
        options = backends.opening_options(row.backend, rows.streams, rows.layout)
        found.append(Entry(replace(row, reference=row.engine_key == reference), engine, options))
    return found


def pools_for(
    signature: Signature, judge: Samples | None, sizes: Collection[int], rows: RowsRequest
) -> tuple[dict[int, list[Feeds]], str]:
    """For each batch the different inputs that every row of it is fed in turn, real ones where there are any; and their digest."""
    batches = sorted(sizes)
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
    models: Sequence[Target],
    samples: Shares,
    table: Sequence[Row],
    results: measuring.Results | None,
    reference: tuple[str, str, str, str] | None,
    ceilings: Ceilings | None,
    origin: str,
    loads: Loads,
) -> Report:
    shop = models[0].shop
    named = dict(zip(("name", "backend", "precision"), reference or (), strict=False))
    if reference is not None and request.rows.layout in backends.layouts(reference[1])[1:]:
        named["layout"] = request.rows.layout
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
    if origin:
        notes.append(origin)
    if samples.judge is None:
        notes.append("no data was given: accuracy was not measured; timed on random inputs")
    if results is not None and results.reused:
        notes.append(f"measurements reused from {results.taken_at}: nothing changed since (--remeasure takes them anew)")
    return Report(
        rows=tuple(table),
        reference=named,
        model=model,
        environment={**machine.describe(), **({"ceilings": ceilings.to_json()} if ceilings is not None else {})},
        samples=shares,
        findings=tuple(f for m in models if m.shop for f in m.shop.findings),
        measured_at=results.taken_at if results is not None else "",
        command=request.command,
        versions=dict(sorted(versions.items())),
        notes=tuple(notes),
        drifts=assemble.drift_documents(models, results),
        scenarios=scenarios.documents([r for m in models for r in m.rows], results, loads),
        measurements=assemble.measurement_documents(models, results),
    )
