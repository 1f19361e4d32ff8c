"""Accuracy and speed of a set of engines, measured together and kept together.

Measurements are reused only as a whole interleaved set: a ratio across two sets would compare two moods of the machine.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploykit import backends, hosted, machine
from deploykit.artifact import Artifact, sha256_of
from deploykit.children import Child, side_by_side
from deploykit.drift import Drift
from deploykit.errors import BackendFailed, DeploykitError, InputError, ModelError
from deploykit.measurement import Measurement
from deploykit.pipeline.plan import PlannedRow
from deploykit.pipeline.request import Narrator, RowsRequest
from deploykit.pipeline.workshop import backend_code, stage_version
from deploykit.samples import Samples
from deploykit.session import OpenRequest
from deploykit.signature import Feeds, Outputs
from deploykit.stages import accuracy, bench
from deploykit.store import Key, Store

POOL_SIZE = 4
ACCURACY_BATCH_LIMIT = 32
MANY_SAMPLES = 64  # from here on accuracy is measured at ACCURACY_BATCH or more, where the batch is free
ACCURACY_BATCH = 8
OPEN_AT_ONCE = 8
INFER_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Entry:
    """A row that is going to run, with its engine."""

    row: PlannedRow
    engine: Artifact
    options: Mapping[str, Any]

    def request(self, batch: int, rows: RowsRequest, threads: int) -> OpenRequest:
        """How to open the engine at a batch."""
        return OpenRequest(self.row.precision, batch, threads, dict(rows.shapes), dict(self.options))


@dataclass(frozen=True)
class Results:
    """What was measured: by row id the Measurement, by engine the Drift; or the error in its place."""

    measured: Mapping[str, Measurement | DeploykitError]
    drifts: Mapping[str, Drift | DeploykitError]
    taken_at: str
    reused: bool
    references: Mapping[int, str] = field(default_factory=dict)


def engine_id(row: PlannedRow) -> str:
    """The engine of a row in words: what a Drift belongs to."""
    return " ".join(part for part in row.engine_key if part != "cpu")


def take(
    entries: Sequence[Entry],
    predictions: Sequence[Entry],
    judge: Samples | None,
    pools: Mapping[int, list[Feeds]],
    pool_digest: str,
    rows: RowsRequest,
    store: Store,
    narrator: Narrator,
) -> Results:
    """Accuracy, then speed, of all entries: from the store when the very same set was measured on this machine before."""
    threads = rows.threads or _threads()
    key = _key([*entries, *predictions], judge, pool_digest, rows, threads)
    folder_name = "measurements"
    references = {e.row.batch: e.row.id for e in entries if e.row.reference}
    if rows.remeasure:
        store.drop(folder_name, key)
    found = store.find(folder_name, key)
    if found is not None:
        return replace(_read(found), references=references)
    drifts = judged([*entries, *predictions], judge, rows, threads, narrator) if judge is not None else {}
    speeds = _speed(entries, pools, rows, threads, narrator)
    results = Results(speeds, drifts, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), False, references)
    if not any(isinstance(x, DeploykitError) for x in [*speeds.values(), *drifts.values()]):
        store.make(folder_name, key, lambda folder: _write(results, folder, entries[0].engine))
    return results


def judged(
    entries: Sequence[Entry], judge: Samples, rows: RowsRequest, threads: int, narrator: Narrator
) -> dict[str, Drift | DeploykitError]:
    """The drift of every engine against the reference's, by `engine_id`; or the error in its place."""
    try:
        return _accuracy(entries, judge, rows, threads, narrator)
    except (BackendFailed, ModelError) as exc:  # the reference's: nothing can be judged; the speed is measured all the same
        return {engine_id(e.row): exc for e in entries}


def _threads() -> int:
    from deploykit.children import available_threads

    return available_threads()


def _key(entries: Sequence[Entry], judge: Samples | None, pool: str, rows: RowsRequest, threads: int) -> Key:
    engines = [[e.row.id, e.row.reference, e.engine.sha256, e.engine.parent, dict(e.options)] for e in entries]
    code = sorted({file for entry in entries for file in backend_code(entry.row.backend)})
    versions: dict[str, str] = {}
    for entry in entries:
        versions.update(backends.get(entry.row.backend).versions())
    options = {
        "engines": engines,
        "judge": judge.digest if judge is not None else None,
        "labels": hashlib.sha256(repr(judge.labels).encode()).hexdigest() if judge is not None else None,
        "pool": pool,
        "threads": threads,
        "duration": rows.duration,
        "aa": rows.aa,
        "shapes": repr(sorted(rows.shapes.items())),
        "machine": machine.fingerprint(),
    }
    return Key("measure", stage_version("measure", *code), None, options, versions)


def _speed(
    entries: Sequence[Entry], pools: Mapping[int, list[Feeds]], rows: RowsRequest, threads: int, narrator: Narrator
) -> dict[str, Measurement | DeploykitError]:
    targets = []
    for entry in entries:
        row = entry.row
        target = bench.Target(
            row.id,
            row.backend,
            entry.engine.path,
            entry.request(row.batch, rows, threads),
            group=f"{row.name} batch {row.batch}",
            reference=row.reference,
        )
        targets.append(target)
        if rows.aa and row.reference:
            targets.append(bench.again(target, AA_SUFFIX))
    span = bench.duration(rows.duration)
    narrator.step(f"bench: {expectation([target.backend for target in targets], span.name)}")
    return bench.measure(targets, pools, span, progress=narrator.progress)


def expectation(rows: Sequence[str], duration: str) -> str:
    """How long measuring the speed of rows of these backends will take, in words."""
    said = f"{len(rows)} row{'' if len(rows) == 1 else 's'}"
    span = bench.duration(duration)
    expected = bench.expected_s([backends.opening_s(name) for name in rows], span)
    return f"{said}, {duration}: {about(*expected)}" if rows else f"{said} to measure"


def about(low_s: float, high_s: float) -> str:
    """A span of time in words: 'about 40 s', '5 to 7 minutes', '3.0 to 3.4 hours'."""
    if high_s < 120:
        return f"about {high_s:.0f} s"
    size, unit = (60.0, "minutes") if high_s < 2 * 3600 else (3600.0, "hours")
    digits = 0 if unit == "minutes" else 1
    low, high = f"{low_s / size:.{digits}f}", f"{high_s / size:.{digits}f}"
    return f"{high} {unit}" if low == high else f"{low} to {high} {unit}"


AA_SUFFIX = " A/A"


def _accuracy(
    entries: Sequence[Entry], judge: Samples, rows: RowsRequest, threads: int, narrator: Narrator
) -> dict[str, Drift | DeploykitError]:
    """The drift of every engine of one model against the reference engine, batch by batch through all of them."""
    narrator.step(f"accuracy on {len(judge)} samples")
    engines: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda e: -e.row.batch):
        if entry.row.batch <= ACCURACY_BATCH_LIMIT or engine_id(entry.row) not in engines:
            engines.setdefault(engine_id(entry.row), entry)
    reference = next(e for e in engines.values() if e.row.reference)
    first: tuple[int, BackendFailed] | None = None
    for batch in _accuracy_batches(reference, entries, len(judge)):
        notes = (
            () if first is None else (f"judged at batch {batch}: the reference fails at batch {first[0]} ({first[1].message})",)
        )
        try:
            found = _accuracy_at(batch, reference, list(engines.values()), judge, rows, threads, narrator, notes)
        except BackendFailed as exc:  # the reference's own: the graph may hold a batch of its own
            first = first or (batch, exc)
            continue
        except InputError as exc:
            if type(exc) is not InputError or batch == reference.row.batch:
                raise
            continue  # the reference was not built for so large a batch
        refused = [
            e for e in engines.values() if type(found.get(engine_id(e.row))) is InputError and e.row.batch not in (0, batch)
        ]
        return found | _at_own_batch(batch, reference, refused, judge, rows, threads, narrator)
    assert first is not None
    raise first[1]


def _at_own_batch(
    batch: int,
    reference: Entry,
    refused: Sequence[Entry],
    judge: Samples,
    rows: RowsRequest,
    threads: int,
    narrator: Narrator,
) -> dict[str, Drift | DeploykitError]:
    """The drifts of engines that do not take `batch`, each at its row's own; those that fail there too are left out."""
    found: dict[str, Drift | DeploykitError] = {}
    for own in sorted({e.row.batch for e in refused}):
        part = [e for e in refused if e.row.batch == own]
        notes = (f"judged at batch {own}: the engine was not built for batch {batch}",)
        try:
            made = _accuracy_at(own, reference, part, judge, rows, threads, narrator, notes)
        except (BackendFailed, InputError):
            continue  # the reference's own: what the engines said first stands
        found |= {name: drift for name, drift in made.items() if name != engine_id(reference.row) and isinstance(drift, Drift)}
    return found


def _accuracy_batches(reference: Entry, entries: Sequence[Entry], n: int) -> list[int]:
    """The batch to judge at, then what to fall back to where the reference fails at it: its rows' other batches, and 1."""
    if reference.engine.signature.fixed_batch is not None:
        return [reference.row.batch]
    most = reference.row.batch
    if n > MANY_SAMPLES:
        most = max(most, ACCURACY_BATCH)
    own = {e.row.batch for e in entries if e.row.reference}
    return sorted({b for b in own | {1, most} if b <= most}, reverse=True)


def _accuracy_at(
    batch: int,
    reference: Entry,
    engines: Sequence[Entry],
    judge: Samples,
    rows: RowsRequest,
    threads: int,
    narrator: Narrator,
    notes: tuple[str, ...],
) -> dict[str, Drift | DeploykitError]:
    """The drifts, `batch` samples at a time; `notes` go with each. Raises what the reference raises."""
    others = [e for e in engines if not e.row.reference]
    found: dict[str, Drift | DeploykitError] = {}
    for start in range(0, max(1, len(others)), OPEN_AT_ONCE):
        part = others[start : start + OPEN_AT_ONCE]
        with contextlib.ExitStack() as stack:
            opened = side_by_side(
                [
                    functools.partial(_try_open, stack.enter_context(_child(e, threads)), e, batch, rows, threads)
                    for e in (reference, *part)
                ]
            )
            base = opened[0]
            if isinstance(base, DeploykitError):
                raise base
            calls: dict[str, accuracy.InferFn] = {}
            for entry, call in zip(part, opened[1:], strict=True):
                if isinstance(call, DeploykitError):
                    found[engine_id(entry.row)] = call
                else:
                    calls[engine_id(entry.row)] = call

            def tell(what: str, share: float, start: int = start) -> None:
                narrator.progress(what, (start + share * OPEN_AT_ONCE) / max(len(others), OPEN_AT_ONCE))

            measured = accuracy.measure(judge, base, calls, batch=batch, notes=notes, progress=tell)
            own = measured.pop(accuracy.REFERENCE)
            found[engine_id(reference.row)] = own
            found.update(measured)
    return found


def _try_open(child: Child, entry: Entry, batch: int, rows: RowsRequest, threads: int) -> accuracy.InferFn | DeploykitError:
    try:
        return _open(child, entry, batch, rows, threads)
    except DeploykitError as exc:
        return exc


def _open(child: Child, entry: Entry, batch: int, rows: RowsRequest, threads: int) -> accuracy.InferFn:
    """A call that infers one batch in a child process of its own; the child rests (SIGSTOP) in between."""
    child.call(
        hosted.open_engine, entry.row.backend, entry.engine.path, entry.request(batch, rows, threads), timeout_s=INFER_TIMEOUT_S
    )
    child.pause()

    def infer(feeds: Feeds) -> Outputs:
        child.resume()
        outputs = child.call(hosted.infer, feeds, timeout_s=INFER_TIMEOUT_S)
        child.pause()
        return outputs

    return infer


@contextlib.contextmanager
def _child(entry: Entry, threads: int) -> Iterator[Child]:
    child = Child(engine_id(entry.row), threads=threads)
    try:
        yield child
    finally:
        child.kill()
        child.close()


def _write(results: Results, folder: Path, model: Artifact) -> Artifact:
    drifts: dict[str, Any] = {}
    companions: dict[str, str] = {}
    for number, (name, drift) in enumerate(results.drifts.items()):
        if isinstance(drift, DeploykitError):
            raise BackendFailed(f"{name}: {drift}")
        file = folder / f"outcomes-{number}.npz"
        drift.save_outcomes(file)
        companions[file.name] = sha256_of(file)
        drifts[name] = {"drift": drift.to_json(), "outcomes": file.name}
    measured = {k: m.to_json() for k, m in results.measured.items() if isinstance(m, Measurement)}
    path = folder / "measurements.json"
    path.write_text(json.dumps({"taken_at": results.taken_at, "measured": measured, "drifts": drifts}))
    return Artifact(path, "measurements", "none", model.signature, "measure", companions=companions)


def _read(kept: Artifact) -> Results:
    doc = json.loads(kept.path.read_text())
    drifts = {
        name: Drift.from_json(d["drift"]).with_outcomes(kept.path.parent / d["outcomes"]) for name, d in doc["drifts"].items()
    }
    measured = {name: Measurement.from_json(m) for name, m in doc["measured"].items()}
    return Results(measured, drifts, doc["taken_at"], True)
