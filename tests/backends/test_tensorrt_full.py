"""Full TensorRT on a machine without it: what it says. Its builder's calls are held in tests/trt/test_trt_contract.py."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
from tiny_models import conv_net
from trt_graphs import artifact, qdq_conv, to_half

from deploykit import backends
from deploykit.backends import tensorrt_full
from deploykit.errors import BackendFailed, InputError, MissingBackend, UnknownName
from deploykit.session import BuildRequest, OpenRequest
from deploykit.trt import builder, gpu

BACKEND = backends.get("tensorrt")
T4 = gpu.Gpu("Tesla T4", 7, 5)


def test_it_says_what_it_needs(tmp_path: Path) -> None:
    if BACKEND.missing() is None:
        pytest.skip("full TensorRT and a GPU are here")
    with pytest.raises(MissingBackend) as caught:
        BACKEND.build(artifact(conv_net(tmp_path / "m.onnx"), "fp16"), BuildRequest("fp16", "sm75"), tmp_path)
    assert caught.value.remedy
    assert BACKEND.targets()


def test_another_gpu_than_the_one_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "found", lambda: (T4,))
    assert BACKEND.targets() == ("sm75",)
    assert BACKEND.unsupported("int8", "sm75") is None
    assert "--backend rtx --target sm89" in str(BACKEND.unsupported("fp16", "sm89"))
    assert BACKEND.unsupported("bf16", "sm75") is not None
    assert BACKEND.versions()["gpu"] == "Tesla T4 sm75"
    with pytest.raises(UnknownName):
        BACKEND.graph("int4")


@pytest.fixture
def eleven(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX's module in TensorRT's place (it has TensorRT 11's builder API) on a T4 that is not there: real parsing
    and building; only the inspector, which needs the GPU, is left out."""
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(gpu, "found", lambda: (T4,))
    monkeypatch.setattr(builder, "inspect", lambda *_: ())
    monkeypatch.setattr(builder, "_failed", False)  # RTX stands in: its own process rule does not apply


@pytest.mark.usefixtures("eleven")
def test_the_build_writes_an_engine_and_says_where(tmp_path: Path) -> None:
    path = to_half(conv_net(tmp_path / "f.onnx"), tmp_path / "h.onnx")
    made = BACKEND.build(artifact(path, "fp16"), BuildRequest("fp16", "sm75", (1, 4)), tmp_path).save()
    assert made.facts["gpu"] == "Tesla T4"
    assert made.facts["rebuild"].startswith("not checked")
    assert made.facts["profiles"][0]["x"]["max"][0] == 4
    assert made.facts["validated_on_gpu"] is False


@pytest.mark.usefixtures("eleven")
def test_int8_needs_qdq_or_a_calibration_cache_where_calibrators_are_left(tmp_path: Path) -> None:
    float_graph = artifact(conv_net(tmp_path / "f.onnx"), "fp32")
    with pytest.raises(BackendFailed, match="has Q/DQ nodes"):
        BACKEND.build(float_graph, BuildRequest("int8", "sm75"), tmp_path)
    cache = tmp_path / "c.cache"
    cache.write_text("TRT-8601-EntropyCalibration2\nx: 3c010a14\n")
    with pytest.raises(InputError, match="no INT8 calibrators"):
        BACKEND.build(float_graph, BuildRequest("int8", "sm75", options={"calibration": str(cache)}), tmp_path)
    made = BACKEND.build(artifact(qdq_conv(tmp_path / "q.onnx"), "int8"), BuildRequest("int8", "sm75"), tmp_path)
    assert made.facts["requested"] == {"Conv": {"Int8": 1}}


@pytest.mark.usefixtures("eleven")
def test_what_does_not_match_in_a_cache_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_full, "_calibration", lambda *_: (None, ("the cache has scales for strangers",)))
    path = to_half(conv_net(tmp_path / "f.onnx"), tmp_path / "h.onnx")
    made = BACKEND.build(artifact(path, "fp16"), BuildRequest("fp16", "sm75", (1, 4)), tmp_path)
    for kind in ("warnings", "notes"):  # the notes are what the commands print
        assert "the cache has scales for strangers" in made.facts[kind]


@pytest.mark.parametrize("start", [b"vtrt plan of RTX", b""])
def test_a_plan_of_rtx_and_an_empty_file_are_named(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(start)
    made = dataclasses.replace(artifact(conv_net(tmp_path / "m.onnx"), "fp16"), path=path)
    with pytest.raises(InputError, match="no TensorRT plan"):
        BACKEND.open(made, OpenRequest("fp16", 1, 1))


def test_a_plan_of_another_gpu_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "found", lambda: (T4,))
    monkeypatch.setattr(type(BACKEND), "cannot_run", lambda _: None)
    path = tmp_path / "model.engine"
    path.write_bytes(b"ftrt and so on")
    made = dataclasses.replace(artifact(conv_net(tmp_path / "m.onnx"), "fp16"), path=path, facts={"gpu": "NVIDIA A10"})
    with pytest.raises(MissingBackend, match="built on NVIDIA A10; this machine has Tesla T4"):
        BACKEND.open(made, OpenRequest("fp16", 1, 1))


def test_a_folder_of_type_stubs_is_no_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.pyi").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    missing = backends.get("tensorrt").missing()
    assert missing is not None
    assert "no code" in missing.why or "not installed" in missing.why
    (tmp_path / "tensorrt" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    found = backends.get("tensorrt").missing()
    assert found is None or "GPU" in found.why
