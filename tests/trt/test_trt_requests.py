"""What build-trt makes of a request before and between the builds, the builds themselves left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import trt_graphs

from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.errors import EXIT_BACKEND, EXIT_FAILED, EXIT_PASSED, BackendFailed, ChecksFailed, InputError
from deploykit.pipeline import building, trt
from deploykit.pipeline.request import DataRequest, Silent
from deploykit.session import BuildRequest
from deploykit.signature import Signature
from deploykit.trt import gpu

FULL = type(backends.get("tensorrt"))
T4 = gpu.Gpu("Tesla T4", 7, 5)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[BuildRequest]:
    """Every build that was asked for; those for sm89 fail."""
    pytest.importorskip("tensorrt_rtx")
    seen: list[BuildRequest] = []

    def build_engine(graph: Artifact, *args: Any) -> Artifact:
        wanted, extras = args[2], args[6]
        seen.append(wanted)
        if wanted.target == "sm89":
            raise BackendFailed("the builder says no", "ask another")
        facts = {"notes": list(extras.notes), "fell_back": None}
        return replace(graph, precision=wanted.precision, device=wanted.target, facts=facts)

    monkeypatch.setattr(building, "build_engine", build_engine)
    return seen


def _request(path: Path, targets: tuple[str, ...] | None, **how: Any) -> trt.TrtRequest:
    values = {"precisions": ("fp32",), "batches": (1, 8), "backend": "rtx", "allow_fallback": False, "shapes": {}, **how}
    return trt.TrtRequest(path, targets=targets, **values)


def _build(folder: Path, request: Callable[[Path], trt.TrtRequest], batch: int | str = "batch") -> trt.TrtResult:
    path = tiny_models.conv_net(folder / "m.onnx", batch=batch)
    return trt.build(request(path), DataRequest(), folder / "out", Silent())


def test_one_target_that_fails_leaves_the_others(tmp_path: Path, asked: list[BuildRequest]) -> None:
    made = _build(tmp_path, lambda path: _request(path, ("sm80", "sm89", "sm120")))
    assert [engine.device for engine in made.engines] == ["sm80", "sm120"]
    assert made.exit_code == EXIT_BACKEND
    assert made.warnings == ("not built: fp32 for sm89: the builder says no; ask another",)
    assert len(asked) == 3


def test_where_nothing_was_built_it_is_an_error(tmp_path: Path, asked: list[BuildRequest]) -> None:
    with pytest.raises(BackendFailed, match=r"^the builder says no") as caught:
        _build(tmp_path, lambda path: _request(path, ("sm89",)))
    assert caught.value.remedy == "ask another"
    assert len(asked) == 1


def test_a_fixed_batch_is_a_note_and_what_is_built(tmp_path: Path, asked: list[BuildRequest]) -> None:
    made = _build(tmp_path, lambda path: _request(path, ("sm80",)), batch=4)
    assert made.exit_code == EXIT_PASSED
    assert asked[0].batches == (4,)
    assert made.engines[0].facts["notes"] == ["the graph has batch 4 baked in: built for that, not for 1, 8"]
    free = _build(tmp_path, lambda path: _request(path, ("sm80",)))
    assert asked[1].batches == (1, 8)
    assert free.engines[0].facts["notes"] == []


def test_profiles_and_scratch_memory_reach_the_backend(tmp_path: Path, asked: list[BuildRequest]) -> None:
    _build(tmp_path, lambda path: _request(path, ("sm80",), profile_each_batch=True, workspace_bytes=1 << 30))
    assert asked[0].options == {"allow_fallback": False, "profile_each_batch": True, "workspace_bytes": 1 << 30}


def test_what_a_backend_would_ignore_is_refused(tmp_path: Path, asked: list[BuildRequest]) -> None:
    with pytest.raises(InputError, match="keeps no timing cache"):
        _build(tmp_path, lambda path: _request(path, ("sm80",), timing_cache=tmp_path / "t.cache"))
    with pytest.raises(InputError, match="none was asked for"):
        _build(tmp_path, lambda path: _request(path, ("sm80",), int8_mode="implicit"))
    assert asked == []


def test_full_tensorrt_takes_a_timing_cache_and_promises_no_fallback(
    tmp_path: Path, asked: list[BuildRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FULL, "missing", lambda _: None)
    monkeypatch.setattr(gpu, "found", lambda: (T4,))
    _build(tmp_path, lambda path: _request(path, None, backend="tensorrt", timing_cache=tmp_path / "t.cache"))
    assert asked[0].options["timing_cache"] == str(tmp_path / "t.cache")
    with pytest.raises(InputError, match="is a folder"):
        _build(tmp_path, lambda path: _request(path, None, backend="tensorrt", timing_cache=tmp_path))
    with pytest.raises(BackendFailed, match="not for sm86") as caught:
        _build(tmp_path, lambda path: _request(path, ("sm86",), backend="tensorrt", precisions=("int8",)))
    assert "--allow-fallback" not in str(caught.value)


def test_what_stays_in_float_is_told_with_the_reason(tmp_path: Path) -> None:
    made = Artifact(tmp_path / "m.onnx", "onnx", "int8", Signature((), ()), "precision")
    assert trt._left_out(made, "int8-tensorrt") == ()
    rows = [{"node": "c1", "operator": "Conv", "reason": "no range"}, {"node": "c2", "operator": "Conv", "reason": "no range"}]
    (line,) = trt._left_out(replace(made, facts={"left_in_float": rows}), "int8-tensorrt")
    assert line == "2 nodes of the INT8 graph are not quantized, for one Conv 'c1': no range"
    (line,) = trt._left_out(replace(made, facts={"left_in_float": rows}), "fp16")
    assert "stay in float32" in line


def test_auto_takes_full_tensorrt_where_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building needs no cuda-python; only running does."""
    monkeypatch.setattr(gpu, "found", lambda: (T4,))
    monkeypatch.setattr(FULL, "missing", lambda _: None)
    monkeypatch.setattr(FULL, "cannot_run", lambda _: "no cuda-python")
    assert trt.backend_for("auto") == "tensorrt"
    monkeypatch.setattr(FULL, "missing", lambda _: "not here")
    assert trt.backend_for("auto") == "tensorrt-rtx"


def test_an_engine_that_fell_back_fails_the_command(
    tmp_path: Path, asked: list[BuildRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fell_back(graph: Artifact, *_: Any) -> Artifact:
        return replace(graph, facts={"fell_back": "1 of 1 Conv that asked for Int8 run in Half: c"})

    monkeypatch.setattr(building, "build_engine", fell_back)
    made = _build(tmp_path, lambda path: _request(path, ("sm80",)))
    assert made.exit_code == EXIT_FAILED
    assert "--allow-fallback accepts it" in made.warnings[0]
    assert _build(tmp_path, lambda path: _request(path, ("sm80",), allow_fallback=True)).exit_code == EXIT_PASSED
    assert asked == []


def test_build_takes_a_fixed_batch_and_lints_too(tmp_path: Path, asked: list[BuildRequest]) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx", batch=4)
    made = building.build_file(path, "onnxruntime", BuildRequest("fp32"), tmp_path / "out", DataRequest(), Silent())
    assert asked[-1].batches == (4,)
    assert made.facts["notes"] == ["the graph has batch 4 baked in: built for that, not for 1, 8"]
    wrong = trt_graphs.qdq_conv(tmp_path / "q.onnx", axis=1)
    wanted = BuildRequest("int8", "sm80", (1,))
    made = building.build_file(wrong, "tensorrt-rtx", wanted, tmp_path / "out", DataRequest(), Silent())
    assert made.facts["notes"][0].startswith("DK110")
    refused = trt_graphs.qdq_conv(tmp_path / "z.onnx", zero_point=3)
    with pytest.raises(ChecksFailed, match="DK102"):
        building.build_file(refused, "tensorrt-rtx", wanted, tmp_path / "out", DataRequest(), Silent())
