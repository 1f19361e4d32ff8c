"""What MLPerf's LoadGen is asked for, and what its log says: scenario, figure, verdict.

Scenarios and their figures: MLPerf Inference rules, 'Scenarios'. SingleStream: 90th percentile of latency; MultiStream: 99th
percentile of the latency of a query of eight samples; Server: the highest Poisson rate with its 99th percentile within a
bound; Offline: samples a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deploykit.errors import BackendFailed, InputError, UnknownName

SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline")
SAMPLES_PER_QUERY = 8  # MultiStream's, from the rules
SERVER_LATENCY_S = 0.015  # the rules' bound for ResNet-50
LATENCY_SCENARIOS = ("SingleStream", "MultiStream")
_MARK = ":::MLLOG "
_FIGURES = {
    "SingleStream": ("result_90.00_percentile_latency_ns", "s"),
    "MultiStream": ("result_99.00_percentile_per_query_latency_ns", "s"),
    "Server": ("result_scheduled_samples_per_sec", "samples/s"),
    "Offline": ("result_samples_per_second", "samples/s"),
}


def scenario(name: str) -> str:
    """The scenario of that name, in LoadGen's spelling, whatever the case. Raises UnknownName."""
    for known in SCENARIOS:
        if name.lower() == known.lower():
            return known
    raise UnknownName("scenario", name, SCENARIOS)


def latency_s(text: str, option: str) -> float:
    """Seconds from '15ms', '500us' or '0.2s'. Raises InputError for anything else."""
    for unit, scale in (("ms", 1e-3), ("us", 1e-6), ("s", 1.0)):
        if text.endswith(unit):
            try:
                found = float(text.removesuffix(unit)) * scale
            except ValueError:
                break
            if 0 < found < 3600:
                return found
            break
    raise InputError(f"{option} '{text}' is no latency", f"example: {option} 15ms")


@dataclass(frozen=True)
class LoadRequest:
    """One run of LoadGen: for at least `seconds`; `latency_s` bounds Server's 99th percentile."""

    scenario: str
    seconds: float
    latency_s: float = SERVER_LATENCY_S


@dataclass(frozen=True)
class LoadOutcome:
    """What LoadGen found. value: in `unit`, None where no rate kept Server's bound; valid: its own verdict; seconds: how long
    it was asked to run; tried: Server's search, (samples a second, whether LoadGen called it VALID); logs: its files."""

    scenario: str
    value: float | None
    unit: str
    valid: bool
    seconds: float
    queries: int
    percentiles_s: Mapping[str, float]
    reasons: tuple[str, ...]
    settings: Mapping[str, float]
    tried: tuple[tuple[float, bool], ...] = ()
    logs: Mapping[str, str] | None = None

    @property
    def verdict(self) -> str:
        """LoadGen's word for it."""
        return "VALID" if self.valid else "INVALID"

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON values, without the logs."""
        doc = asdict(self)
        doc.pop("logs")
        return {**doc, "reasons": list(self.reasons), "tried": [list(t) for t in self.tried], "verdict": self.verdict}

    @classmethod
    def from_json(cls, doc: Mapping[str, Any], logs: Mapping[str, str] | None = None) -> LoadOutcome:
        """The outcome that `to_json` wrote."""
        rest = {k: v for k, v in doc.items() if k not in ("verdict", "reasons", "tried")}
        tried = tuple((float(rate), bool(ok)) for rate, ok in doc["tried"])
        return cls(**rest, reasons=tuple(doc["reasons"]), tried=tried, logs=logs)

    def in_words(self) -> str:
        """The figure with what it is, for a person."""
        if self.value is None:
            return f"{self.scenario}: no rate kept the bound; {'; '.join(self.reasons)}"
        figure = f"{self.value * 1e3:.3g} ms" if self.unit == "s" else f"{self.value:,.4g} {self.unit}"
        what = {
            "SingleStream": "90th percentile of latency",
            "MultiStream": f"99th percentile of a query of {SAMPLES_PER_QUERY}",
            "Server": f"highest Poisson rate with 99 % within {self.settings.get('latency_s', 0) * 1e3:.3g} ms",
            "Offline": "throughput",
        }[self.scenario]
        said = f"LoadGen {self.scenario}: {figure} ({what}), {self.verdict} over {self.seconds:g} s"
        return said + (f": {'; '.join(self.reasons)}" if self.reasons and not self.valid else "")


def read_detail(text: str) -> dict[str, Any]:
    """Key and value of each line of mlperf_log_detail.txt; of a repeated key the last. Raises BackendFailed for no log."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith(_MARK):
            try:
                doc = json.loads(line.removeprefix(_MARK))
                found[str(doc["key"])] = doc["value"]
            except (ValueError, KeyError, TypeError):
                continue  # a line cut off in the middle; what matters is asked for by name below
    if not found:
        raise BackendFailed("LoadGen left no log to read")
    return found


def outcome(
    request: LoadRequest, detail: str, settings: Mapping[str, float], logs: Mapping[str, str] | None = None
) -> LoadOutcome:
    """The outcome in a detail log. Raises BackendFailed where the log has no verdict or no figure."""
    found = read_detail(detail)
    key, unit = _FIGURES[request.scenario]
    if "result_validity" not in found or key not in found:
        errors = [str(v) for k, v in found.items() if "error" in k.lower()]
        raise BackendFailed(f"LoadGen's log has no result{': ' + errors[0] if errors else ''}")
    value = float(found[key]) * (1e-9 if unit == "s" else 1.0)
    return LoadOutcome(
        scenario=request.scenario,
        value=value,
        unit=unit,
        valid=found["result_validity"] == "VALID",
        seconds=request.seconds,
        queries=int(found.get("result_query_count", found.get("result_sample_count", 0)) or 0),
        percentiles_s=_percentiles(found),
        reasons=_reasons(found),
        settings=dict(settings),
        logs=logs,
    )


def _percentiles(found: Mapping[str, Any]) -> dict[str, float]:
    """p50, p90, ... in seconds: of a query where LoadGen has it (MultiStream), else of a sample."""
    named: dict[str, float] = {}
    for p in ("50.00", "90.00", "95.00", "97.00", "99.00", "99.90"):
        for key in (f"result_{p}_percentile_per_query_latency_ns", f"result_{p}_percentile_latency_ns"):
            if key in found:
                named.setdefault(f"p{float(p):g}", float(found[key]) * 1e-9)
    return named


def _reasons(found: Mapping[str, Any]) -> tuple[str, ...]:
    said: Sequence[tuple[str, str]] = (
        ("result_min_duration_met", "the minimum duration was not met"),
        ("result_min_queries_met", "too few queries were sent"),
        ("result_perf_constraints_met", "the latency bound was not kept"),
        ("early_stopping_met", "too few queries for the percentile (early stopping)"),
    )
    return tuple(text for key, text in said if found.get(key) is False or str(found.get(key)).lower() == "false")
