"""One tiny model through the line with a scenario and ceilings, and through a sweep."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models

from deploykit import children, report_document
from deploykit.configuration import Configuration, Limits, Quality, Score, Trial
from deploykit.errors import BackendFailed, InputError
from deploykit.loadgen import LoadOutcome
from deploykit.measurement import MIN_RUNS, Window
from deploykit.pipeline import delivery, line, measuring, rooflines, scenarios, sweep_bench, sweeping
from deploykit.pipeline.line import LineRequest, LineResult
from deploykit.pipeline.request import DataRequest, RowsRequest, Silent, SourceRequest
from deploykit.roofline import Ceilings
from deploykit.row import Row
from deploykit.session import OpenRequest
from deploykit.signature import TensorSpec
from deploykit.stages import bench
from deploykit.stages import ceilings as stage
from deploykit.stages.sweep import Found
from deploykit.store import Store

pytest.importorskip("onnxruntime")
OUTCOME = LoadOutcome("SingleStream", 0.001, "s", True, 1.0, 9, {}, (), {})
CEILINGS = Ceilings("test", "measured", {"fp32": 1e12}, {1 << 18: 1e11})


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> LineRequest:
    folder = tmp_path_factory.mktemp("load")
    model = tiny_models.conv_net(folder / "tiny.onnx")
    rows = RowsRequest(("onnxruntime",), ("fp32",), (1, 2), threads=1, duration="smoke", scenario="Offline")
    return LineRequest((SourceRequest(str(model)),), DataRequest("random:8"), rows, folder / "store")


@pytest.fixture(scope="module")
def result(request_: LineRequest) -> LineResult:
    pytest.importorskip("mlperf_loadgen")
    measure, stage.measure = stage.measure, lambda threads, progress=None: CEILINGS
    try:
        rooflines.ceilings(Store(request_.store), 1, Silent())  # a smoke run takes what is kept
        return line.run(request_)
    finally:
        stage.measure = measure


def test_a_smoke_run_measures_no_ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "measure", lambda *_, **__: pytest.fail("ceilings were measured"))
    model = tiny_models.conv_net(tmp_path / "tiny.onnx")
    rows = RowsRequest(("onnxruntime",), ("fp32",), (1,), threads=1, duration="smoke")
    found = line.run(LineRequest((SourceRequest(str(model)),), DataRequest("random:4"), rows, tmp_path / "store"))
    assert [r.roofline_share for r in found.report.rows] == [None]


def test_a_row_has_the_scenario_s_figure_and_its_logs_lie_beside_the_report(result: LineResult, tmp_path: Path) -> None:
    rows = result.report.rows
    assert [r.scenario for r in rows] == ["Offline", "Offline"]
    assert all(r.scenario_value and r.scenario_unit == "samples/s" and r.scenario_valid is not None for r in rows)
    assert all("LoadGen Offline: " in r.notes for r in rows)
    delivery.deliver(result.report, result, tmp_path / "out", Silent())
    logs = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out" / "loadgen").rglob("*.txt"))
    assert len(logs) == 4
    read = report_document.load(tmp_path / "out")
    assert read.scenarios == result.report.scenarios
    assert {doc["verdict"] for doc in read.scenarios.values()} <= {"VALID", "INVALID"}


def test_each_row_has_its_share_of_the_ceilings(result: LineResult) -> None:
    for row in result.report.rows:
        assert row.roofline_share is not None and 0 < row.roofline_share < 1
        assert row.bound_by == "overhead"
    assert result.report.environment["ceilings"]["ops_per_s"] == {"fp32": 1e12}


def test_a_second_run_reuses_what_loadgen_found(
    request_: LineRequest, result: LineResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenarios, "_ask", lambda *_: pytest.fail("it was asked again"))
    monkeypatch.setattr(stage, "measure", lambda *_: pytest.fail("the ceilings were measured again"))
    again = line.run(request_)
    assert again.report.scenarios == result.report.scenarios


def test_without_loadgen_the_rows_say_what_to_install(
    request_: LineRequest, result: LineResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "has_module", lambda name: False)
    loads = scenarios.take(
        result.entries, result.entries[0].engine.signature, None, request_.rows, Store(request_.store), Silent()
    )
    assert loads.exit_code() == 3
    planned = [e.row for e in result.entries]
    said = scenarios.said(result.report.rows, planned, result.results, loads)
    assert all("LoadGen: skipped" in r.notes and "pip install 'deploykit[loadgen]'" in r.notes for r in said)


def test_one_sample_at_a_time_is_no_load_for_a_larger_batch(
    request_: LineRequest, result: LineResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenarios, "_one", lambda *_: OUTCOME)
    rows = replace(request_.rows, scenario="singlestream")
    loads = scenarios.take(result.entries, result.entries[0].engine.signature, None, rows, Store(request_.store), Silent())
    assert "one sample at a time" in str(next(o for key, o in loads.outcomes.items() if key.endswith("b2")))
    assert loads.exit_code() == 0
    said = scenarios.said(result.report.rows, [e.row for e in result.entries], result.results, loads)
    assert "it is for batch 1" in said[1].notes


@pytest.mark.parametrize(("backends", "code"), [(("onnxruntime",), 4), (None, 0)])
def test_a_failed_load_counts_for_a_row_asked_for_by_name(
    request_: LineRequest, result: LineResult, monkeypatch: pytest.MonkeyPatch, backends: tuple[str, ...] | None, code: int
) -> None:
    monkeypatch.setattr(scenarios, "_one", lambda *_: BackendFailed("stand-in"))
    rows = replace(request_.rows, backends=backends, precisions=None)
    loads = scenarios.take(result.entries, result.entries[0].engine.signature, None, rows, Store(request_.store), Silent())
    assert loads.exit_code() == code


@pytest.mark.parametrize("scenario", ["Offline", "MultiStream"])
def test_a_graph_with_a_batch_of_its_own_is_fed_that_many_samples_a_run(tmp_path: Path, scenario: str) -> None:
    pytest.importorskip("mlperf_loadgen")
    model = tiny_models.conv_net(tmp_path / "fixed.onnx", batch=4)
    made = line.ready(
        LineRequest(
            (SourceRequest(str(model)),),
            DataRequest("random:8"),
            RowsRequest(("onnxruntime",), ("fp32",), (4,), threads=1, duration="smoke", scenario=scenario),
            tmp_path / "store",
        ),
        Silent(),
    )
    loads = scenarios.take(made.entries, made.models[0].signature, made.samples.judge, made.rows, made.store, Silent())
    (found,) = loads.outcomes.values()
    assert isinstance(found, LoadOutcome), found
    assert found.value


def test_ceilings_below_a_row_are_measured_again_and_the_higher_ones_stay(
    request_: LineRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(
        [
            Ceilings("a", "measured", {"fp32": 1e9, "int8": 9e9}, {1: 5.0}),
            Ceilings("b", "measured", {"fp32": 2e9, "int8": 1e9}, {1: 4.0}),
        ]
    )
    monkeypatch.setattr(stage, "measure", lambda threads, progress=None: next(found))
    store = Store(tmp_path)
    first, kept = rooflines.ceilings(store, 1, Silent())
    assert (first.ops_per_s["fp32"], kept) == (1e9, False)
    assert rooflines.ceilings(store, 1, Silent()) == (first, True)
    second, _ = rooflines.ceilings(store, 1, Silent(), fresh=True)
    assert (second.ops_per_s, second.bytes_per_s) == ({"fp32": 2e9, "int8": 9e9}, {1: 5.0})
    assert rooflines.ceilings(store, 1, Silent()) == (second, True)


def test_only_rows_of_the_cpu_stand_under_its_ceilings_and_those_above_are_looked_into_once(
    request_: LineRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = Ceilings("low", "measured", {"fp32": 1.0}, {1: 1.0})
    asked: list[int] = []

    def measure(threads: int, progress: object = None) -> Ceilings:
        asked.append(threads)
        return low

    monkeypatch.setattr(stage, "measure", measure)
    store = Store(tmp_path)
    models = line.ready(replace(request_, rows=replace(request_.rows, scenario=None)), Silent()).models
    name = models[0].name
    here = Row(name, "onnxruntime", "fp32", 1, "ok", device="cpu", images_per_s=100.0)
    there = Row(name, "onnxruntime-cuda", "fp32", 1, "ok", device="NVIDIA T4", images_per_s=1e6)
    rooflines.ceilings(store, 1, Silent())
    rows, _ = rooflines.placed(models, [here, there], store, 1, Silent())
    assert rows[0].roofline_share is not None and rows[1].roofline_share is None
    assert len(asked) == 2
    rooflines.placed(models, [here, there], store, 1, Silent())
    assert len(asked) == 2
    rooflines.placed(models, [replace(here, images_per_s=101.0)], store, 1, Silent())
    assert len(asked) == 3


def test_a_bug_while_the_ceilings_are_measured_costs_the_roofline_and_not_the_run(
    request_: LineRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(threads: int, progress: object = None) -> Ceilings:
        raise children.BugInChild("in ceilings:\nTypeError: a bug")

    monkeypatch.setattr(stage, "measure", measure)
    asked = replace(request_, rows=replace(request_.rows, scenario=None))
    models = line.ready(asked, Silent()).models
    row = Row(models[0].name, "onnxruntime", "fp32", 1, "ok", device="cpu", images_per_s=100.0)
    assert rooflines.placed(models, [row], Store(tmp_path), 1, Silent()) == ([row], None)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = bench.Duration("test", launches=1, rounds=2, seconds=0.1, limit_s=0.1, enough_runs=1)
    monkeypatch.setattr(sweep_bench, "DURATIONS", {"look": quick, "final": quick})
    monkeypatch.setattr(sweep_bench, "GLIMPSE_S", 0.02)


def test_a_sweep_recommends_and_says_how_to_measure_it_again(request_: LineRequest, short: None) -> None:
    asked = sweeping.SweepRequest(request_, Limits(max_latency_s=10.0), (1,), command=("deploykit", "bench", "tiny.onnx"))
    swept = sweeping.take(asked, Silent())
    best = swept.found.best
    assert best is not None
    assert swept.exit_code == 0
    doc = json.loads(json.dumps(swept.to_json()))
    assert doc["recommended"]["command"].startswith("deploykit bench tiny.onnx --backend onnxruntime --precision fp32 --batch ")
    assert doc["recommended"]["agreement"] == 1.0
    assert best in swept.found.front
    again = sweeping.take(asked, Silent())
    assert again.reused == sum("glimpse" in t.scores for t in again.found.trials) > 0


def test_a_sweep_that_nothing_can_keep_says_so(request_: LineRequest, short: None) -> None:
    swept = sweeping.take(sweeping.SweepRequest(request_, Limits(max_latency_s=1e-9), (1,)), Silent())
    assert swept.found.best is None
    assert swept.exit_code == 1
    assert "nothing here keeps the limits" in "\n".join(sweeping.lines(swept))


def test_a_drop_cannot_be_limited_without_labels(request_: LineRequest) -> None:
    with pytest.raises(InputError, match="labelled samples"):
        sweeping.take(sweeping.SweepRequest(request_, Limits(max_drop_pp=0.5)), Silent())


def test_a_drop_without_labels_is_said_before_anything_is_built(request_: LineRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "ready", lambda *_: pytest.fail("it was built"))
    with pytest.raises(InputError, match="labelled samples"):
        sweeping.take(sweeping.SweepRequest(request_, Limits(max_drop_pp=0.5)), Silent())


def test_mixed_precision_is_refused_with_what_to_do_instead(request_: LineRequest) -> None:
    asked = replace(request_, rows=replace(request_.rows, precisions=("fp32", "mixed")))
    with pytest.raises(InputError, match="does not try mixed precision"):
        sweeping.take(sweeping.SweepRequest(asked, Limits(max_drop_pp=0.5)), Silent())


def test_an_accuracy_that_failed_is_said_and_measured_anew_the_next_time(
    request_: LineRequest, short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = sweeping.SweepRequest(replace(request_, store=tmp_path / "store"), Limits(), (1,))
    judged = measuring.judged
    monkeypatch.setattr(
        measuring, "judged", lambda entries, *_: {measuring.engine_id(e.row): BackendFailed("ran out") for e in entries}
    )
    swept = sweeping.take(asked, Silent())
    assert swept.qualities["onnxruntime", "fp32"].unmeasured == "ran out"
    assert "its accuracy was not measured: ran out" in list(sweeping.lines(swept))
    assert "not measured: ran out" in swept.qualities["onnxruntime", "fp32"].refuses(Limits(max_drop_pp=1.0))
    monkeypatch.setattr(measuring, "judged", judged)
    assert sweeping.take(asked, Silent()).qualities["onnxruntime", "fp32"].agreement == 1.0


def test_a_sweep_where_everything_fails_ends_with_the_backend_s_code(
    request_: LineRequest, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sweep_bench.Evaluations, "evaluate", lambda self, configurations, effort: dict.fromkeys(configurations, "broke")
    )
    swept = sweeping.take(sweeping.SweepRequest(request_, Limits(), (1,)), Silent())
    assert swept.exit_code == 4
    assert "failed to open or run" in next(sweeping.lines(swept))


def test_what_came_closest_stands_first_where_nothing_keeps_the_limits(request_: LineRequest) -> None:
    near, far, lossy = (Configuration("a", p, 1, 1) for p in ("fp32", "bf16", "int8"))
    trials = (
        Trial(lossy, {}, "loses 9.00 pp of top-1"),
        Trial(far, {"glimpse": Score(1.0, 9.0)}, "takes 9e+03 ms"),
        Trial(near, {"glimpse": Score(1.0, 1.1)}, "takes 1.1e+03 ms"),
    )
    qualities = {c.engine: Quality(drop, drop) for c, drop in ((near, 0.0), (far, 0.0), (lossy, 9.0))}
    limits = Limits(max_latency_s=1.0, max_drop_pp=0.5)
    swept = sweeping.Swept(Found(None, (), trials, 1.0), qualities, sweeping.SweepRequest(request_, limits), {}, 8, 0, {}, {})
    said = [text.split(":")[0].strip() for text in sweeping.lines(swept)][1:]
    assert said == [str(near), str(far), str(lossy)]


def test_a_recommendation_says_where_another_precision_ran(request_: LineRequest) -> None:
    one = Configuration("a", "int8", 1, 1)
    for ran in ("", "fp32"):
        found = Found(one, (one,), (Trial(one, {"final": Score(1.0, 1.0, ran=ran)}),), 1.0)
        swept = sweeping.Swept(found, {one.engine: Quality()}, sweeping.SweepRequest(request_, Limits()), {}, 8, 0, {}, {})
        assert ("asked for int8, really ran fp32" in list(sweeping.lines(swept))) is bool(ran)
    assert sweep_bench._ran(one, "fp32") == "fp32" and sweep_bench._ran(one, "int8") == ""


@pytest.mark.parametrize("tail", [False, True])
def test_a_limit_on_the_tail_measures_slow_engines_until_they_have_one(tail: bool) -> None:
    """One run a window, as an engine of 0.3 s a run has."""

    class Slow:
        def resume(self) -> None: ...
        def pause(self) -> None: ...
        def call(self, function: object, *args: object, **kwargs: object) -> object:
            return Window((0.3,), 0.3) if args else 1

    target = bench.Target("slow", "onnxruntime", Path("m"), OpenRequest("fp32", 1, 1), "sweep")
    span = sweep_bench.durations(tail=tail)["final"]
    runs = 0
    for _ in range(span.launches):
        running = bench._Running(target, Slow(), None, 0.0)  # type: ignore[arg-type]
        bench._take_turns([running], span, random.Random(0), {"slow": bench._Collected()})
        runs += len(running.windows)
    assert (runs >= MIN_RUNS[90]) is tail
    assert runs <= MIN_RUNS[90] + span.launches


def test_an_outcome_without_a_figure_is_not_kept(
    request_: LineRequest, result: LineResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answers = iter([replace(OUTCOME, value=None, valid=False), OUTCOME])

    def ask(entry: measuring.Entry, *_: object) -> LoadOutcome:
        asked.append(entry.row.id)
        return next(answers)

    monkeypatch.setattr(scenarios, "_ask", ask)
    rows = replace(request_.rows, scenario="Offline")
    for value in (None, OUTCOME.value, OUTCOME.value):
        loads = scenarios.take(result.entries[:1], result.entries[0].engine.signature, None, rows, Store(tmp_path), Silent())
        (found,) = loads.outcomes.values()
        assert isinstance(found, LoadOutcome) and found.value == value
    assert len(asked) == 2


def test_a_layout_is_tried_only_where_there_is_a_choice() -> None:
    assert sweeping._layouts("torch", None) == ["", "channels-last"]
    assert sweeping._layouts("torch", ("channels-last",)) == ["channels-last"]
    assert sweeping._layouts("torch", ("channels-first",)) == [""]
    assert sweeping._layouts("onnxruntime", ("channels-last",)) == [""]


def test_the_layout_asked_for_stands_in_the_rows_that_have_one_and_in_the_reference(tmp_path: Path) -> None:
    factory = tmp_path / "net.py"
    factory.write_text("import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())\n")
    spec = TensorSpec("input", "float32", ("batch", 3, 8, 8))
    rows = RowsRequest(("torch", "onnxruntime"), ("fp32",), (1,), threads=1, duration="smoke", layout="channels-last")
    asked = LineRequest((SourceRequest(f"{factory}:net", inputs=(spec,)),), DataRequest("random:4"), rows, tmp_path / "store")
    result = line.run(asked)
    assert {r.backend: r.layout for r in result.report.rows} == {"torch": "channels-last", "onnxruntime": None}
    assert result.report.reference["layout"] == "channels-last"
    assert result.report.is_reference(next(r for r in result.report.rows if r.backend == "torch"))
