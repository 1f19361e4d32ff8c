"""What a model costs, against figures worked out by hand and against torchvision's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
from written import write

from deploykit.signature import ShapeRange
from deploykit.stages.checks import find, summary


def test_a_small_network_counted_by_hand(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    facts = summary(path)
    assert facts.macs == 8 * 8 * 8 * 27 + 8 * 8 * 8 * 72 + 4 * 8
    assert facts.parameters == 8 * 27 + 8 + 8 * 72 + 8 + 4 * 8 + 4
    assert facts.weight_bytes == facts.parameters * 4
    assert facts.activation_bytes == (5 * 8 * 64 + 2 * 8 + 4) * 4
    assert facts.ops == {"Conv": 2, "Relu": 2, "Add": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1}
    assert (facts.opset, facts.ir_version, facts.size_bytes) == (18, 10, path.stat().st_size)


def test_costs_are_a_samples_at_any_batch(tmp_path: Path) -> None:
    path = tiny_models.conv_net(tmp_path / "m.onnx")
    fixed = tiny_models.conv_net(tmp_path / "f.onnx", batch=4)
    assert summary(path).macs == summary(path, batch=8).macs == summary(fixed).macs


def test_grouped_and_transposed_convolutions(tmp_path: Path) -> None:
    text = "g (float[batch,4,6,6] x) => (float[batch,c,h,w] y) {{ y = {} (x, w) }}"
    grouped = write(tmp_path / "g.onnx", text.format("Conv<group=4>"), w=np.ones((4, 1, 3, 3), np.float32))
    assert summary(grouped).macs == 4 * 4 * 4 * 9
    transposed = write(tmp_path / "t.onnx", text.format("ConvTranspose"), w=np.ones((4, 2, 3, 3), np.float32))
    assert summary(transposed).macs == 4 * 36 * 2 * 9


def test_a_recurrent_layer(tmp_path: Path) -> None:
    text = "g (float[7,batch,4] x) => (float[7,1,batch,5] y) { y = LSTM<hidden_size=5>(x, w, r) }"
    path = write(tmp_path / "m.onnx", text, w=np.ones((1, 20, 4), np.float32), r=np.ones((1, 20, 5), np.float32))
    assert summary(path).macs == summary(path, batch=3).macs == 7 * (20 * 4 + 20 * 5)


def test_unknown_shapes_are_none_until_given(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.onnx", "g (float[batch,s,4] x) => (float[batch,s,3] y) { y = MatMul(x, w) }", w=np.ones((4, 3), np.float32)
    )
    assert summary(path).macs is None
    assert summary(path).activation_bytes is None
    assert summary(path, shapes={"x": ShapeRange((1, 1, 4), (1, 5, 4), (1, 9, 4))}).macs == 5 * 4 * 3


def test_external_data_counts_in_the_size(tmp_path: Path) -> None:
    model = onnx.load(tiny_models.conv_net(tmp_path / "m.onnx"))
    onnx.save_model(model, tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    facts = summary(tmp_path / "e.onnx")
    assert facts.size_bytes == (tmp_path / "e.onnx").stat().st_size + (tmp_path / "e.data").stat().st_size
    assert facts.macs == summary(tmp_path / "m.onnx").macs


def test_a_torchvision_network_exported_by_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    module = models.resnet18(weights=None).eval()
    path = tmp_path / "m.onnx"
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(
        module, (torch.randn(2, 3, 224, 224),), path, dynamo=True, dynamic_shapes=(batch,), external_data=False, verbose=False
    )
    facts = summary(path)
    published = 1.81e9  # torchvision's table of weights: 1.81 GFLOPS, in multiply-accumulates
    assert facts.macs == pytest.approx(published, rel=0.01)
    # Folding leaves a bias where a BatchNorm had a scale and a shift: a few less than torch counts.
    assert facts.parameters == pytest.approx(sum(p.numel() for p in module.parameters()), rel=0.01)
    found = find(path, ["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"])
    assert [f for f in found if f.severity != "info"] == []
