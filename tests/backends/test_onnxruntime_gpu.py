"""ONNX Runtime's GPU providers: the fallback that it is silent about is an error, and without a GPU each row says why."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import engine_cases as cases
import numpy as np
import pytest

from deploykit import backends, graph
from deploykit.artifact import Artifact
from deploykit.backends import onnxruntime_gpu as ort_gpu
from deploykit.backends.onnxruntime_gpu import OnnxRuntimeGpu
from deploykit.errors import BackendFailed, InputError, MissingBackend, ModelError
from deploykit.pipeline.plan import plan
from deploykit.pipeline.request import RowsRequest
from deploykit.session import BuildRequest, OpenRequest
from deploykit.trt import gpu

pytest.importorskip("onnxruntime")
NAMES = ("onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-rtx")
NO_GPU = pytest.mark.skipif(bool(gpu.found()), reason="there is a GPU here: nothing to fall back from")


def _backend(name: str) -> OnnxRuntimeGpu:
    found = backends.get(name)
    assert isinstance(found, OnnxRuntimeGpu)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    return cases.model("conv_net", tmp_path)


@NO_GPU
@pytest.mark.parametrize("name", NAMES[:2])
def test_a_session_that_fell_back_to_the_cpu_is_an_error(name: str, model: Artifact) -> None:
    """The wheel that is here really falls back: plain ONNX Runtime opens the model on the CPU."""
    import onnxruntime as ort

    provider = _backend(name).provider
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a wheel without the provider warns; one with it says nothing
        assert ort.InferenceSession(str(model.path), providers=[provider.name]).get_providers() == [ort_gpu.CPU]
    with pytest.raises(BackendFailed, match=r"silently fell back to CPUExecutionProvider|cannot open"):
        ort_gpu.create(model.path, provider, "fp16", 1, {"batch": 2})


def test_only_the_provider_asked_for_will_do() -> None:
    provider = _backend("onnxruntime-tensorrt").provider
    ort_gpu.require_in_use([provider.name, ort_gpu.CUDA, ort_gpu.CPU], provider)
    for in_use in ([ort_gpu.CUDA, ort_gpu.CPU], [ort_gpu.CPU], []):
        with pytest.raises(BackendFailed, match="fell back"):
            ort_gpu.require_in_use(in_use, provider)


def test_nodes_are_counted_where_they_run(model: Artifact) -> None:
    """On the CPU's own provider, taken for the one asked for; then the same nodes are another provider's."""
    provider = replace(_backend("onnxruntime-cuda").provider, name=ort_gpu.CPU)
    session = ort_gpu.create(model.path, provider, "fp32", 1, {})
    (note,) = ort_gpu.placed(session, provider)
    assert note.startswith("all ")
    assert note.endswith("nodes run on CPUExecutionProvider")
    with pytest.raises(BackendFailed, match="none of the convolutions"):
        ort_gpu.placed(session, _backend("onnxruntime-cuda").provider)


def test_some_nodes_elsewhere_are_told() -> None:
    class Node:
        def __init__(self, op_type: str) -> None:
            self.op_type = op_type

    class Part:
        def __init__(self, ep_name: str, *ops: str) -> None:
            self.ep_name, self._ops = ep_name, ops

        def get_nodes(self) -> list[Node]:
            return [Node(op) for op in self._ops]

    class Session:
        def get_provider_graph_assignment_info(self) -> list[Part]:
            return [Part(ort_gpu.CUDA, "Conv", "Relu"), Part(ort_gpu.CPU, "Gemm", "Shape")]

    (note,) = ort_gpu.placed(Session(), _backend("onnxruntime-cuda").provider)
    assert (
        note == "2 of 4 nodes run on CUDAExecutionProvider, 2 on CPUExecutionProvider (1 of them convolutions or matrix products)"
    )


def test_a_session_gives_the_models_outputs(model: Artifact, tmp_path: Path) -> None:
    provider = replace(_backend("onnxruntime-cuda").provider, name=ort_gpu.CPU)
    opened = ort_gpu.create(model.path, provider, "fp32", 1, {"batch": 2})
    session = ort_gpu.GpuSession(opened, model.signature, OpenRequest("fp32", 2, 1), "a GPU", ())
    feeds = cases.feeds(model.signature, 2)
    wanted = cases.expected(backends.get("onnxruntime"), "fp32", model, tmp_path, feeds)
    np.testing.assert_allclose(session.infer(feeds)["logits"], wanted["logits"], rtol=1e-5)
    (bound,) = session.bind(feeds)()  # type: ignore[misc]
    np.testing.assert_allclose(bound, wanted["logits"], rtol=1e-5)
    with pytest.raises(InputError):
        session.infer(cases.feeds(model.signature, 3))
    session.close()
    with pytest.raises(BackendFailed, match="closed"):
        session.infer(feeds)


def test_a_file_that_is_no_model_is_the_models_error(tmp_path: Path) -> None:
    provider = replace(_backend("onnxruntime-cuda").provider, name=ort_gpu.CPU)
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError):
        ort_gpu.create(tmp_path / "m.onnx", provider, "fp32", 1, {})


@NO_GPU
@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu_a_row_is_there_only_when_asked_for(name: str, model: Artifact, tmp_path: Path) -> None:
    signature = graph.signature(graph.load(model.path))
    assert name not in {row.backend for row in plan("m", "onnx", signature, RowsRequest())}
    rows = [r for r in plan("m", "onnx", signature, RowsRequest(backends=(name,), batches=(1,))) if r.backend == name]
    assert len(rows) == 2
    for row in rows:
        assert row.skip_code == 3
        assert "pip install 'deploykit[gpu" in row.skip or "GPU" in row.skip
    backend = _backend(name)
    with pytest.raises(MissingBackend):
        backend.build(model, BuildRequest("fp16", backend.targets()[0]), tmp_path)
    with pytest.raises(MissingBackend):
        backend.open(model, OpenRequest("fp16", 1, 1))


def test_what_a_provider_cannot_do_is_said() -> None:
    cuda, rtx = _backend("onnxruntime-cuda"), _backend("onnxruntime-rtx")
    said = cuda.unsupported("int8", cuda.targets()[0])
    assert said is not None and "float" in said.why
    assert rtx.unsupported("int8-dynamic", rtx.targets()[0]) is not None
    if not gpu.found():
        old = rtx.unsupported("fp16", "sm75")
        assert old is not None and "sm80" in old.why
        assert rtx.unsupported("fp16", "sm89") is None


def test_caches_go_to_the_users_folder_or_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit import cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder.made("here") == tmp_path / "cache" / "deploykit" / "here"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder.made("here") is None


def test_what_a_provider_keeps_is_kept_apart_by_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Artifact) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked: list[dict[str, str]] = []

    def options(_: str) -> dict[str, str]:
        asked.append({"trt_engine_cache_enable": "1"})
        return asked[-1]

    provider = replace(_backend("onnxruntime-tensorrt").provider, options=options)
    (tmp_path / "weights").write_bytes(b"one")
    engine = replace(model, sha256="", companions={})
    outside = replace(engine, companions={"weights": ""}, path=tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(model.path.read_bytes())
    marks = [ort_gpu.mark_of(engine), ort_gpu.mark_of(outside)]
    (tmp_path / "weights").write_bytes(b"two")
    marks.append(ort_gpu.mark_of(outside))
    assert len(set(marks)) == 3
    assert ort_gpu.mark_of(replace(engine, sha256="ab")) == "ab"
    for mark in (*marks, ""):
        with pytest.raises(BackendFailed):  # no such provider in the wheel that is here
            ort_gpu.create(model.path, replace(provider, name="NoSuchProvider"), "fp16", 1, {"batch": 2}, mark)
    places = [own.get("trt_engine_cache_path") for own in asked]
    assert [Path(p).name for p in places if p] == marks
    assert (places[-1], asked[-1]["trt_engine_cache_enable"]) == (None, "0")
