"""What is known of a target, and what TensorRT's rules say of a graph that was quantized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from deploykit import data, graph
from deploykit.artifact import Artifact
from deploykit.errors import ChecksFailed, UnknownName
from deploykit.pipeline import prepare
from deploykit.pipeline.request import Silent, SourceRequest
from deploykit.stages import calibration, checks, precision
from deploykit.store import Store

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("target", ["tvm", "executorch", "litert"])
def test_a_target_without_rules_is_called_that(target: str, tmp_path: Path) -> None:
    found = {f.code: f for f in checks.find(tiny_models.conv_net(tmp_path / "net.onnx"), (target,))}
    assert found["DK068"].target == target
    assert found["DK068"].severity == "info"
    assert "no rules are known for that target" in found["DK068"].message


def test_a_target_with_rules_is_not_and_an_unknown_one_is_an_error(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "net.onnx")
    assert not [f for f in checks.find(path, ("onnxruntime",)) if f.code == "DK068"]
    with pytest.raises(UnknownName, match="tvn"):
        checks.find(path, ("tvn",))


def _quantized(folder: Path, layout: str) -> tuple[Path, Artifact]:
    path = tiny_models.conv_net(folder / "net.onnx")
    np.savez(folder / "x.npz", x=np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32))
    table = calibration.collect(path, data.open(str(folder / "x.npz"), graph.signature(graph.load(path))))["minmax"]
    return path, precision.to_int8(path, table, layout, folder / f"{layout}.onnx").save()


def test_tensorrts_layout_passes_its_own_rules_and_the_cpus_does_not(tmp_path: Path) -> None:
    path, good = _quantized(tmp_path, "tensorrt")
    _, bad = _quantized(tmp_path, "cpu")
    assert not [f for f in checks.lint(good.path, "tensorrt") if f.severity == "error"]
    assert "DK102" in {f.code for f in checks.lint(bad.path, "tensorrt") if f.severity == "error"}
    assert checks.lint(bad.path, "openvino") == []
    shop = prepare.open_source(SourceRequest(str(path)), Store(tmp_path / "store"), Silent(), batches=(1,))
    prepare.lint(shop, replace(good, sha256="1"), "int8-tensorrt", "tensorrt-rtx")
    assert not [f for f in shop.findings if f.severity == "error"]
    with pytest.raises(ChecksFailed, match="in the int8-tensorrt graph"):
        prepare.lint(shop, replace(bad, sha256="2"), "int8-tensorrt", "tensorrt-rtx")
    assert all(f.message.startswith("in the int8-tensorrt graph: ") for f in shop.findings)


def test_ranges_reach_the_checks_of_the_line(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    from deploykit.signature import ShapeRange

    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "h", "w"])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, "h", "w"])]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 3, 1, 1], [0.1] * 9)
    made = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], name="conv")], "g", given, out, [weight])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(tmp_path / "m.onnx"))
    shop = prepare.open_source(SourceRequest(str(tmp_path / "m.onnx")), Store(tmp_path / "store"), Silent(), batches=(1,))
    prepare.check(shop, ("tvm",))
    assert shop.summary["macs"] is None
    sizes = (1, 3, 10, 20)
    prepare.check(shop, (), {"x": ShapeRange(sizes, sizes, sizes)})
    assert shop.summary["macs"] == 9 * 10 * 20
