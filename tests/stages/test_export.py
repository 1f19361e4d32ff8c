"""Export: proven at several batches, tidy, the same bytes twice; a batch that got baked in is named with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
from onnx import TensorProto, helper, numpy_helper

from deploykit import artifact, graph
from deploykit.errors import InputError, ModelError, UnknownName
from deploykit.source_spec import SourceSpec, parse
from deploykit.stages import export, export_graph, export_proof, source

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_factory.py"

MODELS = """
import torch
from torch import nn

class View(nn.Module):
    def forward(self, x):
        return x.view(2, -1).sum(1)

class Loop(nn.Module):
    def forward(self, x):
        return torch.stack([x[i].mean() for i in range(int(x.shape[0]))])

class Branch(nn.Module):
    def forward(self, x):
        return x.mean(1) if x.sum() > 0 else x.sum(1)

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(4, 8)
    def forward(self, x, h0):
        y, h = self.cell(x, h0)
        return y, h

class Free(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    def forward(self, x):
        y = self.c(x)
        return {"pooled": y.mean((2, 3)), "out": nn.functional.interpolate(y, size=x.shape[2:])}

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.l = nn.Embedding(10, 5), nn.Linear(6, 5)
    def forward(self, a, ids):
        y = self.l(a) + self.e(ids).mean(1)
        return {"y": y, "nothing": None, "z": y.sum(1)}

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        for norm in (self.a, self.b):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    def forward(self, x):
        return self.b(self.c(self.a(self.c(x))))
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    file = tmp_path / "models.py"
    file.write_text(MODELS)
    return file


def test_the_export_is_proven_and_reproducible(tmp_path: Path) -> None:
    spec = parse(f"{EXAMPLE}:make", num_classes=4)
    first = export.to_onnx(spec, tmp_path / "a" / "m.onnx", batches=(1, 8)).save()
    second = export.to_onnx(spec, tmp_path / "b" / "m.onnx", batches=(1, 8)).save()
    assert first.path.read_bytes() == second.path.read_bytes()
    assert str(tmp_path).encode() not in first.path.read_bytes()
    assert [r["batch"] for r in first.facts["proof"]["runs"]] == [1, 2, 7, 8]
    assert first.signature.outputs[0].name == "logits"
    assert first.signature.batch_symbol == "batch"
    assert first.facts["opset"] == export.DEFAULT_OPSET
    assert artifact.load(first.path).facts["preprocess"]["crop"] == 32
    operators = {node.op_type for node in graph.load(first.path).graph.node}
    assert "BatchNormalization" not in operators


@pytest.mark.parametrize(("name", "line"), [("View", "x.view(2, -1)"), ("Loop", "int(x.shape[0])"), ("Branch", "x.sum() > 0")])
def test_a_fixed_batch_or_a_branch_is_named_with_its_line(tmp_path: Path, models: Path, name: str, line: str) -> None:
    spec = parse(f"{models}:{name}", inputs=("x:float32:batchx6",))
    with pytest.raises(ModelError) as caught:
        export.to_onnx(spec, tmp_path / "m.onnx")
    assert "models.py" in str(caught.value)
    assert line in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


def test_a_recurrent_state_has_its_batch_in_second_place(tmp_path: Path, models: Path) -> None:
    spec = parse(f"{models}:Recurrent", inputs=("x:float32:seq,batch,4", "h0:float32:1,batch,8"))
    with pytest.raises(ModelError, match="axis 0 of 'x' must be"):
        export.to_onnx(spec, tmp_path / "m.onnx", batches=(1, 4))
    spec = parse(f"{models}:Recurrent", inputs=("x:float32:5,batch,4", "h0:float32:1,batch,8"))
    made = export.to_onnx(spec, tmp_path / "m.onnx", batches=(1, 4))
    assert [str(s) for s in made.signature.inputs] == ["x:float32:5xbatchx4", "h0:float32:1xbatchx8"]
    assert [s.shape for s in made.signature.outputs] == [(5, "batch", 8), (1, "batch", 8)]


def test_a_free_axis_is_proven_at_another_size(tmp_path: Path, models: Path) -> None:
    spec = parse(f"{models}:Free", inputs=("x:float32:batch,3,height,width",))
    made = export.to_onnx(spec, tmp_path / "m.onnx", batches=(1, 4))
    assert made.signature.inputs[0].shape == ("batch", 3, "height", "width")
    assert [s.name for s in made.signature.outputs] == ["pooled", "out"]
    assert any(run["grown"] for run in made.facts["proof"]["runs"])


def test_several_inputs_and_outputs_and_a_none_among_them(tmp_path: Path, models: Path) -> None:
    spec = parse(f"{models}:Two", inputs=("a:float32:batchx6", "ids:int64:batchx3"))
    made = export.to_onnx(spec, tmp_path / "m.onnx", batches=(4,))
    assert [str(s) for s in made.signature.outputs] == ["y:float32:batchx5", "z:float32:batch"]


def test_batchnorm_is_folded_where_convolutions_share_weights(tmp_path: Path, models: Path) -> None:
    made = export.to_onnx(parse(f"{models}:Shared", inputs=("x:float32:batchx3x8x8",)), tmp_path / "m.onnx", batches=(3,))
    model = graph.load(made.path)
    assert export_graph.batchnorm_left(model) == []
    assert [n.op_type for n in model.graph.node] == ["Conv", "Conv"]


def test_a_pt2_is_exported_within_its_range(tmp_path: Path) -> None:
    import torch

    program = torch.export.export(
        torch.nn.Linear(4, 3).eval(), (torch.randn(2, 4),), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=5)},)
    )
    torch.export.save(program, tmp_path / "net.pt2")
    made = export.to_onnx(parse(str(tmp_path / "net.pt2")), tmp_path / "m.onnx", batches=(1, 3, 32))
    assert [r["batch"] for r in made.facts["proof"]["runs"]] == [1, 2]
    fixed = torch.export.export(torch.nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    torch.export.save(fixed, tmp_path / "fixed.pt2")
    assert export.to_onnx(parse(str(tmp_path / "fixed.pt2")), tmp_path / "f.onnx").facts["fixed_batch"] == 2


def test_an_onnx_is_adopted_and_cut(tmp_path: Path) -> None:
    file = tiny_models.conv_net(tmp_path / "net.onnx")
    whole = export.to_onnx(parse(str(file)), tmp_path / "a.onnx")
    assert whole.facts["fixed_batch"] is None
    assert [r["batch"] for r in whole.facts["proof"]["runs"]] == [1, 2, 3]
    part = export.to_onnx(parse(str(file)), tmp_path / "b.onnx", outputs=("add1", "r1"))
    assert [str(s) for s in part.signature.outputs] == ["a1:float32:batchx8x8x8", "r1:float32:batchx8x8x8"]
    assert {t.name for t in graph.load(part.path).graph.initializer} == {"w1", "b1", "w2", "b2"}
    with pytest.raises(UnknownName, match="logits"):
        export.to_onnx(parse(str(file)), tmp_path / "c.onnx", outputs=("logit",))
    fixed = tiny_models.conv_net(tmp_path / "fixed.onnx", batch=5)
    assert export.to_onnx(parse(str(fixed)), tmp_path / "d.onnx").facts["fixed_batch"] == 5


def test_bad_options_are_refused(tmp_path: Path) -> None:
    spec = parse(f"{EXAMPLE}:make")
    with pytest.raises(InputError, match="--opset"):
        export.to_onnx(spec, tmp_path / "m.onnx", opset=9)
    with pytest.raises(InputError, match="--batch"):
        export.to_onnx(spec, tmp_path / "m.onnx", batches=(0,))


def test_the_proof_fails_on_a_wrong_weight() -> None:
    loaded = source.load(parse(f"{EXAMPLE}:make", num_classes=4))
    import torch

    model = export._convert(export.trace(loaded, (1, 2), "tiny")[0], loaded, 20)
    good = export_proof.open_session(model.SerializeToString())
    export_proof.prove(good, loaded, (1, 2))
    with torch.no_grad():
        loaded.module.get_parameter("head.bias").add_(0.01)
    with pytest.raises(ModelError, match="differs"):
        export_proof.prove(good, loaded, (1, 2))


def test_the_proof_fails_on_a_baked_reshape(tmp_path: Path) -> None:
    loaded = source.load(parse(f"{EXAMPLE}:make", num_classes=4))
    made = helper.make_graph(
        [helper.make_node("Reshape", ["x", "s"], ["logits"])],
        "baked",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [2, 1536])],
        [numpy_helper.from_array(np.array([2, 1536], dtype=np.int64), "s")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    session = export_proof.open_session(model.SerializeToString())
    with pytest.raises(ModelError, match="batch 1"):
        export_proof.prove(session, loaded, (1, 2))


def test_the_source_artifact_opens_and_notices_a_change(tmp_path: Path) -> None:
    import json
    import shutil

    file = tmp_path / "net.py"
    shutil.copyfile(EXAMPLE, file)
    spec = parse(f"{file}:make", num_classes=4)
    exported = export.to_onnx(spec, tmp_path / "m.onnx", batches=(2,)).save()
    made = export.source_artifact(spec, tmp_path / "source.json", exported).save()
    assert SourceSpec.from_json(json.loads(made.path.read_text())) == spec
    assert export.open_source(made.path).signature.outputs == made.signature.outputs
    file.write_text(file.read_text() + "\n# changed\n")
    with pytest.raises(InputError, match="changed"):
        export.open_source(made.path)
