"""OpenVINO: the precision named is the one executed, shapes are static, bad files are one error."""

from __future__ import annotations

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
from deploykit.backends import openvino_cpu
from deploykit.backends.openvino_cpu import BACKEND
from deploykit.errors import InputError, ModelError
from deploykit.session import BuildRequest, OpenRequest
from deploykit.signature import ShapeRange

BF16_HERE = bool(machine.features() & {"avx512_bf16", "amx_bf16"})


def test_fp32_is_fp32_even_where_the_cpu_prefers_bf16(tmp_path: Path) -> None:
    fp32 = cases.model("conv_net", tmp_path)
    session = BACKEND.open(fp32, OpenRequest("fp32", 2, 1))
    assert session.precision == "fp32"
    assert session.notes == ()
    inputs = cases.feeds(fp32.signature, 2)
    wanted = cases.expected(BACKEND, "fp32", fp32, tmp_path, inputs)["logits"]
    assert cases.distance(session.infer(inputs)["logits"], wanted) < 1e-5


@pytest.mark.skipif(not BF16_HERE, reason="this CPU has neither AVX-512 BF16 nor AMX")
def test_bf16_rounds_and_says_so(tmp_path: Path) -> None:
    fp32 = cases.artifact(tiny_models.conv_net(tmp_path / "m.onnx", channels=16, size=32), "fp32")
    session = BACKEND.open(fp32, OpenRequest("bf16", 2, 1))
    assert session.precision == "bf16"
    inputs = cases.feeds(fp32.signature, 2)
    wanted = cases.expected(BACKEND, "bf16", fp32, tmp_path, inputs)["logits"]
    assert 1e-5 < cases.distance(session.infer(inputs)["logits"], wanted) < 0.04


def test_bf16_is_refused_on_a_cpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "features", lambda: frozenset({"avx2", "avx512_vnni"}))
    refused = BACKEND.unsupported("bf16", "cpu")
    assert refused is not None
    assert "AMX" in refused.why
    assert "bf16" not in BACKEND.precisions()
    monkeypatch.setattr(machine, "features", lambda: frozenset({"amx_bf16"}))
    assert BACKEND.unsupported("bf16", "cpu") is None
    assert "bf16" in BACKEND.precisions()


def test_int8_is_executed_in_integers_and_a_float_graph_called_int8_is_not_believed(tmp_path: Path) -> None:
    fp32 = cases.model("conv_net", tmp_path)
    quantized = cases.graph_of("int8-cpu", fp32, tmp_path)
    assert BACKEND.open(quantized, OpenRequest("int8", 1, 1)).precision == "int8"
    session = BACKEND.open(fp32, OpenRequest("int8", 1, 1))
    assert session.precision == "fp32"
    assert "in fp32" in session.notes[0]


def test_the_majority_names_the_precision() -> None:
    assert openvino_cpu._really("int8", {"u8": 20, "i8": 1}) == ("int8", ())
    precision, notes = openvino_cpu._really("int8", {"u8": 2, "f32": 19})
    assert precision == "fp32"
    assert notes == ("convolutions and matrix products: 19 in fp32, 2 in int8",)
    assert openvino_cpu._really("mixed", {"u8": 20, "f32": 1})[0] == "mixed"
    assert openvino_cpu._really("fp32", {"bf16": 21})[0] == "bf16"


def test_the_ir_keeps_fp32_weights_and_names_its_bin(tmp_path: Path) -> None:
    fp32 = cases.artifact(tiny_models.conv_net(tmp_path / "m.onnx", channels=64), "fp32")
    engine = BACKEND.build(fp32, BuildRequest("fp32"), tmp_path).save()
    assert list(engine.companions) == ["model.bin"]
    weights = sum(t.ByteSize() for t in onnx.load(fp32.path).graph.initializer)
    assert (tmp_path / "model.bin").stat().st_size > 0.95 * weights


def test_other_dynamic_axes_take_their_size_from_the_ranges(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3, "h", "w"]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    artifact = cases.artifact(path, "fp32")
    with pytest.raises(InputError, match="dynamic axis"):
        BACKEND.open(artifact, OpenRequest("fp32", 2, 1))
    ranges = {"x": ShapeRange((1, 3, 4, 4), (1, 3, 8, 6), (1, 3, 9, 9))}
    session = BACKEND.open(artifact, OpenRequest("fp32", 2, 1, ranges))
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 6)).astype(np.float32)
    np.testing.assert_array_equal(session.infer({"x": x})["y"], np.maximum(x, 0))
    with pytest.raises(InputError):
        session.infer({"x": x[:, :, :7]})


def test_an_open_session_is_idle_when_idle(tmp_path: Path) -> None:
    engine = cases.artifact(tiny_models.conv_net(tmp_path / "m.onnx", size=32), "fp32")
    run = BACKEND.open(engine, OpenRequest("fp32", 4, 2)).bind(cases.feeds(engine.signature, 4))
    spent = []
    for _ in range(5):
        run()
        before = time.process_time()
        time.sleep(0.05)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.01


def test_other_precisions_and_targets_are_refused_with_a_remedy() -> None:
    for precision in ("fp16", "int8-dynamic"):
        refused = BACKEND.unsupported(precision, "cpu")
        assert refused is not None
        assert refused.remedy
    assert BACKEND.unsupported("fp32", "sm89") is not None
    assert BACKEND.unsupported("fp32", "cpu") is None


@pytest.mark.parametrize("data", [b"", b"not a model", bytes(range(256)) * 8])
def test_bytes_that_are_no_model_are_one_error(data: bytes, tmp_path: Path) -> None:
    signature = cases.model("conv_net", tmp_path).signature
    for name in ("bad.onnx", "bad.xml"):
        (tmp_path / name).write_bytes(data)
        artifact = Artifact(tmp_path / name, "onnx", "fp32", signature, "test")
        with pytest.raises(ModelError):
            BACKEND.build(artifact, BuildRequest("fp32"), tmp_path)
        with pytest.raises(ModelError):
            BACKEND.open(artifact, OpenRequest("fp32", 1, 1))


def test_a_manifest_of_another_model_is_found(tmp_path: Path) -> None:
    one, two = cases.model("conv_net", tmp_path), cases.model("two_inputs", tmp_path)
    with pytest.raises(ModelError, match="no input"):
        BACKEND.open(Artifact(two.path, "onnx", "fp32", one.signature, "test"), OpenRequest("fp32", 1, 1))
