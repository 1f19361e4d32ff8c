"""A row under MLPerf's LoadGen: each in a child of its own, one after another; outcomes are kept in the store."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploykit import backends, children, data, hosted, hosted_loadgen, loadgen, machine
from deploykit.artifact import Artifact
from deploykit.children import BugInChild, Child, in_a_line
from deploykit.errors import EXIT_BACKEND, EXIT_MISSING, BackendFailed, DeploykitError, MissingBackend
from deploykit.loadgen import LoadOutcome, LoadRequest
from deploykit.measurement import Measurement
from deploykit.pipeline.assemble import measured_id
from deploykit.pipeline.measuring import Entry, Results
from deploykit.pipeline.plan import PlannedRow
from deploykit.pipeline.request import Narrator, RowsRequest
from deploykit.pipeline.workshop import backend_code, package_versions, stage_version
from deploykit.report_document import row_id
from deploykit.row import Row
from deploykit.samples import Samples
from deploykit.signature import Feeds, Signature
from deploykit.stages import bench
from deploykit.store import Key, Store

FOLDER = "loadgen"
PACKAGE = "mlperf_loadgen"
SAMPLES = 64  # at most, and at most so many bytes of them: they all lie in the child's memory
_SAMPLE_BYTES = 64 << 20
_PROBES_S = 30.0  # what Server's search may take beside the run itself


@dataclass(frozen=True)
class Loads:
    """What LoadGen found, by row id; or the error that ended it, or in words why the scenario is none for that row. `named`:
    the rows whose backend or precision was asked for by name."""

    outcomes: Mapping[str, LoadOutcome | DeploykitError | str] = field(default_factory=dict)
    named: frozenset[str] = frozenset()

    def exit_code(self) -> int:
        """3 where LoadGen or a backend is missing, 4 where a row asked for by name failed, else 0."""
        errors = {key: found for key, found in self.outcomes.items() if isinstance(found, DeploykitError)}
        codes = [EXIT_MISSING for error in errors.values() if isinstance(error, MissingBackend)]
        codes += [EXIT_BACKEND for key, error in errors.items() if key in self.named and not isinstance(error, MissingBackend)]
        return max(codes, default=0)


def take(
    entries: Sequence[Entry], signature: Signature, judge: Samples | None, rows: RowsRequest, store: Store, say: Narrator
) -> Loads:
    """LoadGen's outcome for every entry, where `rows.scenario` asks for one; a row that cannot be asked says why."""
    if rows.scenario is None:
        return Loads()
    if not children.has_module(PACKAGE):
        missing = MissingBackend("MLPerf's LoadGen is not installed", "pip install 'deploykit[loadgen]'")
        return Loads({entry.row.id: missing for entry in entries})
    name = loadgen.scenario(rows.scenario)
    request = LoadRequest(name, bench.duration(rows.duration).seconds, rows.server_latency_s)
    samples, digest = _samples(signature, judge, rows)
    found: dict[str, LoadOutcome | DeploykitError | str] = {}
    say.step(f"LoadGen {name}: {len(entries)} rows, about {len(entries) * _row_s(request):,.0f} s")
    for number, entry in enumerate(entries):
        say.progress(entry.row.id, number / len(entries))
        if name == "SingleStream" and entry.row.batch > 1:
            found[entry.row.id] = (
                f"SingleStream sends one sample at a time: it is for batch 1, and this row runs {entry.row.batch}"
            )
            continue
        found[entry.row.id] = _one(entry, request, samples, digest, rows, store)
    named = {e.row.id for e in entries if e.row.backend in (rows.backends or ()) or e.row.precision in (rows.precisions or ())}
    return Loads(found, frozenset(named))


def _row_s(request: LoadRequest) -> float:
    return request.seconds + (_PROBES_S if request.scenario == "Server" else 1.0)


def _one(
    entry: Entry, request: LoadRequest, samples: list[Feeds], digest: str, rows: RowsRequest, store: Store
) -> LoadOutcome | DeploykitError:
    threads = rows.threads or machine.threads()
    code = [Path(str(m.__file__)) for m in (loadgen, hosted_loadgen)]
    code.extend(backend_code(entry.row.backend))
    options: dict[str, Any] = {
        "engine": [entry.engine.sha256, entry.engine.parent, dict(entry.options)],
        "row": entry.row.id,
        "request": [request.scenario, request.seconds, request.latency_s],
        "samples": digest,
        "threads": threads,
        "shapes": repr(sorted(rows.shapes.items())),
        "machine": machine.fingerprint(),
    }
    versions = {**backends.get(entry.row.backend).versions(), **package_versions(("mlcommons-loadgen",))}
    key = Key("loadgen", stage_version("measure", *code), None, options, versions)
    if rows.remeasure:
        store.drop(FOLDER, key)
    kept = store.find(FOLDER, key)
    if kept is not None:
        doc = json.loads(kept.path.read_text())
        return LoadOutcome.from_json(doc["outcome"], doc["logs"])
    try:
        found = _ask(entry, request, samples, rows, threads)
    except DeploykitError as exc:
        return exc
    except BugInChild as exc:
        return BackendFailed(f"{entry.row.id}: {in_a_line(exc)}")
    if found.value is None:  # no figure, perhaps of a busy moment: the next run tries again
        return found

    def build(folder: Path) -> Artifact:
        path = folder / "loadgen.json"
        path.write_text(json.dumps({"outcome": found.to_json(), "logs": dict(found.logs or {})}))
        return Artifact(path, "loadgen", "none", Signature((), ()), "loadgen")

    store.make(FOLDER, key, build)
    return found


def _ask(entry: Entry, request: LoadRequest, samples: list[Feeds], rows: RowsRequest, threads: int) -> LoadOutcome:
    with Child(f"LoadGen {entry.row.id}", threads=threads) as child:
        opening = entry.request(entry.row.batch, rows, threads)
        child.call(hosted.open_engine, entry.row.backend, entry.engine.path, opening, timeout_s=bench.OPEN_TIMEOUT_S)
        limit = bench.OPEN_TIMEOUT_S + hosted_loadgen.worst_s(request)  # the first for the warm-up
        return child.call(hosted_loadgen.run, request, samples, entry.row.batch, timeout_s=limit)


def _samples(signature: Signature, judge: Samples | None, rows: RowsRequest) -> tuple[list[Feeds], str]:
    """Feeds of one sample each, whatever batch the graph has, and their digest: of the samples that judge where there are any."""
    samples = judge
    if samples is None or not len(samples):
        samples = data.open(f"random:{SAMPLES}", signature, shapes=rows.shapes)
    found: list[Feeds] = []
    total = 0
    for feeds, _ in samples.take(range(min(len(samples), SAMPLES)), samples.role).batches(1):
        found.append(feeds)
        total += sum(array.nbytes for array in feeds.values())
        if total > _SAMPLE_BYTES:
            break
    return found, samples.digest


def _ids(planned: Sequence[PlannedRow], results: Results | None) -> dict[str, str]:
    """The planned row's id by that of the table's row: the precision that ran may be another than was asked for."""
    measured = results.measured if results is not None else {}
    return {measured_id(row, m): row.id for row in planned if isinstance(m := measured.get(row.id), Measurement)}


def documents(planned: Sequence[PlannedRow], results: Results | None, loads: Loads) -> dict[str, dict[str, Any]]:
    """LoadGen's outcomes as JSON values, by the id of the table's row."""
    found = {key: loads.outcomes.get(own) for key, own in _ids(planned, results).items()}
    return {key: outcome.to_json() for key, outcome in found.items() if isinstance(outcome, LoadOutcome)}


def said(table: Sequence[Row], planned: Sequence[PlannedRow], results: Results | None, loads: Loads) -> list[Row]:
    """The rows with what LoadGen found in their columns, and in their notes in words."""
    ids = _ids(planned, results)
    return [_said(row, loads.outcomes.get(ids.get(row_id(row), "")) if not row.is_copy else None) for row in table]


def _said(row: Row, found: LoadOutcome | DeploykitError | str | None) -> Row:
    if found is None or row.status != "ok":
        return row
    if isinstance(found, str):
        return replace(row, notes="; ".join(x for x in (row.notes, f"LoadGen: skipped: {found}") if x))
    if isinstance(found, DeploykitError):
        word = "LoadGen: skipped: " if isinstance(found, MissingBackend) else "LoadGen: "
        note = word + found.message + (f"; {found.remedy}" if found.remedy else "")
        return replace(row, notes="; ".join(x for x in (row.notes, note) if x))
    return replace(
        row,
        notes="; ".join(x for x in (row.notes, found.in_words()) if x),
        scenario=found.scenario,
        scenario_value=found.value,
        scenario_unit=found.unit,
        scenario_valid=found.valid,
    )


def write_logs(loads: Loads, folder: Path) -> None:
    """LoadGen's own files of every row in `folder`, a folder a row; nothing where there are none."""
    for key, found in loads.outcomes.items():
        for name, text in (found.logs or {}).items() if isinstance(found, LoadOutcome) else ():
            own = folder / re.sub(r"[^A-Za-z0-9._-]+", "-", key)
            own.mkdir(parents=True, exist_ok=True)
            (own / name).write_text(text)
