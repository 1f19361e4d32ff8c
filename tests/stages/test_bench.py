"""bench: rows in turns in their own processes; a crash or a bad row costs that row only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models

from deploykit import graph
from deploykit.artifact import Artifact
from deploykit.errors import DeploykitError, InputError, UnknownName
from deploykit.measurement import Measurement, speedup
from deploykit.session import OpenRequest
from deploykit.signature import Feeds
from deploykit.stages import bench

pytest.importorskip("onnxruntime")
SHORT = bench.Duration("test", launches=2, rounds=2, seconds=0.2, limit_s=0.4, enough_runs=10**9)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_models.conv_net(tmp_path_factory.mktemp("bench") / "model.onnx")
    Artifact(path, "onnx", "fp32", graph.signature(graph.load(path)), "engine").save()
    return path


def _pools() -> dict[int, list[Feeds]]:
    rng = np.random.default_rng(0)
    return {2: [{"x": rng.normal(size=(2, 3, 8, 8)).astype(np.float32)} for _ in range(3)]}


def _target(engine: Path, name: str, *, reference: bool = False, backend: str = "onnxruntime", batch: int = 2) -> bench.Target:
    return bench.Target(name, backend, engine, OpenRequest("fp32", batch, 1), "group", reference)


def test_rows_are_measured_in_the_same_launches_and_rounds(engine: Path) -> None:
    found = bench.measure([_target(engine, "a", reference=True), _target(engine, "b")], _pools(), SHORT)
    a, b = found["a"], found["b"]
    assert isinstance(a, Measurement)
    assert isinstance(b, Measurement)
    assert len(a.launches) == len(b.launches) == 2
    assert all(len(launch) == 4 for launch in a.launches)  # two rounds, and two more since no row has enough runs
    assert a.n_timed > 20
    assert a.images_per_s > 0
    assert a.peak_rss_bytes > 10 << 20
    assert a.warmup_s >= 0.2
    assert speedup(a, b).low <= speedup(a, b).value <= speedup(a, b).high


def test_a_bad_row_costs_only_that_row(engine: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(engine.read_bytes()[:100])
    Artifact(broken, "onnx", "fp32", graph.signature(graph.load(engine)), "engine").save()
    found = bench.measure([_target(engine, "good", reference=True), _target(broken, "bad")], _pools(), SHORT)
    assert isinstance(found["good"], Measurement)
    assert isinstance(found["bad"], DeploykitError)


def test_a_row_whose_process_dies_in_a_window_costs_only_that_row(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = bench._one_window

    def kill_second(item: object, seconds: float, state: object) -> None:
        if item.target.id == "dies" and len(item.windows) == 1:  # type: ignore[attr-defined]
            item.child.kill()  # type: ignore[attr-defined]
        windows(item, seconds, state)  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "_one_window", kill_second)
    found = bench.measure([_target(engine, "good", reference=True), _target(engine, "dies")], _pools(), SHORT)
    assert isinstance(found["good"], Measurement)
    assert isinstance(found["dies"], DeploykitError)
    assert "SIGKILL" in str(found["dies"])


def test_two_references_in_a_group_are_refused(engine: Path) -> None:
    with pytest.raises(InputError, match="more than one reference"):
        bench.measure([_target(engine, "a", reference=True), _target(engine, "b", reference=True)], _pools(), SHORT)


def test_unknown_duration_names_the_closest() -> None:
    assert bench.duration("quick").launches >= 3
    with pytest.raises(UnknownName, match="did you mean 'quick'"):
        bench.duration("quik")


def test_rows_too_many_for_the_memory_have_speed_ups_against_the_reference_of_their_part(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_available_bytes", lambda: 0)
    rows = [_target(engine, "base", reference=True), _target(engine, "a"), _target(engine, "b")]
    short = bench.Duration("test", launches=2, rounds=2, seconds=0.04, limit_s=0.04, enough_runs=1)
    found = bench.measure(rows, _pools(), short)
    base, a, b = (found[name] for name in ("base", "a", "b"))
    assert isinstance(base, Measurement) and isinstance(a, Measurement) and isinstance(b, Measurement)
    assert (base.turns, a.turns, b.turns) == ((0, 1, 2, 3), (0, 2), (1, 3))
    assert speedup(a, base).value > 0 and speedup(b, base).value > 0
    assert speedup(base, base).value == 1.0
    with pytest.raises(ValueError, match="same launches"):
        speedup(a, b)
    whole = bench.measure(rows, _pools(), short, together=True)
    assert all(isinstance(m, Measurement) and m.turns == (0, 1) for m in whole.values())
