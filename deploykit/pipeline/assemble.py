"""Rows from what was planned, built and measured; the exit code they amount to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.drift import Drift
from deploykit.errors import EXIT_BACKEND, EXIT_MISSING, EXIT_PASSED, BackendFailed, DeploykitError, MissingBackend
from deploykit.measurement import Measurement, speedup
from deploykit.pipeline.engines import prediction_key
from deploykit.pipeline.measuring import AA_SUFFIX, Results, engine_id
from deploykit.pipeline.plan import PlannedRow
from deploykit.pipeline.request import RowsRequest
from deploykit.report_document import row_id
from deploykit.row import Row

EngineKey = tuple[str, str, str, str]
Built = Mapping[EngineKey, Artifact | DeploykitError]


class Model(Protocol):
    """What of a target the rows are made from."""

    @property
    def rows(self) -> list[PlannedRow]:
        """Its planned rows."""
        ...

    @property
    def built(self) -> dict[EngineKey, Artifact | DeploykitError]:
        """Its engines, or what stopped them."""
        ...


def one_reference(first: Sequence[PlannedRow], everything: Sequence[PlannedRow], runs: Collection[EngineKey]) -> EngineKey | None:
    """The engine all others are held against, among those that run here: the first target's reference (PyTorch eager
    FP32), else ONNX Runtime FP32, else the first engine there is."""
    able = [row for row in (*first, *everything) if row.engine_key in runs]
    ranked = [row for row in able if row.reference]
    ranked += [row for row in able if (row.backend, row.precision) == ("onnxruntime", "fp32")]
    return next((row.engine_key for row in (*ranked, *able)), None)


def rows_of(planned: Sequence[PlannedRow], built: Built, results: Results | None, request: RowsRequest) -> list[Row]:
    """The table's rows of one target. An engine built for other hardware has one row, whatever its batches."""
    table: list[Row] = []
    shown: set[EngineKey] = set()
    for row in planned:
        if not row.skip and not row.runnable and isinstance(built.get(row.engine_key), Artifact):
            if row.engine_key in shown:
                continue
            shown.add(row.engine_key)
        table.append(_row(row, built, results))
        if request.aa and row.reference and results is not None:
            copy = results.measured.get(row.id + AA_SUFFIX)
            if isinstance(copy, Measurement):
                table.append(_measured(row, copy, built, results, extra="A/A: the reference again, in processes of its own"))
    return [_with_layout(row, request.layout) for row in table]


def _with_layout(row: Row, layout: str) -> Row:
    return replace(row, layout=layout) if row.status == "ok" and layout in backends.layouts(row.backend)[1:] else row


def _row(row: PlannedRow, built: Built, results: Results | None) -> Row:
    device = None if row.target == "cpu" else row.target
    if row.skip:
        return Row(row.name, row.backend, row.precision, row.batch, "skipped", row.skip, device=device)
    engine = built.get(row.engine_key)
    if isinstance(engine, DeploykitError):
        status = "skipped" if isinstance(engine, MissingBackend) else "failed"
        return Row(row.name, row.backend, row.precision, row.batch, status, _one_line(engine), device=device)
    if engine is None:
        return Row(row.name, row.backend, row.precision, row.batch, "failed", "was not built", device=device)
    if not row.runnable:
        return _built(row, engine, results)
    measured = results.measured.get(row.id) if results is not None else None
    if isinstance(measured, Measurement):
        assert results is not None
        return _measured(row, measured, built, results)
    why = _one_line(measured) if measured is not None else "was not measured"
    status = "skipped" if isinstance(measured, MissingBackend) else "failed"
    return Row(row.name, row.backend, row.precision, row.batch, status, why, device=device, size_bytes=engine.size_bytes)


def _one_line(error: DeploykitError) -> str:
    return f"{error.message}; {error.remedy}" if error.remedy else error.message


def _built(row: PlannedRow, engine: Artifact, results: Results | None) -> Row:
    notes = [str(n) for n in engine.facts.get("notes", [])]
    drift = results.drifts.get(engine_id(prediction_key(row))) if results is not None else None
    if isinstance(drift, Drift):
        notes.append(f"predicted from its graph on the CPU, not measured on {row.target}: {drift.in_words()}")
    elif isinstance(drift, DeploykitError):
        notes.append(f"its graph's accuracy could not be predicted on the CPU: {drift.message}")
    batches = engine.options.get("batches") or [row.batch]
    notes.append(f"one engine for batch {min(batches)} to {max(batches)}")
    return Row(
        row.name,
        row.backend,
        row.precision,
        row.batch,
        "built",
        row.cannot_run,
        device=row.target,
        size_bytes=engine.size_bytes,
        build_s=engine.facts.get("build_s"),
        notes="; ".join(notes),
    )


def _measured(row: PlannedRow, measured: Measurement, built: Built, results: Results, *, extra: str = "") -> Row:
    engine = built[row.engine_key]
    assert isinstance(engine, Artifact)
    notes = [*measured.notes, *([extra] if extra else [])]
    precision = row.precision
    if measured.precision != row.precision:
        notes.append(f"asked for {row.precision}, really ran {measured.precision}")
        precision = measured.precision
    if results.reused:
        notes.append(f"reused, measured {results.taken_at}")
    ratio = None
    base = _reference_measurement(row, results)
    if base is not None:
        ratio = speedup(measured, base)
    elif not row.reference:
        notes.append("no speed-up: the reference row was not measured at this batch")
    figures: dict[str, Any] = {}
    drift = results.drifts.get(engine_id(row))
    if isinstance(drift, Drift):
        figures = drift.row_figures()
        notes.extend(note for note in drift.notes if note not in shared_notes(results))
    elif isinstance(drift, DeploykitError):
        notes.append(f"accuracy was not measured: {drift.message}")
    return Row(
        _shown_name(row, measured),
        row.backend,
        precision,
        row.batch,
        "ok",
        device=measured.device,
        threads=measured.threads,
        images_per_s=measured.images_per_s,
        p50_s=measured.percentile_s(50),
        p90_s=measured.percentile_s(90),
        p95_s=measured.percentile_s(95),
        p99_s=measured.percentile_s(99),
        cov=measured.cov,
        stable=measured.stable,
        n_timed=measured.n_timed,
        speedup=ratio.value if ratio else None,
        speedup_low=ratio.low if ratio else None,
        speedup_high=ratio.high if ratio else None,
        size_bytes=_size_bytes(engine),
        peak_rss_bytes=measured.peak_rss_bytes,
        build_s=engine.facts.get("build_s"),
        clock=measured.clock,
        boundary=measured.boundary,
        streams=measured.streams,
        notes="; ".join(dict.fromkeys(notes)),
        **figures,
    )


def _size_bytes(engine: Artifact) -> int:
    """Bytes of the engine; of a PyTorch source, which is a description, those of its FP32 weights."""
    weights = engine.facts.get("params")
    return 4 * int(weights) if engine.format == "source" and weights else engine.size_bytes


def shared_notes(results: Results | None) -> tuple[str, ...]:
    """What the accuracy of every row has in common, said once for the whole table."""
    drifts = [] if results is None else [d for d in results.drifts.values() if isinstance(d, Drift) and not d.own]
    if not drifts:
        return ()
    return tuple(note for note in drifts[0].notes if all(note in d.notes for d in drifts))


def _reference_measurement(row: PlannedRow, results: Results) -> Measurement | None:
    found = results.measured.get(results.references.get(row.batch, ""))
    return found if isinstance(found, Measurement) else None


def exit_code(table: Sequence[Row], planned: Sequence[PlannedRow], request: RowsRequest, results: Results | None = None) -> int:
    """0, or 3 or 4 when a backend or precision asked for by name has no row that ran or was built here; 4 too when such a
    backend ran and then failed while its accuracy was measured."""
    codes = [EXIT_PASSED]
    drifts = results.drifts if results is not None else {}
    for row in planned:
        if row.backend in (request.backends or ()) and isinstance(drifts.get(engine_id(row)), BackendFailed):
            codes.append(EXIT_BACKEND)
    for field_name, named in (("backend", request.backends), ("precision", request.precisions)):
        for name in named or ():
            mine = [row for row in table if getattr(row, field_name) == name]
            wanted = [row for row in planned if getattr(row, field_name) == name]
            if any(row.status in ("ok", "built") for row in mine):
                if field_name == "backend" and any(row.status == "failed" for row in mine):
                    codes.append(EXIT_BACKEND)
                continue
            failed = any(row.status == "failed" for row in mine)
            codes.append(EXIT_BACKEND if failed else EXIT_MISSING if mine or not wanted else EXIT_PASSED)
    return max(codes)


def exit_code_of_engines(rows: Sequence[Row]) -> int:
    """0, or 3 or 4 when of an engine that was given, or of a folder of them, no row ran, or could: it was asked for by name."""
    if not rows or any(row.status in ("ok", "built") for row in rows):
        return EXIT_PASSED
    return EXIT_BACKEND if any(row.status == "failed" for row in rows) else EXIT_MISSING


def drift_documents(models: Sequence[Model], results: Results | None) -> dict[str, dict[str, Any]]:
    """The drift statistics of every measured row, by row id."""
    found: dict[str, dict[str, Any]] = {}
    if results is None:
        return found
    for row in (r for m in models for r in m.rows):
        drift = results.drifts.get(engine_id(row))
        measured = results.measured.get(row.id)
        if isinstance(drift, Drift) and isinstance(measured, Measurement):
            found[measured_id(row, measured)] = drift.to_json()
    return found


def measurement_documents(models: Sequence[Model], results: Results | None) -> dict[str, dict[str, Any]]:
    """The raw measurement of every measured row, by row id."""
    found: dict[str, dict[str, Any]] = {}
    if results is None:
        return found
    for row in (r for m in models for r in m.rows):
        measured = results.measured.get(row.id)
        if isinstance(measured, Measurement):
            found[measured_id(row, measured)] = measured.to_json()
    return found


def measured_id(row: PlannedRow, measured: Measurement) -> str:
    """The row id under which the table has that measurement."""
    return row_id(Row(_shown_name(row, measured), row.backend, measured.precision, row.batch, "ok", device=measured.device))


def _shown_name(row: PlannedRow, measured: Measurement) -> str:
    """The row's name; where another precision ran than was asked for, it says so: the row would else be a second one of
    the precision that ran, under the same id."""
    return row.name if measured.precision == row.precision else f"{row.name} ({row.precision} asked)"
