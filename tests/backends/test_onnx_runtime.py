"""ONNX Runtime: what really runs is said, the pool does not burn CPU when idle, bad files are one error."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import engine_cases as cases
import numpy as np
import onnx
import pytest
import tiny_models
from onnx import TensorProto, helper

from deploykit import machine
from deploykit.artifact import Artifact
from deploykit.backends.onnx_runtime import BACKEND, kernels
from deploykit.errors import BackendFailed, InputError, ModelError
from deploykit.session import BuildRequest, OpenRequest


def _int8(folder: Path, kind: str) -> Artifact:
    return cases.graph_of(kind, cases.model("conv_net", folder), folder)


def test_an_int8_row_says_how_many_layers_are_integer_kernels(tmp_path: Path) -> None:
    engine = cases.engine(BACKEND, cases.model("conv_net", tmp_path), "int8", tmp_path)
    session = BACKEND.open(engine, OpenRequest("int8", 1, 1))
    assert session.precision == "int8"
    assert session.notes[0] == "3 of 3 convolutions and matrix products run in integer kernels"
    counts = engine.facts["kernels"]
    assert counts["QLinearConv"] == 2
    assert counts["QGemm"] == 1


def test_float_convolutions_of_an_int8_graph_are_said(tmp_path: Path) -> None:
    graph = _int8(tmp_path, "int8-tensorrt")
    counts = kernels(graph.path)
    assert counts.get("QLinearConv", 0) < 2  # int8 activations feeding float additions: not the CPU's layout
    session = BACKEND.open(graph, OpenRequest("int8", 1, 1))
    assert any("in float" in note for note in session.notes)


def test_a_float_graph_called_int8_is_not_believed(tmp_path: Path) -> None:
    session = BACKEND.open(cases.model("conv_net", tmp_path), OpenRequest("int8", 1, 1))
    assert session.precision == "fp32"
    assert "no convolution or matrix product became an integer kernel" in session.notes[0]


def test_fp16_on_a_cpu_is_named_fp32(tmp_path: Path) -> None:
    if machine.features() & {"avx512_fp16", "asimdhp"}:
        pytest.skip("this CPU computes in FP16")
    graph = cases.graph_of("fp16", cases.model("conv_net", tmp_path), tmp_path)
    session = BACKEND.open(graph, OpenRequest("fp16", 1, 1))
    assert session.precision == "fp32"
    assert "casts" in session.notes[0]


def test_without_vnni_saturation_is_mentioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _int8(tmp_path, "int8-cpu")
    monkeypatch.setattr(machine, "features", lambda: frozenset({"avx2"}))
    assert any("VNNI" in note for note in BACKEND.open(graph, OpenRequest("int8", 1, 1)).notes)
    monkeypatch.setattr(machine, "features", lambda: frozenset({"avx512_vnni"}))
    assert not any("VNNI" in note for note in BACKEND.open(graph, OpenRequest("int8", 1, 1)).notes)


def test_literal_qdq_differs_from_the_kernels_by_rounding_only(tmp_path: Path) -> None:
    graph = _int8(tmp_path, "int8-cpu")
    inputs = cases.feeds(graph.signature, 2)
    literal = BACKEND.open(graph, OpenRequest("int8", 2, 1, options={"literal_qdq": True}))
    assert literal.precision == "fp32"
    fast = BACKEND.open(graph, OpenRequest("int8", 2, 1))
    assert cases.distance(fast.infer(inputs)["logits"], literal.infer(inputs)["logits"]) < 0.03


def test_an_open_session_is_idle_when_idle(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx", size=32)
    engine = cases.artifact(path, "fp32")
    session = BACKEND.open(engine, OpenRequest("fp32", 4, 2))
    run = session.bind(cases.feeds(engine.signature, 4))
    spent = []
    for _ in range(5):
        run()
        before = time.process_time()
        time.sleep(0.05)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.005  # ONNX Runtime's own default spins for about 34 ms here


def test_bf16_and_other_targets_are_refused_with_a_remedy() -> None:
    refused = BACKEND.unsupported("bf16", "cpu")
    assert refused is not None
    assert "openvino" in refused.remedy
    assert BACKEND.unsupported("fp32", "sm75") is not None
    assert BACKEND.unsupported("int8", "cpu") is None


def test_external_data_is_taken_in(tmp_path: Path) -> None:
    fp32 = cases.model("conv_net", tmp_path)
    split = tmp_path / "split.onnx"
    onnx.save_model(onnx.load(fp32.path), str(split), save_as_external_data=True, location="w.bin", size_threshold=0)
    out = tmp_path / "out"
    out.mkdir()
    engine = BACKEND.build(cases.artifact(split, "fp32"), BuildRequest("fp32"), out).save()
    (tmp_path / "w.bin").unlink()
    inputs = cases.feeds(fp32.signature, 1)
    found = BACKEND.open(engine, OpenRequest("fp32", 1, 1)).infer(inputs)
    assert cases.distance(found["logits"], cases.expected(BACKEND, "fp32", fp32, tmp_path, inputs)["logits"]) < 1e-5


def test_an_operator_onnx_runtime_lacks_is_the_backends_failure(tmp_path: Path) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], domain="nowhere")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 2]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("nowhere", 1)],
        ir_version=10,
    )
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path))
    with pytest.raises((BackendFailed, ModelError)) as caught:
        BACKEND.build(cases.artifact(path, "fp32"), BuildRequest("fp32"), tmp_path)
    assert caught.value.remedy


def test_names_that_differ_from_the_manifest_are_found(tmp_path: Path) -> None:
    engine = cases.model("conv_net", tmp_path)
    other = cases.model("two_inputs", tmp_path)
    with pytest.raises(ModelError, match="its manifest says"):
        BACKEND.open(Artifact(other.path, "onnx", "fp32", engine.signature, "test"), OpenRequest("fp32", 1, 1))


def test_a_fixed_batch_runs_at_that_batch_only(tmp_path: Path) -> None:
    engine = cases.artifact(tiny_models.conv_net(tmp_path / "m.onnx", batch=4), "fp32")
    with pytest.raises(InputError, match="batch 4 baked in"):
        BACKEND.open(engine, OpenRequest("fp32", 2, 1))
    session = BACKEND.open(engine, OpenRequest("fp32", 4, 1))
    assert session.infer(cases.feeds(engine.signature, 4))["logits"].shape == (4, 4)


def test_outputs_of_unknown_size_can_be_timed(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])]
    out = [helper.make_tensor_value_info("where", TensorProto.INT64, [2, "found"])]
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["where"])], "g", values, out)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    session = BACKEND.open(cases.artifact(path, "fp32"), OpenRequest("fp32", 2, 1))
    for x in (np.eye(2, 3, dtype=np.float32), np.ones((2, 3), np.float32)):
        session.bind({"x": x})()
        assert session.infer({"x": x})["where"].shape == (2, np.count_nonzero(x))


def test_bound_inputs_and_outputs_outlive_the_arrays_they_were_made_from(tmp_path: Path) -> None:
    engine = cases.artifact(tiny_models.conv_net(tmp_path / "m.onnx", size=64), "fp32")
    session = BACKEND.open(engine, OpenRequest("fp32", 3, 1))
    runs = [session.bind(cases.feeds(engine.signature, 3, seed)) for seed in range(6)]
    gc.collect()
    churn = [np.full((3, 3, 64, 64), np.nan, np.float32) for _ in range(12)]  # takes the place of anything freed too early
    for seed, run in enumerate(runs):
        found = run()[2][0]  # type: ignore[index]
        np.testing.assert_allclose(found, session.infer(cases.feeds(engine.signature, 3, seed))["logits"], rtol=1e-5)
    assert churn
