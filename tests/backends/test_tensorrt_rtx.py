"""Real TensorRT-RTX builds on a machine without a GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_models import conv_net
from trt_graphs import artifact, build_in_child, qdq_conv, to_half

from deploykit import artifact as artifacts
from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.errors import BackendFailed, DeploykitError, InputError, MissingBackend, ModelError, UnknownName
from deploykit.session import BuildRequest, OpenRequest
from deploykit.trt import gpu, plan_header

BACKEND = backends.get("tensorrt-rtx")
pytestmark = pytest.mark.skipif(BACKEND.missing() is not None, reason=str(BACKEND.missing()))
no_gpu = pytest.mark.skipif(bool(gpu.found()), reason="this machine has a GPU")
QUICK = {"verify_rebuild": False}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    return to_half(conv_net(folder / "f.onnx"), folder / "h.onnx")


@pytest.fixture(scope="module")
def engine(half: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("engine")
    return build_in_child("tensorrt-rtx", artifact(half, "fp16"), BuildRequest("fp16", "sm75", (1, 4)), folder).save()


def _build(path: Path, precision: str, target: str, folder: Path, **options: bool) -> Artifact:
    return BACKEND.build(
        artifact(path, precision), BuildRequest(precision, target, (1, 2, 4), options={**QUICK, **options}), folder
    )


def test_an_fp16_engine_for_a_t4_and_its_manifest(engine: Artifact) -> None:
    facts = artifacts.load(engine.path).facts
    assert engine.device == "sm75"
    assert plan_header.read(engine.path).targets == ("sm75",)
    assert facts["validated_on_gpu"] is False
    assert facts["layers"]["convolution"] == {"Half": 2}
    assert facts["requested"]["Conv"] == {"Half": 2}
    assert facts["profiles"] == [{"x": {"min": [1, 3, 8, 8], "opt": [4, 3, 8, 8], "max": [4, 3, 8, 8]}}]
    assert facts["warnings"] == []
    assert any(note.startswith("asked: Conv 2 Half") and "convolution 2 Half" in note for note in facts["notes"])
    assert facts["rebuild"].split(":")[0].split(" ")[0] in ("identical", "differs")


def test_a_static_graph_rebuilds_to_the_same_bytes(tmp_path: Path) -> None:
    path = to_half(conv_net(tmp_path / "f.onnx", batch=2), tmp_path / "h.onnx")
    made = build_in_child("tensorrt-rtx", artifact(path, "fp16"), BuildRequest("fp16", "sm89", (2,)), tmp_path)
    assert made.facts["rebuild"] == "identical"
    assert made.facts["profiles"] == []


def test_int8_runs_in_int8_on_sm89(tmp_path: Path) -> None:
    made = _build(qdq_conv(tmp_path / "q.onnx"), "int8", "sm89", tmp_path)
    assert made.facts["layers"]["convolution"] == {"Int8": 1}
    assert made.facts["fallback"] == []
    assert made.facts["fell_back"] is None


def test_int8_on_a_t4_is_told_to_run_in_half(tmp_path: Path) -> None:
    path = qdq_conv(tmp_path / "q.onnx")
    made = _build(path, "int8", "sm75", tmp_path)
    assert made.facts["layers"]["convolution"] == {"Half": 1}
    assert made.facts["fallback"] == [{"node": "conv0", "op": "Conv", "actual": "Half"}]
    assert any("1 of 1 Conv that asked for Int8 run in Half" in line for line in made.facts["warnings"])
    assert made.facts["fell_back"] == "1 of 1 Conv that asked for Int8 run in Half: conv0"


@pytest.mark.parametrize("wrong", [{"axis": 1}, {"weight_dq": False}])
def test_a_convolution_that_silently_stays_float_is_told(tmp_path: Path, wrong: dict[str, int]) -> None:
    made = _build(qdq_conv(tmp_path / "q.onnx", **wrong), "int8", "sm89", tmp_path)  # type: ignore[arg-type]
    assert [row["node"] for row in made.facts["fallback"]] == ["conv0"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"zero_point": 3}, r"node 'q0' \(QuantizeLinear\).*zero point"),
        ({"zero_point": 128, "zero_dtype": np.uint8}, r"node 'q0' \(QuantizeLinear\)"),
        ({"zero_dtype": np.uint8}, r"node 'q0' \(QuantizeLinear\).*clip half"),
        ({"scale": 0.0}, r"node 'q0'.*positive"),
        ({"computed_scale": True}, r"node 'q0'.*computed"),
        ({"activation": "Det"}, r"node 'act' \(Det\)"),
    ],
)
def test_a_refusal_names_the_node(tmp_path: Path, wrong: dict[str, object], said: str) -> None:
    with pytest.raises(BackendFailed, match=said) as caught:
        _build(qdq_conv(tmp_path / "q.onnx", **wrong), "int8", "sm89", tmp_path)  # type: ignore[arg-type]
    assert caught.value.remedy
    assert not (tmp_path / "model.engine").exists()


def test_int8_asked_of_a_float_graph_is_an_error(half: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendFailed, match="no convolution or matrix product of the graph has Q/DQ"):
        _build(half, "int8", "sm89", tmp_path)


def test_fp32_for_a_t4_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendFailed, match="FP32"):
        _build(conv_net(tmp_path / "f.onnx"), "fp32", "sm75", tmp_path)


def test_the_builders_own_refusal_is_told_without_its_source_positions(tmp_path: Path) -> None:
    with pytest.raises(BackendFailed, match="FP32 GEMM is not supported") as caught:
        _build(conv_net(tmp_path / "f.onnx"), "fp16", "sm75", tmp_path)  # float32 inside, whatever it is called
    assert "/_src/" not in str(caught.value)
    assert "cuda" not in caught.value.message.lower()


def test_bytes_that_are_no_model(tmp_path: Path, half: Path) -> None:
    bad = dataclasses.replace(artifact(half, "fp16"), path=tmp_path / "bad.onnx")
    bad.path.write_bytes(b"hello world")
    with pytest.raises(ModelError):
        BACKEND.build(bad, BuildRequest("fp16", "sm75"), tmp_path)


def _relu(path: Path, dtype: int) -> Path:
    made = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"], name="same")],
        "g",
        [helper.make_tensor_value_info("x", dtype, ["batch", 3])],
        [helper.make_tensor_value_info("y", dtype, ["batch", 3])],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def test_input_types_that_tensorrt_would_change_or_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(BackendFailed, match=r"'x' is float64.*would take it as float32"):
        _build(_relu(tmp_path / "d.onnx", TensorProto.DOUBLE), "fp32", "sm89", tmp_path)
    with pytest.raises(BackendFailed, match="the graph's inputs"):
        _build(_relu(tmp_path / "s.onnx", TensorProto.STRING), "fp32", "sm89", tmp_path)
    for dtype in (TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT16):
        assert _build(_relu(tmp_path / "f.onnx", dtype), "fp32", "sm89", tmp_path).facts["warnings"] == []


def test_a_failed_build_that_is_still_held_does_not_silence_the_next(tmp_path: Path) -> None:
    with pytest.raises(BackendFailed) as held:
        _build(qdq_conv(tmp_path / "bad.onnx", zero_point=3), "int8", "sm89", tmp_path)
    made = _build(qdq_conv(tmp_path / "q.onnx"), "int8", "sm89", tmp_path)
    assert made.facts["layers"]["convolution"] == {"Int8": 1}
    assert held.value


def test_a_failed_build_for_a_t4_does_not_spoil_the_next_plan(tmp_path: Path) -> None:
    """Without a new process the second plan would hold Turing's kernels under a header that says sm89."""
    with pytest.raises(BackendFailed, match="FP32 GEMM"):
        _build(conv_net(tmp_path / "f.onnx"), "fp16", "sm75", tmp_path)
    made = _build(qdq_conv(tmp_path / "q.onnx"), "int8", "sm89", tmp_path)
    assert made.facts["layers"]["convolution"] == {"Int8": 1}


def test_scratch_memory_is_limited_only_when_asked(half: Path, tmp_path: Path) -> None:
    request = BuildRequest("fp16", "sm75", (1, 64), options={**QUICK, "workspace_bytes": 16})
    with pytest.raises(BackendFailed, match=r"workspace limit|[Mm]emory") as caught:
        BACKEND.build(artifact(half, "fp16"), request, tmp_path)
    assert "batch" in str(caught.value.remedy)


def test_a_target_that_is_none(half: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="sm76"):
        _build(half, "fp16", "sm76", tmp_path)


def test_what_it_cannot_give_is_said_before_any_build() -> None:
    assert BACKEND.unsupported("fp16", "sm75") is None
    assert BACKEND.unsupported("int8", "sm89") is None
    for precision, target in (("int8", "sm75"), ("fp32", "sm75"), ("bf16", "sm89"), ("fp16", "cpu")):
        assert BACKEND.unsupported(precision, target) is not None
    assert "full TensorRT" in str(BACKEND.unsupported("int8", "sm75"))
    assert [BACKEND.graph(p) for p in ("fp32", "fp16", "int8")] == ["fp32", "fp16", "int8-tensorrt"]
    with pytest.raises(UnknownName):
        BACKEND.graph("int4")


def test_it_builds_for_the_gpu_here_else_for_a_t4_and_an_l4(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, targets in (
        ((), ("sm75", "sm89")),
        ((gpu.Gpu("NVIDIA A10", 8, 6),), ("sm86",)),
        ((gpu.Gpu("NVIDIA H100", 9, 0),), ("sm75", "sm89")),
    ):
        monkeypatch.setattr(gpu, "found", lambda found=found: found)
        assert BACKEND.targets() == targets


@no_gpu
def test_opening_without_a_gpu_says_what_to_do(engine: Artifact) -> None:
    with pytest.raises(MissingBackend, match="no NVIDIA GPU") as caught:
        BACKEND.open(engine, OpenRequest("fp16", 1, 1))
    assert "compute capability 7.5" in str(caught.value)
    assert BACKEND.cannot_run() is not None


@pytest.mark.parametrize("damage", ["onnx", "short", "truncated", "no target", "missing"])
def test_a_foreign_or_damaged_plan_is_named_before_a_gpu_is_asked_for(engine: Artifact, tmp_path: Path, damage: str) -> None:
    data = engine.path.read_bytes()
    broken = {
        "onnx": b"\x08\x09" + data[2:],
        "short": data[:30],
        "truncated": data[:-1],
        "no target": data[:32] + struct.pack("<Q", 0) + data[40:],
    }
    path = tmp_path / "model.engine"
    if damage in broken:
        path.write_bytes(broken[damage])
    with pytest.raises(InputError) as caught:
        BACKEND.open(dataclasses.replace(engine, path=path), OpenRequest("fp16", 1, 1))
    assert isinstance(caught.value, DeploykitError)
    assert caught.value.remedy


def test_an_engine_that_cannot_be_read_is_named(engine: Artifact) -> None:
    within = dataclasses.replace(engine, path=engine.path / "engine")  # a file in the place of a folder
    with pytest.raises(InputError, match="cannot read the engine"):
        BACKEND.open(within, OpenRequest("fp16", 1, 1))


def test_where_a_model_lies_does_not_change_its_plan(tmp_path: Path) -> None:
    digests = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        path = to_half(conv_net(folder / "f.onnx", batch=1), folder / "h.onnx")
        request = BuildRequest("fp16", "sm89", (1,), options=QUICK)
        made = build_in_child("tensorrt-rtx", artifact(path, "fp16"), request, folder)
        digests.append(hashlib.sha256(made.path.read_bytes()).hexdigest())
        assert os.fsencode(str(tmp_path)) not in made.path.read_bytes()
    assert digests[0] == digests[1]


@pytest.mark.gpu
@pytest.mark.skipif(
    not gpu.found(), reason="needs an NVIDIA GPU: numbers, JIT, CUDA graph and event times can only be seen there"
)
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_an_engine_on_a_gpu_agrees_with_onnx_runtime(half: Path, tmp_path: Path, batch: int) -> None:
    import onnxruntime

    target = gpu.found()[0].target
    made = _build(half, "fp16", target, tmp_path)
    session = BACKEND.open(made, OpenRequest("fp16", batch, 1, options={"runtime_cache": str(tmp_path / "kernels")}))
    feeds = {"x": np.random.default_rng(0).normal(size=(batch, 3, 8, 8)).astype(np.float32)}
    (expected,) = onnxruntime.InferenceSession(str(half), providers=["CPUExecutionProvider"]).run(None, feeds)
    np.testing.assert_allclose(session.infer(feeds)["logits"], expected, rtol=1e-2, atol=1e-2)
    session.bind(feeds)()
    assert any(note.startswith("CUDA graph: on") for note in session.notes)
    session.close()
