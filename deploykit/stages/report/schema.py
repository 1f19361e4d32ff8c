"""The published JSON schema of report.json, made from the code (docs/report-schema.json holds it; a test compares them)."""

from __future__ import annotations

import math
from typing import Any

from deploykit.report_document import OUTCOMES, SCHEMA_VERSION, STATUSES, column_range, row_types
from deploykit.verdict import SEVERITIES

_JSON = {str: "string", int: "integer", float: "number", bool: "boolean"}
_MEANING = {
    "name": "the model",
    "batch": "items a run",
    "status": "ok: measured here; built: an engine for other hardware; skipped and failed: see reason",
    "images_per_s": "items over the wall clock of the timed windows",
    "p50_s": "seconds; percentiles are null below the run counts of MLPerf's early stopping (p90 64, p95 130, p99 662)",
    "cov": "coefficient of variation of the window medians, a fraction",
    "stable": "cov is at most 0.025",
    "n_timed": "how many runs were timed",
    "speedup": "throughput over the reference's at the same batch: median of per-round ratios; low and high: 95 % interval",
    "top1": "a fraction",
    "top5": "a fraction",
    "top1_drop_pp": "percentage points lost against the reference on the same samples, positive is worse; low and high: 95 %",
    "agreement": "share of samples whose top-1 is the reference's, a fraction",
    "sqnr_db": "output signal over quantization noise, decibels",
    "roofline_share": "share of the nearer ceiling measured on this machine, a fraction",
    "scenario": "SingleStream, MultiStream, Server or Offline, measured by MLPerf's LoadGen; more in `scenarios`",
    "scenario_value": "in scenario_unit: p90 latency, p99 latency of a query of 8, highest Poisson rate, throughput",
    "scenario_unit": "s or samples/s",
    "scenario_valid": "LoadGen's own verdict",
    "streams": "requests at once, which share the threads",
    "layout": "channels-last where images and filters lie so in memory; empty: the backend's usual one",
    "bound_by": "compute or memory: at least half of the time is what that ceiling asks for; else overhead",
}


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of report.json."""
    text, texts = {"type": "string"}, {"type": "array", "items": {"type": "string"}}
    record = {"type": "object"}
    finding = dict.fromkeys(("code", "message", "remedy", "node", "target"), text) | {"severity": {"enum": list(SEVERITIES)}}
    reason = dict.fromkeys(("row", "check", "message"), text) | {"outcome": {"enum": list(OUTCOMES)}}
    verdict = {"outcome": {"enum": list(OUTCOMES)}, "reasons": {"type": "array", "items": _object(reason)}, "skipped": texts}
    properties = {
        "schema_version": {"const": SCHEMA_VERSION},
        "reference": {"type": "object", "properties": dict.fromkeys(("name", "backend", "precision"), text)},
        "rows": {"type": "array", "items": _row()},
        "model": record,
        "environment": record,
        "samples": {"type": "object", "additionalProperties": record},
        "findings": {"type": "array", "items": _object(finding)},
        "verdict": {"anyOf": [_object(verdict), {"type": "null"}]},
        "measured_at": text,
        "command": texts,
        "versions": {"type": "object", "additionalProperties": text},
        "notes": texts,
        "drifts": {"type": "object", "additionalProperties": record},
        "scenarios": {"type": "object", "additionalProperties": record},
        "explanations": {"type": "object", "additionalProperties": record},
        "layer_drifts": {"type": "object", "additionalProperties": record},
        "checksum": {"type": "string", "description": "sha256 over the JSON of all the rest, keys sorted"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"deploykit report, version {SCHEMA_VERSION}",
        "description": "What was not measured is null, never zero. Times in seconds, sizes in bytes.",
        "type": "object",
        "properties": properties,
        "required": ["schema_version", "reference", "rows"],
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _row() -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for name, (kind, nullable) in row_types().items():
        found: dict[str, Any] = {"type": [_JSON[kind], "null"] if nullable else _JSON[kind]}
        if name == "status":
            found = {"enum": list(STATUSES)}
        limits = column_range(name)
        if limits is not None:
            found["minimum"] = limits[0]
            if limits[1] != math.inf:
                found["maximum"] = limits[1]
        if name in _MEANING:
            found["description"] = _MEANING[name]
        properties[name] = found
    required = ["name", "backend", "precision", "batch", "status"]
    return {"type": "object", "properties": properties, "required": required}
