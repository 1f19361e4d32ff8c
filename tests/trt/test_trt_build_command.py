"""build-trt as a user meets it: what to expect before the build, INT8 that would run in Half refused, limits kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import child_functions
import pytest
import tiny_models
import trt_graphs
from typer.testing import CliRunner

from deploykit import backends, graph, trt_cache
from deploykit.errors import EXIT_FAILED, EXIT_PASSED, BackendFailed, ChecksFailed, ChildDied, InputError
from deploykit.pipeline import given, limited, trt
from deploykit.pipeline.limited import Limits
from deploykit.pipeline.request import DataRequest, Silent
from deploykit.trt import plan

RTX = pytest.mark.skipif(backends.get("tensorrt-rtx").missing() is not None, reason="tensorrt-rtx is not installed")


def _build(
    folder: Path, targets: tuple[str, ...] | None, precisions: tuple[str, ...], *, allow: bool = False
) -> tuple[trt.TrtResult, list[str]]:
    path = tiny_models.conv_net(folder / "m.onnx")
    told: list[str] = []
    request = trt.TrtRequest(path, precisions, targets, (1, 4), "rtx", allow, {})
    return trt.build(request, DataRequest("random:16"), folder / "out", Silent(), told.append), told


@RTX
def test_sm89_runs_int8_and_says_before_what_to_expect(tmp_path: Path) -> None:
    made, told = _build(tmp_path, ("sm89",), ("int8",))
    assert made.exit_code == EXIT_PASSED
    assert "INT8 engine for sm89" in told[0]
    assert plan.RTX_INT8_POINTWISE in told
    (engine,) = made.engines
    assert engine.facts["fell_back"] is None
    assert engine.facts["layers"]["convolution"] == {"Int8": 2}
    assert engine.facts["requested"]["Conv"] == {"Int8": 2}
    assert engine.facts["size_bytes"] == engine.path.stat().st_size


@RTX
def test_int8_on_sm75_fails_unless_fallback_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(BackendFailed, match=r"in Half on sm75.*--allow-fallback"):
        _build(tmp_path, ("sm75",), ("int8",))
    assert not (tmp_path / "out").exists()
    made, told = _build(tmp_path, ("sm75",), ("int8",), allow=True)
    assert made.exit_code == EXIT_PASSED
    assert plan.RTX_TURING_INT8 in told
    (engine,) = made.engines
    assert "Half" in engine.facts["fell_back"]
    assert any("asked: Conv 2 Int8" in note for note in engine.facts["notes"])


@RTX
def test_a_graph_quantized_by_others_is_linted_before_the_parser(tmp_path: Path) -> None:
    request = trt.TrtRequest(
        trt_graphs.qdq_conv(tmp_path / "q.onnx", zero_point=3), ("int8",), ("sm89",), (1, 2), "rtx", False, {}
    )
    with pytest.raises(ChecksFailed, match=r"DK\d+.*zero.point"):
        trt.build(request, DataRequest(), tmp_path / "out", Silent())
    told: list[str] = []
    request = replace(request, model=trt_graphs.qdq_conv(tmp_path / "axis.onnx", axis=1))
    made = trt.build(request, DataRequest(), tmp_path / "out", Silent(), told.append)
    assert made.exit_code == EXIT_FAILED  # the convolution runs in float
    assert any(line.startswith("DK") and "axis" in line for line in told), told


@RTX
def test_a_foreign_cache_serves_and_the_manifest_says_what_did_not_match(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    cache = tmp_path / "foreign.cache"
    names = {node.input[0] for node in graph.load(path).graph.node if node.op_type in ("Conv", "Gemm")}
    cache.write_text(trt_cache.text_of(dict.fromkeys([*names, "stranger"], 3.0), version="8.6.1"))
    request = trt.TrtRequest(path, ("int8",), ("sm89",), (1,), "rtx", False, {})
    made = trt.build(request, DataRequest(calib_table=cache), tmp_path / "out", Silent())
    notes = made.engines[0].facts["notes"]
    assert any("calibrated elsewhere, by TensorRT's cache foreign.cache (TRT-8601-" in note for note in notes)
    assert any(note.endswith("not in the graph: stranger") for note in notes)
    others = [*names, *(f"stranger{i}" for i in range(9))]
    cache.write_text(trt_cache.text_of(dict.fromkeys(others, 3.0), version="8.6.1"))
    found = given.imported(cache, path, "m" * 64)
    assert any(note.startswith("9 of 12 tensors") and "made for another model?" in note for note in found.notes)


@RTX
def test_one_refused_target_fails_the_command_and_builds_the_rest(tmp_path: Path) -> None:
    made, _ = _build(tmp_path, ("sm75", "sm89"), ("int8", "fp16"))
    assert made.exit_code == EXIT_FAILED
    assert {(e.precision, e.device) for e in made.engines} == {("fp16", "sm75"), ("int8", "sm89"), ("fp16", "sm89")}
    (warning,) = made.warnings
    assert warning.startswith("not built: int8 for sm75")


@RTX
def test_a_default_target_that_cannot_have_the_precision_is_told_and_fails_nothing(tmp_path: Path) -> None:
    made, told = _build(tmp_path, None, ("int8",))
    assert made.exit_code == EXIT_PASSED
    assert {(e.precision, e.device) for e in made.engines} == {("int8", "sm89")}
    (warning,) = made.warnings
    assert warning.startswith("not built: int8 for sm75")
    assert warning in told


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(child_functions.__file__).parent))


@pytest.mark.parametrize("function", [child_functions.hold, child_functions.hold_in_a_grandchild])
def test_a_child_above_its_memory_is_one_clear_error(functions: None, function: object) -> None:
    with pytest.raises(BackendFailed, match=r"held 0\.\d GiB of memory, more than the limit of 0\.2 GiB") as caught:
        limited.run("build", function, 400 << 20, limits=Limits(30.0, 200 << 20))  # type: ignore[arg-type]
    assert "--memory-limit" in str(caught.value)


def test_a_child_that_takes_too_long_is_one_clear_error(functions: None) -> None:
    with pytest.raises(BackendFailed, match="no answer within 1 s") as caught:
        limited.run("build", child_functions.sleep, 20.0, limits=Limits(1.0))
    assert "--time-limit" in str(caught.value)
    limited.run("build", child_functions.sleep, 0.0, limits=Limits(60.0, 1 << 30))


def test_a_crash_within_its_limits_stays_a_crash() -> None:
    import os

    with pytest.raises(ChildDied, match="code 7"):
        limited.run("build", os._exit, 7, limits=Limits(60.0, 1 << 30))


@pytest.mark.parametrize("limits", [(0.0, None), (-1.0, None), (float("nan"), None), (float("inf"), None), (1.0, 0)])
def test_a_limit_must_be_positive(limits: tuple[float, int | None]) -> None:
    with pytest.raises(InputError, match="positive"):
        Limits(*limits)


@RTX
def test_the_command_keeps_its_limits(tmp_path: Path) -> None:
    from deploykit.cli.main import app

    path = tiny_models.conv_net(tmp_path / "m.onnx")
    words = ["build-trt", str(path), "--fp16", "--target", "sm89", "-o", str(tmp_path / "out"), "--memory-limit", "0.01"]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, BackendFailed)
    assert "more than the limit" in str(done.exception)
    assert "expected: FP16 engine for sm89" in done.stdout
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True
