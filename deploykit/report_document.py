"""Report: everything one run found, as one document; JSON of a published, versioned schema is its form on disk."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from deploykit.errors import InputError
from deploykit.row import COLUMNS, Row
from deploykit.verdict import SEVERITIES, Finding, Reason, Verdict

SCHEMA_VERSION = 1
STATUSES = ("ok", "built", "skipped", "failed")
OUTCOMES = ("pass", "fail", "inconclusive")
REPORT_FILE = "report.json"
MEASUREMENTS_FILE = "measurements.json"
UNFINISHED_FILE = ".unfinished"  # in a run's folder while its files are replaced: some are the older run's
# MLPerf inference rules: a candidate may lose at most 1 % of the reference's accuracy.
MLPERF_FLOOR = 0.99

# The closed range each figure must lie in; a file that says otherwise was not written by a measurement.
_RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("top1", "top5", "agreement"), (0.0, 1.0)),
    **dict.fromkeys(("images_per_s", "p50_s", "p90_s", "p95_s", "p99_s", "cov", "speedup", "speedup_low"), (0.0, math.inf)),
    **dict.fromkeys(("speedup_high", "size_bytes", "peak_rss_bytes", "build_s", "roofline_share"), (0.0, math.inf)),
    **dict.fromkeys(("n_timed", "threads", "streams"), (0, math.inf)),
    **dict.fromkeys(("top1_drop_pp", "top1_drop_low", "top1_drop_high"), (-100.0, 100.0)),
    "batch": (1, math.inf),
}
_INTERVALS = (("speedup", "speedup_low", "speedup_high"), ("top1_drop_pp", "top1_drop_low", "top1_drop_high"))
_ROW_MUST = ("name", "backend", "precision", "batch", "status")


def row_id(row: Row) -> str:
    """The row's key as one string: what `Report.measurements`, `Report.drifts` and per-sample outcomes are kept under."""
    return "|".join(str(part) for part in row.key)


@dataclass(frozen=True)
class Report:
    """One run: its table, and what is needed to believe and to repeat it.

    reference: name, backend and precision of the row that speed-ups and drops are over (PyTorch eager FP32, else ONNX
    Runtime FP32); model: name, digest, parameters, macs, ...; environment: the machine; samples: `Samples.describe()`
    by role ('calibrate', 'judge'); versions: package -> version; measured_at: ISO 8601; measurements: row id ->
    `Measurement.to_json()`, kept in a file beside the report; drifts: row id -> statistics of that row's drift; scenarios: row id ->
    what MLPerf's LoadGen found; explanations: engine ('name backend precision') -> why its INT8 is not faster ('verdict',
    'findings', 'batch'); layer_drifts: quantized graph ('name kind') -> its layers' SQNR against the float graph ('rows', 'n', 'layers',
    'notes').
    """

    rows: tuple[Row, ...]
    reference: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    verdict: Verdict | None = None
    measured_at: str = ""
    command: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    drifts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measurements: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scenarios: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    explanations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layer_drifts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    wrong_checksum: str = ""  # the one its file states, where the rest of the file does not have it: edited by hand

    def is_reference(self, row: Row) -> bool:
        """Whether the row is the reference (at any batch); an A/A copy of it is not."""
        if row.is_copy:
            return False
        given = {k: self.reference[k] for k in ("name", "backend", "precision") if self.reference.get(k) is not None}
        return bool(given) and all(getattr(row, k) == v for k, v in given.items())

    def reference_row(self, batch: int | None = None) -> Row | None:
        """The reference's ok row at that batch (at any batch when None); None when there is none."""
        for row in self.rows:
            if self.is_reference(row) and row.status == "ok" and batch in (None, row.batch):
                return row
        return None

    def keeps_accuracy(self, row: Row) -> bool:
        """Whether the row has been shown to keep the accuracy: top-1 at least 99 % of the reference's (MLPerf's floor);
        without labels, agreement at least 99 %. False where neither was measured, where the data was random, and for a
        row that failed the gate."""
        if self.samples.get("judge", {}).get("random"):
            return False
        if self.verdict and any(r.row == row.label and r.outcome == "fail" for r in self.verdict.reasons):
            return False
        if self.is_reference(row):
            return True
        if row.top1 is not None and row.top1_drop_pp is not None:
            reference_top1 = row.top1 + row.top1_drop_pp / 100
            return row.top1 >= MLPERF_FLOOR * reference_top1 - 1e-12
        return row.agreement is not None and row.agreement >= MLPERF_FLOOR

    def best(self) -> Row | None:
        """The ok row with the highest throughput among those that keep the accuracy; None when none is known to."""
        return self._best

    @functools.cached_property
    def _best(self) -> Row | None:
        rows = [r for r in self.rows if not r.is_copy]
        judged = [r for r in rows if not self.is_reference(r) and (r.top1_drop_pp is not None or r.agreement is not None)]
        if not judged:
            return None
        able = [r for r in rows if r.status == "ok" and r.images_per_s is not None and self.keeps_accuracy(r)]
        return max(able, key=lambda r: r.images_per_s or 0.0, default=None)

    def with_verdict(self, verdict: Verdict) -> Report:
        """The same report with that verdict."""
        return replace(self, verdict=verdict)

    def to_json(self) -> dict[str, Any]:
        """The document as JSON values. Raw measurements are left out (`measurements_json`). What is not a finite number
        becomes null, and the row's notes say which. 'checksum' is that of all the rest (`checksum`)."""
        doc = {
            "schema_version": self.schema_version,
            "reference": finite(dict(self.reference)),
            "rows": [_row_json(row) for row in self.rows],
            "model": finite(dict(self.model)),
            "environment": finite(dict(self.environment)),
            "samples": finite({k: dict(v) for k, v in self.samples.items()}),
            "findings": [f.to_json() for f in self.findings],
            "verdict": None if self.verdict is None else self.verdict.to_json(),
            "measured_at": self.measured_at,
            "command": list(self.command),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "drifts": finite({k: dict(v) for k, v in self.drifts.items()}),
            "scenarios": finite({k: dict(v) for k, v in self.scenarios.items()}),
            "explanations": finite({k: dict(v) for k, v in self.explanations.items()}),
            "layer_drifts": finite({k: dict(v) for k, v in self.layer_drifts.items()}),
        }
        return {**doc, "checksum": self.wrong_checksum or checksum(doc)}

    def measurements_json(self) -> dict[str, Any]:
        """The raw seconds of every row, for the file beside the report."""
        kept = {k: dict(v) for k, v in self.measurements.items()}
        return {"schema_version": self.schema_version, "measurements": finite(kept)}

    @classmethod
    def from_json(cls, doc: Any, *, measurements: Mapping[str, Mapping[str, Any]] | None = None, where: str = "report") -> Report:
        """The report that `to_json` wrote. Only schema_version, reference and rows must be there.

        Raises InputError naming the place and what is wrong with it: a missing key, a wrong type, a figure out of its
        range, a value outside its own interval.
        """
        top = _expect(doc, dict, where)
        _version(top, where)
        for key in ("reference", "rows"):
            if key not in top:
                raise InputError(f"{where}: the key '{key}' is missing", _REMEDY)
        rows = tuple(_row(item, f"{where}: rows[{i}]") for i, item in enumerate(_expect(top["rows"], list, f"{where}: rows")))

        def mapping(key: str) -> dict[str, Any]:
            return dict(_expect(top.get(key) or {}, dict, f"{where}: {key}"))

        def strings(key: str) -> tuple[str, ...]:
            found = _expect(top.get(key) or [], list, f"{where}: {key}")
            return tuple(_expect(item, str, f"{where}: {key}[{i}]") for i, item in enumerate(found))

        samples = {k: _expect(v, dict, f"{where}: samples.{k}") for k, v in mapping("samples").items()}
        drifts = {k: _expect(v, dict, f"{where}: drifts.{k}") for k, v in mapping("drifts").items()}
        found = _expect(top.get("findings") or [], list, f"{where}: findings")
        return cls(
            rows=rows,
            reference=_expect(top["reference"], dict, f"{where}: reference"),
            model=mapping("model"),
            environment=mapping("environment"),
            samples=samples,
            findings=tuple(_finding(item, f"{where}: findings[{i}]") for i, item in enumerate(found)),
            verdict=None if top.get("verdict") is None else _verdict(top["verdict"], f"{where}: verdict"),
            measured_at=_expect(top.get("measured_at") or "", str, f"{where}: measured_at"),
            command=strings("command"),
            versions={k: _expect(v, str, f"{where}: versions.{k}") for k, v in mapping("versions").items()},
            notes=strings("notes"),
            drifts=drifts,
            scenarios={k: _expect(v, dict, f"{where}: scenarios.{k}") for k, v in mapping("scenarios").items()},
            explanations={k: _expect(v, dict, f"{where}: explanations.{k}") for k, v in mapping("explanations").items()},
            layer_drifts={k: _layer_drift(v, f"{where}: layer_drifts.{k}") for k, v in mapping("layer_drifts").items()},
            measurements=measurements or {},
            wrong_checksum=_wrong_checksum(top, where),
        )


_OPTIONAL = (int, float, type(None))
_LAYER: Mapping[str, Any] = {
    **dict.fromkeys(("layer", "op"), str),
    "position": int,
    "identical": bool,
    "reasons": list,
    **dict.fromkeys(("sqnr_db", "own_sqnr_db", "weights_sqnr_db", "input_sqnr_db"), _OPTIONAL),
}


def _layer_drift(value: Any, where: str) -> dict[str, Any]:
    """One quantized graph's layers, every key that the page draws there and of its type."""
    found: dict[str, Any] = _expect(value, dict, where)
    for i, layer in enumerate(_expect(found.get("layers") or [], list, f"{where}: layers")):
        place = f"{where}: layers[{i}]"
        _expect(layer, dict, place)
        for key, kind in _LAYER.items():
            if not isinstance(layer.get(key), kind):
                raise InputError(f"{place}: '{key}' is {layer.get(key)!r}", _REMEDY)
        for reason in layer["reasons"]:
            _expect(_expect(reason, dict, f"{place}: reasons").get("text"), str, f"{place}: reasons.text")
    return found


def checksum(doc: Mapping[str, Any]) -> str:
    """sha256 over a document's JSON, whatever its layout and the order of its keys, without its own 'checksum': it tells an edit
    by hand, or a cut, from what was written; it proves nothing against intent."""
    rest = json.loads(json.dumps({k: v for k, v in doc.items() if k != "checksum"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _wrong_checksum(doc: Mapping[str, Any], where: str) -> str:
    stated: str = _expect(doc.get("checksum") or "", str, f"{where}: checksum")
    return stated if stated and stated != checksum(doc) else ""


_REMEDY = "give a report.json that `deploykit run` or `deploykit bench --json` wrote, unedited"


def load(path: Path) -> Report:
    """The report in a report.json, or in a run's folder, with the raw measurements of the file beside it where there is one.

    Raises InputError when there is none, when it is not a whole, well-formed report of this schema version, and when a run was
    killed while it replaced the folder's files, so that the report and the engines may be of two runs.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    if file.name == REPORT_FILE and file.with_name(UNFINISHED_FILE).exists():
        raise InputError(
            f"a run ended, or still is, in the middle of replacing the files of {file.parent}",
            "run it again; what was built and measured is kept in the store",
        )
    doc = _read_json(file)
    side = file.with_name(MEASUREMENTS_FILE)
    measurements: dict[str, Any] = {}
    if file.name == REPORT_FILE and side.is_file():
        kept = _expect(_read_json(side), dict, str(side))
        _version(kept, str(side))
        found = _expect(kept.get("measurements"), dict, f"{side}: measurements")
        measurements = {k: _expect(v, dict, f"{side}: measurements.{k}") for k, v in found.items()}
    return Report.from_json(doc, measurements=measurements, where=str(file))


def finite(value: Any) -> Any:
    """The value with every number that is not finite replaced by None, as deep as it goes (JSON has no NaN)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(v) for v in value]
    return value


def _row_json(row: Row) -> dict[str, Any]:
    doc = asdict(row)
    lost = [f"{k} was {v}" for k, v in doc.items() if isinstance(v, float) and not math.isfinite(v)]
    doc = {k: finite(v) for k, v in doc.items()}
    if lost:
        doc["notes"] = "; ".join(x for x in (row.notes, *lost) if x)
    return doc


def _read_json(file: Path) -> Any:
    def constant(name: str) -> Any:
        raise InputError(f"{file} holds {name}, which is no JSON number", _REMEDY)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in items]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"{file} holds the key '{key}' twice in one object", _REMEDY)
        return dict(items)

    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=constant, object_pairs_hook=pairs)
    except FileNotFoundError as exc:
        raise InputError(f"no report at {file}", "give a report.json or a folder that `deploykit run -o` wrote") from exc
    except OSError as exc:
        raise InputError(f"cannot read {file}: {exc.strerror}", _REMEDY) from exc
    except json.JSONDecodeError as exc:
        raise InputError(f"{file} is not JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}", _REMEDY) from exc
    except (UnicodeDecodeError, RecursionError) as exc:
        raise InputError(f"{file} is not a JSON text in UTF-8", _REMEDY) from exc


def _version(doc: Mapping[str, Any], where: str) -> None:
    found = doc.get("schema_version")
    if found != SCHEMA_VERSION or isinstance(found, bool):
        said = "the key 'schema_version' is missing" if found is None else f"schema_version is {found!r}, not {SCHEMA_VERSION}"
        raise InputError(f"{where}: {said}", f"this deploykit reads version {SCHEMA_VERSION}; make the report anew with it")


def _expect(value: Any, kind: type, where: str) -> Any:
    names: dict[Any, str] = {dict: "an object", list: "a list", str: "a text"}
    if not isinstance(value, kind):
        raise InputError(f"{where} is {_said(value)}, not {names[kind]}", _REMEDY)
    return value


def _said(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def row_types() -> dict[str, tuple[type, bool]]:
    """Of each column: its Python type (str, int, float or bool), and whether it may be null."""
    found: dict[str, tuple[type, bool]] = {}
    for name, hint in get_type_hints(Row).items():
        if name in COLUMNS:
            kinds = [k for k in getattr(hint, "__args__", (hint,)) if k is not type(None)]
            found[name] = (kinds[0], hint is not kinds[0])
    return found


def column_range(name: str) -> tuple[float, float] | None:
    """The closed range a column's figure lies in, or None where there is none."""
    return _RANGES.get(name)


def _row(doc: Any, where: str) -> Row:
    _expect(doc, dict, where)
    for name in _ROW_MUST:
        if name not in doc:
            raise InputError(f"{where}: the key '{name}' is missing", _REMEDY)
    for name, (kind, nullable) in row_types().items():
        if name in doc:
            _cell(doc[name], name, kind, nullable, f"{where}.{name}")
    if doc["status"] not in STATUSES:
        raise InputError(f"{where}.status is {_said(doc['status'])}, not one of {', '.join(STATUSES)}", _REMEDY)
    for value, low, high in _INTERVALS:
        found = [doc[k] for k in (low, value, high) if doc.get(k) is not None]
        if found != sorted(found):
            said = f"{value} {doc.get(value)} does not lie in its own interval {doc.get(low)} to {doc.get(high)}"
            raise InputError(f"{where}: {said}", _REMEDY)
    return Row.from_json(doc)


def _cell(value: Any, name: str, kind: type, nullable: bool, where: str) -> None:
    if value is None and nullable:
        return
    right = isinstance(value, bool) if kind is bool else isinstance(value, kind) and not isinstance(value, bool)
    if not right and not (kind is float and type(value) is int):
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise InputError(f"{where} is {_said(value)}, not {names[kind]}{' or null' if nullable else ''}", _REMEDY)
    if isinstance(value, float) and not math.isfinite(value):  # 1e999 is valid JSON and reads as infinity
        raise InputError(f"{where} is {value}, not a finite number", _REMEDY)
    if name in _RANGES:
        low, high = _RANGES[name]
        if not low <= value <= high:
            raise InputError(f"{where} is {_said(value)}, outside {low:g} to {high:g}", _REMEDY)


def _texts(doc: Any, names: Sequence[str], where: str) -> dict[str, str]:
    _expect(doc, dict, where)
    for name in names:
        if not isinstance(doc.get(name), str):
            raise InputError(f"{where}.{name} is {_said(doc.get(name))}, not a text", _REMEDY)
    return {name: doc[name] for name in names}


def _finding(doc: Any, where: str) -> Finding:
    found = _texts(doc, ("code", "severity", "message", "remedy", "node", "target"), where)
    if found["severity"] not in SEVERITIES:
        raise InputError(f"{where}.severity is {_said(found['severity'])}, not one of {', '.join(SEVERITIES)}", _REMEDY)
    return Finding(**found)


def _verdict(doc: Any, where: str) -> Verdict:
    found = _texts(doc, ("outcome",), where)
    if found["outcome"] not in OUTCOMES:
        raise InputError(f"{where}.outcome is {_said(found['outcome'])}, not one of {', '.join(OUTCOMES)}", _REMEDY)
    reasons = [
        Reason(**_texts(item, ("row", "check", "outcome", "message"), f"{where}.reasons[{i}]"))
        for i, item in enumerate(_expect(doc.get("reasons") or [], list, f"{where}.reasons"))
    ]
    skipped = _expect(doc.get("skipped") or [], list, f"{where}.skipped")
    return Verdict(found["outcome"], tuple(reasons), tuple(str(s) for s in skipped))
