"""The gate on real runs: both engines measured in turns, baselines by machine class, moved on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_rows
import tiny_models

from deploykit import machine, report_document
from deploykit.artifact import Artifact
from deploykit.errors import ChildDied, InputError
from deploykit.pipeline import baselines, delivery, gating, line, remeasuring
from deploykit.pipeline.gating import Again, GateRequest
from deploykit.pipeline.request import DataRequest, Int8Request, RowsRequest, SourceRequest
from deploykit.row import Row
from deploykit.signature import Signature
from deploykit.stages import gate as gates
from deploykit.stages.gate import Limits, LimitSet, Rule
from deploykit.stages.gate.against import Side, against

pytest.importorskip("onnxruntime")
BOTH = LimitSet(Limits(max_drop_pp=100.0, max_slowdown=0.9, max_memory_growth=9.0, max_startup_growth=99.0, max_size_growth=9.0))
QUICK = Again("smoke")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one model, 'base' and 'new': the INT8 engines differ, the FP32 ones are the same."""
    folder = tmp_path_factory.mktemp("gate")
    tiny_models.conv_net(folder / "net.onnx")
    rng = np.random.default_rng(3)
    np.savez(folder / "data.npz", x=rng.normal(size=(24, 3, 8, 8)).astype(np.float32), labels=rng.integers(0, 4, 24))
    for name, corrected in (("base", True), ("new", False)):
        request = line.LineRequest(
            (SourceRequest(str(folder / "net.onnx")),),
            DataRequest(str(folder / "data.npz"), int8=Int8Request(bias_correct=corrected)),
            RowsRequest(("onnxruntime",), ("fp32", "int8"), (1,), threads=1, duration="smoke"),
            folder / "engines",
        )
        result = line.run(request)
        delivery.deliver(result.report, result, folder / name, _Quiet())
    return folder


class _Quiet:
    def step(self, text: str) -> None:
        pass

    def progress(self, what: str, share: float) -> None:
        pass


def _edited(runs: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the base run with its report changed, the checksum made to fit."""
    shutil.copytree(runs / "base", out)
    doc = json.loads((out / "report.json").read_text())
    change(doc)
    doc["checksum"] = report_document.checksum(doc)
    (out / "report.json").write_text(json.dumps(doc))
    return out


def test_engines_that_differ_are_measured_in_turns_and_equal_ones_are_not(runs: Path) -> None:
    verdict = gating.gate(runs / "new", GateRequest(runs / "base", BOTH, again=QUICK), None)
    said = {(r.row, r.check): r for r in verdict.reasons}
    int8, fp32 = "net onnxruntime int8 batch 1", "net onnxruntime fp32 batch 1"
    assert "in turns over 5 launches, A/A" in said[int8, "speed"].message
    assert "the same engine" in said[fp32, "speed"].message
    assert said[fp32, "speed"].outcome == "pass"
    assert {check for row, check in said if row == int8} == {
        "top-1 drop", "speed", "throughput", "memory", "start-up", "size",
    }  # fmt: skip
    assert said[int8, "memory"].outcome == "pass"
    assert "samples paired" in said[int8, "top-1 drop"].message
    assert "would have shown" in said[int8, "top-1 drop"].message


@pytest.mark.parametrize(("whose", "outcome"), [("(new)", "fail"), ("(old)", "inconclusive")])
def test_a_process_killed_while_it_is_measured_is_no_pass(
    runs: Path, whose: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploykit.stages import bench

    windows = bench._one_window

    def kill(item: Any, seconds: float, state: Any) -> None:
        if item.target.id.endswith(whose) and len(item.windows) == 2:
            item.child.kill()
        windows(item, seconds, state)

    monkeypatch.setattr(bench, "_one_window", kill)
    limits = LimitSet(Limits(max_slowdown=0.9))
    verdict = gating.gate(runs / "new", GateRequest(runs / "base", limits, again=QUICK), None)
    found = next(r for r in verdict.reasons if "int8" in r.row)
    assert found.outcome == outcome
    assert "SIGKILL" in found.message
    assert issubclass(ChildDied, Exception)


def test_another_machines_runs_are_measured_again_only_where_asked_for(runs: Path, tmp_path: Path) -> None:
    base = _edited(runs, tmp_path / "other", lambda doc: doc["environment"].update(fingerprint="0" * 12))
    limits = LimitSet(Limits(max_slowdown=0.9))
    assert gating.gate(runs / "base", GateRequest(base, limits, again=QUICK), None).outcome == "inconclusive"
    assert gating.gate(runs / "base", GateRequest(base, limits, remeasure=True, again=QUICK), None).outcome == "pass"
    with pytest.raises(InputError, match="engines of both runs"):
        gating.gate(runs / "base", GateRequest(base / "report.json", limits, remeasure=True), None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda doc: doc["versions"].update(onnxruntime="0.1"), "other versions: onnxruntime 0.1"),
        (lambda doc: doc["rows"][1].update(p99_s=1.0, n_timed=600), "p99 of 600 runs, which needs 662"),
        (lambda doc: doc["rows"][1].update(p90_s=1e-9), "contradicts itself: p90_s"),
        (lambda doc: doc["rows"][1].update(images_per_s=1e9), "contradicts itself"),
        (lambda doc: doc["rows"][1].update(threads=7), "number of threads"),
    ],
)
def test_what_makes_two_runs_unlike_is_no_pass(
    runs: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    base = _edited(runs, tmp_path / "edited", change)
    verdict = gating.gate(runs / "base", GateRequest(base, LimitSet(Limits(max_slowdown=0.9)), again=QUICK), None)
    assert verdict.outcome == "inconclusive"
    assert any(said in r.message for r in verdict.reasons if r.outcome == "inconclusive"), verdict


def test_a_report_edited_by_hand_is_no_pass(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "base", tmp_path / "edited")
    file = tmp_path / "edited" / "report.json"
    file.write_text(file.read_text().replace('"notes": []', '"notes": ["x"]').replace('"measured_at": "2', '"measured_at": "3'))
    limits = LimitSet(Limits(max_drop_pp=100.0))
    assert gating.gate(runs / "base", GateRequest(runs / "base", limits), None).outcome == "pass"
    for report, base in ((tmp_path / "edited", runs / "base"), (runs / "base", tmp_path / "edited")):
        verdict = gating.gate(report, GateRequest(base, limits), None)
        assert verdict.outcome == "inconclusive"
        assert any(r.check == "checksum" for r in verdict.reasons)
    delivery.render_again(tmp_path / "edited")  # rendering it anew does not launder it
    assert report_document.load(tmp_path / "edited").wrong_checksum


def test_a_kept_baseline_holds_what_pairing_needs(runs: Path, tmp_path: Path) -> None:
    kept = tmp_path / "baselines"
    written, lines = gating.update(runs / "base", kept)
    assert written == kept / f"{machine.machine_class()}.json"
    assert len(lines) == 2 and all(text.startswith("new") for text in lines)
    run, found = baselines.open_run(runs / "base"), baselines.open_baseline(kept, machine.describe())
    assert found.outcomes.keys() == run.outcomes.keys() and run.outcomes
    for key, one in run.outcomes.items():
        assert found.outcomes[key].samples == one.samples
        assert np.array_equal(found.outcomes[key].correct, one.correct)
    verdict = gating.gate(runs / "new", GateRequest(kept, LimitSet(Limits(max_drop_pp=100.0))), None)
    assert any("samples paired" in r.message for r in verdict.reasons)


def test_moving_a_baseline_says_what_changes_and_nothing_half_made_is_left(runs: Path, tmp_path: Path) -> None:
    kept = tmp_path / "baselines"
    gating.update(runs / "base", kept)
    _, lines = gating.update(runs / "new", kept)
    assert any(text.startswith("changed") and "->" in text for text in lines)
    assert [p.name for p in kept.iterdir()] == [f"{machine.machine_class()}.json"]
    shutil.copytree(runs / "base", tmp_path / "folder")
    gating.update(runs / "new", tmp_path / "folder")
    assert (tmp_path / "folder" / "report.json").read_bytes() == (runs / "new" / "report.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["baselines", "folder"]


def test_a_baseline_of_another_class_is_not_taken(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "another-cpu-8t-0123456789ab.json").write_text((runs / "base" / "report.json").read_text())
    with pytest.raises(InputError, match="another-cpu-8t"):
        gating.gate(runs / "base", GateRequest(tmp_path, LimitSet(Limits(max_drop_pp=1.0))), None)


def test_a_baseline_is_not_made_of_an_edited_report_or_of_the_run_itself(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the run itself"):
        gating.update(runs / "base", runs / "base")
    run = baselines.open_run(runs / "base")
    with pytest.raises(InputError, match="edited"):
        baselines.update(replace(run, report=replace(run.report, wrong_checksum="x")), tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("packed", ["!", "AAAA", 5])
def test_damaged_outcomes_of_a_kept_baseline_are_refused(runs: Path, tmp_path: Path, packed: object) -> None:
    file, _ = gating.update(runs / "base", tmp_path / "b.json")
    doc = json.loads(file.read_text())
    next(iter(doc["outcomes"].values()))["correct"] = packed
    file.write_text(json.dumps(doc))
    with pytest.raises(InputError, match="outcomes of row"):
        baselines.open_baseline(file, {})


def test_limits_of_single_rows_stand_over_the_default(runs: Path) -> None:
    rules = (Rule({"precision": "int8"}, Limits(max_drop_pp=100.0)),)
    verdict = gating.gate(runs / "new", GateRequest(None, LimitSet(Limits(max_drop_pp=0.0), rules)), None)
    assert next(r for r in verdict.reasons if "int8" in r.row).outcome == "pass"
    nobody = (Rule({"backend": "tvm"}, Limits(max_drop_pp=1.0)),)
    verdict = gating.gate(runs / "new", GateRequest(None, LimitSet(Limits(max_drop_pp=100.0), nobody)), None)
    assert verdict.outcome == "inconclusive"


def test_a_row_without_an_engine_is_not_judged(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "base", tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "engines" / "net-onnxruntime-int8")
    verdict = gating.gate(runs / "new", GateRequest(tmp_path / "base", LimitSet(Limits(max_slowdown=0.9)), again=QUICK), None)
    assert next(r for r in verdict.reasons if "int8" in r.row).outcome == "inconclusive"


@pytest.mark.slow
def test_a_really_slower_engine_fails(tmp_path: Path) -> None:
    """The same row, its engine made of a network with four times the pixels to compute on."""
    from deploykit import graph
    from deploykit.artifact import Artifact
    from deploykit.row import Row

    engines = []
    for size in (32, 64):
        path = (
            tiny_models.conv_net(tmp_path / f"{size}" / "model.onnx", size=size)
            if (tmp_path / f"{size}").mkdir() is None
            else None
        )
        assert path is not None
        engines.append(Artifact(path, "onnx", "fp32", graph.signature(graph.load(path)), "engine").save())
    row = Row("net", "onnxruntime", "fp32", 1, "ok", threads=1)
    pools = [[{"x": np.random.default_rng(0).normal(size=(1, 3, s, s)).astype(np.float32)}] for s in (32, 64)]
    limits = Limits(max_slowdown=0.05)
    same = remeasuring.in_turns(
        remeasuring.Pair(row, engines[0], engines[0]), pools[0], remeasuring.span("smoke"), 1, limits, lambda *_: None
    )
    assert isinstance(same, gates.Turns)
    assert len(same.new.launches) == gates.MIN_LAUNCHES
    slow = remeasuring.in_turns(
        remeasuring.Pair(row, engines[1], engines[1]), pools[1], remeasuring.span("smoke"), 1, limits, lambda *_: None
    )
    assert isinstance(slow, gates.Turns)
    both = replace(same, new=slow.new)  # the four-fold work as the new engine
    outcome = {r.check: r.outcome for r in gates.timed(row, both, limits)}
    assert outcome["speed"] == "fail"


def test_a_row_of_a_gpu_finds_its_engine() -> None:
    def built(device: str, name: str = "net") -> Artifact:
        options = {"model": name, "backend": "tensorrt-rtx"}
        return Artifact(Path(device), "engine", "fp16", Signature((), ()), "engine", options=options, device=device)

    row = Row("net", "tensorrt-rtx", "fp16", 1, "ok", device="NVIDIA L4 (sm89)")
    one = remeasuring.by_key([built("sm80"), built("sm80", "other")])
    assert remeasuring._engine(row, one) is one["net", "tensorrt-rtx", "fp16", "sm80"]
    two = remeasuring.by_key([built("sm75"), built("sm89")])
    assert remeasuring._engine(row, two) is two["net", "tensorrt-rtx", "fp16", "sm89"]
    assert remeasuring._engine(replace(row, device="an unknown GPU"), two) is None
    assert remeasuring._engine(replace(row, precision="fp32"), two) is None


def test_the_number_of_requests_at_once_is_the_row_s(tmp_path: Path) -> None:
    engine = Artifact(tmp_path / "model.xml", "openvino", "fp32", Signature((), ()), "engine", device="cpu")
    row = Row("net", "openvino", "fp32", 1, "ok", device="cpu", threads=2, streams=2)
    assert [t.request.options for t in remeasuring._targets(remeasuring.Pair(row, engine, engine))] == [{"streams": 2}] * 3
    one = remeasuring.Pair(replace(row, streams=1), engine, engine)
    assert [t.request.options for t in remeasuring._targets(one)] == [{}] * 3


@pytest.mark.parametrize(
    ("was", "now", "outcome"), [(None, 1, "pass"), (2, 2, "pass"), (1, 2, "inconclusive"), (2, None, "inconclusive")]
)
def test_another_number_of_requests_at_once_cannot_be_compared(was: int | None, now: int | None, outcome: str) -> None:
    report = report_rows.a_report()

    def with_streams(count: int | None) -> Side:
        rows = tuple(replace(r, streams=count) if r.backend == "openvino" else r for r in report.rows)
        return Side(replace(report, rows=rows), {})

    verdict = against(with_streams(now), with_streams(was), LimitSet(Limits(max_slowdown=0.5)))
    found = [r for r in verdict.reasons if "openvino" in r.row and r.check == "speed"]
    assert found and {r.outcome for r in found} == {outcome}
    assert ("--streams" in found[0].message) is (outcome == "inconclusive")


def test_a_damaged_engine_of_the_baseline_is_found_before_the_run(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "base", tmp_path / "base")
    gating.check(GateRequest(tmp_path / "base", BOTH))
    engine = next((tmp_path / "base" / "engines").rglob("*.onnx"))
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError):
        gating.check(GateRequest(tmp_path / "base", BOTH))


def test_a_report_of_another_name_is_not_given_what_lies_beside_it(runs: Path, tmp_path: Path) -> None:
    """An older report kept in a run's folder: the outcomes and engines there are the newer run's."""
    folder = tmp_path / "run"
    shutil.copytree(runs / "base", folder)
    shutil.copy(folder / "report.json", folder / "older.json")
    own, older = baselines.open_run(folder / "report.json"), baselines.open_run(folder / "older.json")
    assert (own.folder, bool(own.outcomes)) == (folder, True)
    assert (older.folder, bool(older.outcomes)) == (None, False)
    assert not baselines.open_baseline(folder / "older.json", {}).outcomes
    with pytest.raises(InputError, match="engines of both runs"):
        gating.gate(folder / "older.json", GateRequest(runs / "base", BOTH, remeasure=True, again=QUICK), None)


@pytest.mark.parametrize("mark", ["../../elsewhere", "a/b", ["x"]])
def test_a_machine_class_is_no_path(runs: Path, tmp_path: Path, mark: object) -> None:
    report = _edited(runs, tmp_path / "run", lambda doc: doc["environment"].update(fingerprint=mark))
    (tmp_path / "kept").mkdir()
    with pytest.raises(InputError, match="no machine class"):
        gating.update(report, tmp_path / "kept")
    assert not list((tmp_path / "kept").iterdir())


def test_a_folder_that_holds_more_than_a_run_is_not_replaced(runs: Path, tmp_path: Path) -> None:
    target = tmp_path / "project"
    shutil.copytree(runs / "base", target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt, which is no run's"):
        gating.update(runs / "new", target)
    assert (target / "notes.txt").read_text() == "mine"
    (target / "notes.txt").unlink()
    shutil.copytree(runs / "new", target / "engines" / "new")
    with pytest.raises(InputError, match="holds the run"):
        gating.update(target / "engines" / "new", target)


def test_only_a_run_s_own_files_become_the_baseline(runs: Path, tmp_path: Path) -> None:
    for name, source in (("run", "new"), ("base", "base")):
        shutil.copytree(runs / source, tmp_path / name)
    (tmp_path / "run" / "deploykit.yaml").write_text("source: x")
    (tmp_path / "base" / "gate.xml").write_text("")
    gating.update(tmp_path / "run", tmp_path / "base")
    assert {p.name for p in (tmp_path / "base").iterdir()} == {p.name for p in (runs / "new").iterdir()}
    assert (tmp_path / "run" / "deploykit.yaml").is_file()


def test_moving_a_baseline_says_what_else_changes(runs: Path, tmp_path: Path) -> None:
    def change(doc: dict[str, Any]) -> None:
        doc["versions"]["onnxruntime"] = "0.1"
        doc["model"]["sha256"] = "f" * 64
        doc["verdict"] = {"outcome": "fail", "reasons": [], "skipped": []}

    target = _edited(runs, tmp_path / "base", change)
    report = _edited(runs, tmp_path / "failed", change)
    _, lines = gating.update(runs / "new", target)
    assert any(text.startswith("changed  onnxruntime: 0.1 -> ") for text in lines)
    assert any(text.startswith("changed  model: ffffffffffff -> ") for text in lines)
    assert not any(text.startswith("note") for text in lines)
    _, lines = gating.update(report, target)
    assert lines[0] == "note     the run's own gate said fail"


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (GateRequest(Path("base"), LimitSet(Limits(max_drop_pp=1.0)), remeasure=True), "no limit is on them"),
        (GateRequest(Path("base"), BOTH, again=Again("long")), "unknown duration"),
        (GateRequest(Path("base"), BOTH, again=Again(preprocess="none")), "--preprocess says how --data is read"),
    ],
)
def test_options_that_would_do_nothing_are_refused(request_: GateRequest, said: str) -> None:
    with pytest.raises(InputError, match=said):
        gating.check(request_, own_machine=False)


@pytest.mark.parametrize(("limits", "remeasure"), [(Limits(max_drop_pp=100.0), None), (Limits(max_slowdown=0.9), False)])
def test_data_to_measure_on_is_refused_where_nothing_is_measured(runs: Path, limits: Limits, remeasure: bool | None) -> None:
    asked = GateRequest(runs / "base", LimitSet(limits), remeasure, Again("smoke", data=str(runs / "data.npz")))
    with pytest.raises(InputError, match="--data is what engines are measured again on"):
        gating.gate(runs / "new", asked, None)


def test_a_run_does_not_replace_the_baseline_it_is_held_against(runs: Path, tmp_path: Path) -> None:
    for baseline in (runs / "base", runs / "base" / "report.json"):
        with pytest.raises(InputError, match="its own baseline"):
            gating.check(GateRequest(baseline, BOTH), out=runs / "base")
        gating.check(GateRequest(baseline, BOTH), out=tmp_path / "new")


def test_a_baseline_without_limits_is_held_by_the_default_ones(runs: Path) -> None:
    assert GateRequest(runs / "base").held == LimitSet(gating.DEFAULT_LIMITS)
    assert GateRequest(runs / "base", BOTH).held == BOTH
    assert GateRequest(None).held == LimitSet()
    run = baselines.open_run(runs / "base")
    verdict = gating._verdict(run, {}, GateRequest(runs / "base" / "report.json"), _Quiet())
    assert {"top-1 drop", "speed"} <= {r.check for r in verdict.reasons}


def test_preprocessing_in_a_report_that_cannot_be_read_is_one_message(runs: Path) -> None:
    report = replace(baselines.open_run(runs / "base").report, samples={"judge": {"preprocess": {"mean": 5}}})
    with pytest.raises(InputError, match="preprocessing in the report"):
        remeasuring._Inputs(Again("smoke", data="x.npz"), report)
    remeasuring._Inputs(Again("smoke"), report)  # random inputs need none


def test_a_run_named_by_its_report_is_replaced_whole(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "base", tmp_path / "base")
    written, _ = gating.update(runs / "new", tmp_path / "base" / "report.json")
    assert written == tmp_path / "base"
    for name in ("report.json", "measurements.json"):
        assert (written / name).read_bytes() == (runs / "new" / name).read_bytes()
    engines = [sorted(p.relative_to(f).as_posix() for p in (f / "engines").rglob("*")) for f in (written, runs / "new")]
    assert engines[0] == engines[1]
    (tmp_path / "alone").mkdir()
    written, _ = gating.update(runs / "new", tmp_path / "alone" / "report.json")
    assert written == tmp_path / "alone" / "report.json"


def test_a_baseline_file_copied_as_a_baseline_keeps_its_outcomes(runs: Path, tmp_path: Path) -> None:
    first, _ = gating.update(runs / "base", tmp_path / "first.json")
    second, _ = gating.update(first, tmp_path / "second.json")
    mine, copied = (baselines.open_baseline(file, {}).outcomes for file in (first, second))
    assert mine and mine.keys() == copied.keys()
    assert all(np.array_equal(mine[key].correct, copied[key].correct) for key in mine)
