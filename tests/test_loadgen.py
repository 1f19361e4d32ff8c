"""loadgen: its log read, and LoadGen itself over a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from deploykit import graph, hosted, hosted_loadgen, loadgen
from deploykit.artifact import Artifact
from deploykit.children import Child
from deploykit.errors import BackendFailed, InputError, UnknownName
from deploykit.loadgen import LoadOutcome, LoadRequest
from deploykit.session import OpenRequest
from deploykit.signature import Feeds


def _log(**values: Any) -> str:
    return "\n".join(":::MLLOG " + json.dumps({"key": k, "value": v}) for k, v in values.items()) + "\n:::MLLOG {cut"


def test_scenarios_go_by_any_case_and_a_wrong_name_is_answered() -> None:
    assert loadgen.scenario("offline") == "Offline"
    with pytest.raises(UnknownName, match="did you mean 'Server'"):
        loadgen.scenario("Servr")


@pytest.mark.parametrize(("text", "seconds"), [("15ms", 0.015), ("500us", 0.0005), ("0.2s", 0.2)])
def test_a_latency_has_a_unit(text: str, seconds: float) -> None:
    assert loadgen.latency_s(text, "--server-latency") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["15", "ms", "-3ms", "1e9s", "nanms"])
def test_what_is_no_latency_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no latency"):
        loadgen.latency_s(text, "--server-latency")


def test_a_log_gives_figure_verdict_and_reason() -> None:
    key = "result_90.00_percentile_latency_ns"
    text = _log(**{key: 2_000_000, "result_validity": "INVALID", "result_min_duration_met": False, "result_query_count": 7})
    found = loadgen.outcome(LoadRequest("SingleStream", 3.0), text, {"batch": 1.0})
    assert (found.value, found.unit, found.valid, found.queries) == (0.002, "s", False, 7)
    assert found.reasons == ("the minimum duration was not met",)
    assert "2 ms (90th percentile of latency), INVALID over 3 s: the minimum duration" in found.in_words()
    assert LoadOutcome.from_json(found.to_json()) == found


@pytest.mark.parametrize("text", ["", "no log", _log(result_validity="VALID"), _log(result_samples_per_second=3)])
def test_a_log_without_a_result_is_no_result(text: str) -> None:
    with pytest.raises(BackendFailed):
        loadgen.outcome(LoadRequest("Offline", 3.0), text, {})


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    path = tiny_models.conv_net(tmp_path_factory.mktemp("loadgen") / "model.onnx")
    Artifact(path, "onnx", "fp32", graph.signature(graph.load(path)), "engine").save()
    return path


def _samples(n: int = 8) -> list[Feeds]:
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(n)]


def _run(engine: Path, request: LoadRequest, batch: int) -> LoadOutcome:
    pytest.importorskip("mlperf_loadgen")
    with Child("loadgen", threads=1) as child:
        child.call(hosted.open_engine, "onnxruntime", engine, OpenRequest("fp32", batch, 1))
        return child.call(hosted_loadgen.run, request, _samples(), batch, timeout_s=120)


@pytest.mark.parametrize(
    ("scenario", "batch", "unit"), [("SingleStream", 1, "s"), ("MultiStream", 4, "s"), ("Offline", 4, "samples/s")]
)
def test_loadgen_really_runs(engine: Path, scenario: str, batch: int, unit: str) -> None:
    found = _run(engine, LoadRequest(scenario, 0.3), batch)
    assert found.unit == unit
    assert found.value is not None and found.value > 0
    assert found.queries >= 1
    assert found.logs is not None and set(found.logs) == {"mlperf_log_summary.txt", "mlperf_log_detail.txt"}
    assert ("VALID" in found.logs["mlperf_log_summary.txt"]) and found.verdict in ("VALID", "INVALID")


def test_no_rate_keeps_an_impossible_bound(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _run(engine, LoadRequest("Server", 0.2, 1e-7), 1)
    assert found.value is None
    assert not found.valid
    assert "missed" in found.reasons[0]
    assert not found.tried  # the warm-up has shown it: no query is sent


def test_a_probe_of_a_slow_engine_is_cut_short_and_judged_by_its_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def once(request: LoadRequest, sut: object, extra: dict[str, float]) -> LoadOutcome:
        rate = extra.get("server_target_qps", 2.0)
        asked.append(request.seconds)
        tail = {"p99": 0.4 if rate <= 1.0 else 0.9}
        settings = {"latency_s": request.latency_s}
        return LoadOutcome(request.scenario, rate, "samples/s", False, request.seconds, 9, tail, ("too few",), settings)

    class Slow:
        run_s = mean_s = 0.3
        batch = streams = 1

    monkeypatch.setattr(hosted_loadgen, "_once", once)
    request = LoadRequest("Server", 1.0, 0.5)
    found = hosted_loadgen._highest_rate(request, Slow())  # type: ignore[arg-type]
    assert found.value is not None and 0.9 < found.value <= 1.0
    assert not found.valid  # LoadGen's own verdict: so few queries show no 99th percentile
    assert asked[-1] == hosted_loadgen.HOLD_MOST_S
    assert max(asked[:-1]) == hosted_loadgen.PROBE_MOST_S
    assert sum(asked) < hosted_loadgen.worst_s(request)


def test_a_failing_engine_is_an_error_not_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlperf_loadgen")
    path = Path(__file__)

    class Broken:
        streams = 1

        class Signature:
            inputs = ()

        signature = Signature()

        def __init__(self) -> None:
            self.calls = 0

        def bind(self, feeds: Feeds) -> Any:
            def run() -> None:
                self.calls += 1
                if self.calls > 30:
                    raise BackendFailed(f"{path.name} broke")

            return run

    monkeypatch.setattr(hosted, "open_session", Broken)
    monkeypatch.setattr(hosted, "WARMUP_S", 0.0)
    with pytest.raises(BackendFailed, match="broke"):
        hosted_loadgen.run(LoadRequest("SingleStream", 0.1), _samples(2), 1)


@pytest.mark.parametrize("longest", [0.0, 1.5, 100.0])
def test_a_rate_that_did_not_hold_is_no_figure(longest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that keeps the bound for so many seconds only: never, in the search's probes, always."""

    def once(request: LoadRequest, sut: object, extra: dict[str, float]) -> LoadOutcome:
        valid = request.seconds <= longest
        rate = extra.get("server_target_qps", 1000.0)
        settings = {"latency_s": request.latency_s}
        return LoadOutcome("Server", rate, "samples/s", valid, request.seconds, 9, {"p99": 1.0}, (), settings, (), {"log": "x"})

    class Fast:
        run_s = mean_s = 0.001
        batch = streams = 1

    monkeypatch.setattr(hosted_loadgen, "_once", once)
    found = hosted_loadgen._highest_rate(LoadRequest("Server", 10.0, 0.5), Fast())  # type: ignore[arg-type]
    assert (found.value is not None, found.valid) == ((longest == 100.0,) * 2)
    assert found.logs == {"log": "x"}
    if longest == 1.5:
        assert "kept 500 ms in the search, and over a longer run even" in found.in_words()
    elif not longest:
        assert "samples/s missed 500 ms" in found.in_words()
