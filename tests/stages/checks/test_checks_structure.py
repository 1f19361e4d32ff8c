"""Validity, names, size, operators against the targets, and files that are no models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
from written import by_code, write

from deploykit import children
from deploykit.errors import ModelError, UnknownName
from deploykit.stages.checks import TARGETS, find, loaders, repair, structure, summary
from deploykit.stages.checks.context import Graph

RELU = "g (float[batch,4] x) => (float[batch,4] y) { y = Relu(x) }"


def test_a_clean_model_has_no_finding_on_any_target(tmp_path: Path) -> None:
    found = find(tiny_models.conv_net(tmp_path / "m.onnx"), TARGETS)
    assert [f for f in found if f.code != "DK068"] == []  # which says that no rules are known for a target


@pytest.mark.parametrize("data", [b"", b"hello world, this is text", bytes(range(256)) * 8], ids=["empty", "text", "bytes"])
def test_what_is_no_model_is_an_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ModelError):
        find(tmp_path / "m.onnx")


def test_a_truncated_model_is_an_error(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ModelError):
        find(path)


def test_an_unknown_target_names_the_closest(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'tensorrt'"):
        find(tiny_models.conv_net(tmp_path / "m.onnx"), ["tensort"])


def test_an_operator_that_does_not_exist_is_refused_by_all(tmp_path: Path) -> None:
    found = by_code(write(tmp_path / "m.onnx", RELU.replace("Relu", "Reluu")), "onnxruntime", "openvino", "tensorrt-rtx")
    assert (found["DK001"].severity, found["DK001"].target) == ("error", "any")
    assert "Reluu" in found["DK001"].message
    assert (found["DK060"].target, found["DK060"].node) == ("onnxruntime", "reluu0")
    assert found["DK061"].target == "openvino"
    assert found["DK062"].target == "tensorrt-rtx"


def test_findings_on_a_backend_come_only_when_asked_for(tmp_path: Path) -> None:
    found = by_code(write(tmp_path / "m.onnx", RELU.replace("Relu", "com.acme.Magic")))
    assert found["DK064"].node == "com.acme.magic0" or "com.acme::Magic" in found["DK064"].message
    assert not {"DK001", "DK060", "DK061", "DK062", "DK063"} & set(found)


def test_a_custom_operator_is_an_error_of_each_backend_but_does_not_stop_the_line(tmp_path: Path) -> None:
    found = by_code(
        write(tmp_path / "m.onnx", RELU.replace("Relu", "com.acme.Magic")), "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"
    )
    assert {"DK060", "DK061", "DK062", "DK063", "DK064"} <= set(found)
    assert not [f for f in found.values() if f.severity == "error" and f.target == "any"]


def test_a_loader_that_is_not_there_or_gives_no_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    monkeypatch.setattr(loaders, "TIMEOUT_S", 0.001)
    assert by_code(path, "openvino")["DK065"].target == "openvino"
    monkeypatch.setattr(children, "has_module", lambda name: False)
    found = by_code(path, "tensorrt-rtx", "onnxruntime")
    assert "not installed" in found["DK065"].message
    assert "onnxruntime" in found["DK015"].message  # the batch is not proven


def test_a_very_large_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    assert "DK007" not in by_code(path)
    monkeypatch.setattr(structure, "LARGE_BYTES", 3000)
    assert "DK007" in by_code(path)


def test_a_model_without_inputs(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "g () => (float[2] y) { y = Relu(c) }", c=np.ones(2, np.float32))
    assert [f.code for f in find(path) if f.severity == "error"] == []


def test_contradictory_shapes_are_found(tmp_path: Path) -> None:
    text = "g (float[batch,4] x) => (float[batch,5] y) { y = MatMul(x, w) }"
    found = by_code(write(tmp_path / "m.onnx", text, w=np.ones((3, 5), np.float32)), "onnxruntime")
    assert {"DK001", "DK002", "DK003"} & set(found)


def test_an_opset_from_the_future_is_named_and_left_to_each_engine(tmp_path: Path) -> None:
    found = by_code(write(tmp_path / "m.onnx", RELU, opset=99), "onnxruntime")
    assert "opset 99" in found["DK067"].message
    assert (found["DK060"].severity, found["DK060"].target) == ("error", "onnxruntime")
    assert "ONNX Runtime refuses" in by_code(tmp_path / "m.onnx")["DK015"].message  # not proven is not passed
    assert "DK067" not in by_code(write(tmp_path / "n.onnx", RELU, opset=18))


def test_an_old_opset_is_named(tmp_path: Path) -> None:
    assert "opset 11" in by_code(write(tmp_path / "m.onnx", RELU, opset=11))["DK066"].message
    assert "DK066" not in by_code(write(tmp_path / "n.onnx", RELU, opset=13))


def test_names_missing_and_used_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "g (float[batch,4] x) => (float[batch,4] y) { a = Relu(x)\n b = Relu(a)\n y = Relu(b) }")
    model = onnx.load(path)
    model.graph.node[0].name = ""
    model.graph.node[1].name = model.graph.node[2].name = "same"
    onnx.save(model, path)
    message = by_code(path)["DK004"].message
    assert "'Relu -> a' has no name" in message
    assert "'same' names 2 nodes" in message


def test_dead_nodes_are_named(tmp_path: Path) -> None:
    found = by_code(write(tmp_path / "m.onnx", "g (float[batch,4] x) => (float[batch,4] y) { z = Exp(x)\n y = Relu(x) }"))
    assert found["DK008"].node == "exp0"


def test_external_data_is_named_and_read(tmp_path: Path) -> None:
    model = onnx.load(tiny_models.conv_net(tmp_path / "m.onnx"))
    weights = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weights[0] = np.nan
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w1"))
    onnx.save_model(model, tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    found = by_code(tmp_path / "e.onnx")
    assert "'e.data' holds 6 tensors" in found["DK006"].message
    assert found["DK030"].node == "w1"


@pytest.mark.parametrize(("kind", "code"), [("double", "DK020"), ("float16", "DK021"), ("bfloat16", "DK021"), ("int64", "DK023")])
def test_unusual_types_at_the_boundary(kind: str, code: str, tmp_path: Path) -> None:
    found = by_code(write(tmp_path / "m.onnx", f"g ({kind}[batch,4] x) => ({kind}[batch,4] y) {{ y = Abs(x) }}"))
    assert "2 places" in found[code].message


def test_a_scalar_input_and_output(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", "g (float x) => (float y) { y = Relu(x) }")
    assert [f.code for f in find(path, TARGETS) if f.severity == "error"] == []


def test_functions_of_the_model_are_no_foreign_operators(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18, "local": 1]> g (float[batch,4] x) => (float[batch,4] y) { y = local.twice(x) }'
        ' <domain: "local", opset_import: ["" : 18]> twice (a) => (b) { b = Add(a, a) }'
    )
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert not {"DK001", "DK003", "DK011", "DK064"} & set(by_code(tmp_path / "m.onnx"))


def test_a_name_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", RELU)
    path.write_bytes(path.read_bytes().replace(b"relu0", b"rel\xff0"))
    with pytest.raises(ModelError, match="no text"):
        find(path)


def test_a_damaged_file_is_an_error_or_a_finding_never_a_crash(tmp_path: Path) -> None:
    data = tiny_models.conv_net(tmp_path / "m.onnx").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 2):
            damaged[position] = rng.integers(256)
        path = tmp_path / "d.onnx"
        path.write_bytes(damaged)
        try:
            graph = Graph.load(path)
            summary(path)
            structure.checker_error(graph)
            structure.inference_error(graph)
            repair(graph.model)
        except ModelError:
            refused += 1
    assert 0 < refused < 150
