"""ExecuTorch beyond the shared contract: what was asked for and what runs, bad files, bad batches, models it cannot hold."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import engine_cases as cases
import pytest

from deploykit import backends, children, hosted, source_spec
from deploykit.artifact import Artifact
from deploykit.backends import executorch as executorch_backend
from deploykit.backends import executorch_file
from deploykit.errors import BackendFailed, ChildDied, DeploykitError, InputError, ModelError, NotForThisGraph
from deploykit.session import BuildRequest, OpenRequest
from deploykit.signature import Signature, TensorSpec

BACKEND = executorch_backend.BACKEND
needs_executorch = pytest.mark.skipif(BACKEND.missing() is not None, reason=str(BACKEND.missing()))
ODD = """
import torch

class Branches(torch.nn.Module):
    INPUTS = ["x:float32:batchx4"]
    OUTPUTS = ["y"]
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x - 1

class Bessel(torch.nn.Module):
    INPUTS = ["x:float32:batchx4"]
    OUTPUTS = ["y"]
    def forward(self, x):
        return torch.special.bessel_j0(x)

class Flat(torch.nn.Module):
    INPUTS = ["x:float32:batchx4"]
    OUTPUTS = ["y"]
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 4)
    def forward(self, x):
        return self.fc(torch.stack([x, x * 2], 1).reshape(x.shape[0], -1))

class Clamped(torch.nn.Module):
    INPUTS = ["x:float32:batchx4"]
    OUTPUTS = ["y"]
    def __init__(self):
        super().__init__()
        self.wide, self.last = torch.nn.Conv1d(1, 8, 1), torch.nn.Conv1d(8, 1, 1)
        with torch.no_grad():
            self.wide.weight.copy_(torch.linspace(-400, 400, 8).reshape(8, 1, 1))
    def forward(self, x):
        return self.last(torch.nn.functional.relu6(self.wide(x[:, None])))[:, 0]

class Padded(torch.nn.Module):
    INPUTS = ["x:float32:batchx4"]
    OUTPUTS = ["y"]
    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(16, 4)
    def forward(self, x):
        x = self.conv(torch.nn.functional.pad(x.reshape(-1, 1, 2, 2), (1, 1, 1, 1)))
        return self.fc(x.flatten(1))

class TwoPaths(torch.nn.Module):
    INPUTS = ["x:float32:batchx4"]
    OUTPUTS = ["y"]
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
    def forward(self, x):
        return {"y": self.fc(x), "unused": None}["y"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("executorch")


def _source(folder: Path, name: str) -> Artifact:
    (folder / "odd.py").write_text(ODD)
    spec = source_spec.parse(f"{folder / 'odd.py'}:{name}")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(spec.to_json()))
    port = TensorSpec("x", "float32", ("batch", 4))
    return Artifact(path, "source", "fp32", Signature((port,), (replace(port, name="y"),)), "test").save()


@pytest.fixture(scope="module")
def engine(folder: Path) -> Artifact:
    """FP32, for batches 1 to 3."""
    out = folder / "engine"
    out.mkdir()
    return BACKEND.build(_source(folder, "TwoPaths"), BuildRequest("fp32", batches=(1, 3)), out).save()


@needs_executorch
def test_a_batch_it_was_not_built_for_is_the_users_error(engine: Artifact) -> None:
    with pytest.raises(InputError, match="built for batches 1 to 3, not for batch 4"):
        BACKEND.open(engine, OpenRequest("fp32", 4, 1))


@needs_executorch
def test_two_thread_counts_in_one_process_are_refused(engine: Artifact) -> None:
    first = BACKEND.open(engine, OpenRequest("fp32", 1, 1))
    with pytest.raises(BackendFailed, match="on 1 threads is open"):
        BACKEND.open(engine, OpenRequest("fp32", 1, 2))
    first.close()
    second = BACKEND.open(engine, OpenRequest("fp32", 1, 2))
    assert second.threads == 2
    second.close()


@needs_executorch
def test_a_manifest_of_another_model_is_refused(engine: Artifact) -> None:
    x, y = engine.signature.inputs[0], engine.signature.outputs[0]
    for other in (
        Signature((x, replace(x, name="more")), (y,)),
        Signature((replace(x, shape=("batch", 5)),), (y,)),
        Signature((x,), (replace(y, dtype="int64"),)),
    ):
        with pytest.raises(ModelError, match="its manifest says"):
            BACKEND.open(replace(engine, signature=other), OpenRequest("fp32", 1, 1))


@needs_executorch
def test_a_file_that_kills_the_runtime_costs_its_child_only(engine: Artifact, tmp_path: Path) -> None:
    """Behind a good header, random bytes: ExecuTorch 1.5.1 dies of them."""
    data = engine.path.read_bytes()
    bad = tmp_path / "model.pte"
    bad.write_bytes(data[:64] + random.Random(0).randbytes(len(data) - 64))
    hurt = replace(engine, path=bad)
    with children.Child("open", threads=1) as child, pytest.raises(DeploykitError) as caught:
        child.call(hosted.open_bare, "executorch", hurt, OpenRequest("fp32", 1, 1))
    assert isinstance(caught.value, ChildDied | BackendFailed | ModelError)


@pytest.mark.parametrize("size", [0, 3, 39, 5000])
def test_a_foreign_file_is_one_clear_error(size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(random.Random(size).randbytes(size))
    with pytest.raises(ModelError, match="is not an ExecuTorch program"):
        executorch_file.check(path)


@needs_executorch
def test_a_whole_file_passes_and_a_cut_one_does_not(engine: Artifact, tmp_path: Path) -> None:
    executorch_file.check(engine.path)
    path = tmp_path / "model.pte"
    path.write_bytes(engine.path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cut short"):
        executorch_file.check(path)


@needs_executorch
def test_control_flow_on_values_is_named_with_its_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"branches on the values of a tensor.*x\.sum\(\) > 0"):
        BACKEND.build(_source(folder, "Branches"), BuildRequest("fp32"), tmp_path)
    assert not list(tmp_path.iterdir())


@needs_executorch
def test_an_operator_that_it_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendFailed, match="special_bessel_j0"):
        BACKEND.build(_source(folder, "Bessel"), BuildRequest("fp32"), tmp_path)


@needs_executorch
def test_nothing_to_quantize_is_no_int8_row(folder: Path, tmp_path: Path) -> None:
    fp32 = cases.model("two_inputs", folder)
    with pytest.raises(NotForThisGraph, match="nothing to put into int8-dynamic"):
        BACKEND.build(cases.graph_of("source", fp32, folder), BuildRequest("int8-dynamic"), tmp_path)


FACTS = {"layers": 4, "layers_int8": 3, "layers_float": ["stem"], "delegated": 9, "not_delegated": {"mean.dim": 2}}


def test_the_row_is_named_by_what_most_layers_run_in() -> None:
    precision, notes = executorch_backend.really("int8", FACTS)
    assert precision == "int8"
    assert notes[0] == "3 of 4 convolutions and linear layers in int8; in FP32: stem"
    assert notes[1] == "XNNPACK runs 9 of 11 operators; ExecuTorch's portable kernels run mean.dim x2"
    assert executorch_backend.really("int8", {**FACTS, "layers_int8": 1})[0] == "fp32"
    whole = {**FACTS, "layers_int8": 4, "layers_float": [], "not_delegated": {}}
    assert executorch_backend.really("int8", whole) == ("int8", ())
    assert executorch_backend.really("fp32", whole) == ("fp32", ())


def test_a_precision_it_does_not_make_is_refused() -> None:
    assert BACKEND.unsupported("bf16", "cpu") is not None
    assert BACKEND.unsupported("int8", "sm75") is not None
    assert BACKEND.unsupported("int8", "cpu") is None
    assert backends.get("executorch") is BACKEND


@needs_executorch
def test_int8_for_batch_1_is_calibrated_on_more_at_a_time(folder: Path, tmp_path: Path) -> None:
    """A graph traced for batch 1 holds it in its reshapes: the one that calibrates is traced for its own batch."""
    source = _source(folder, "Flat")
    request = BuildRequest("int8", batches=(1,), calibration=cases.calibration(source.signature, 20))
    engine = BACKEND.build(source, request, tmp_path).save()
    assert engine.facts["executorch"]["batches"] == [1, 1] and engine.facts["executorch"]["layers_int8"] == 1
    session = BACKEND.open(engine, OpenRequest("int8", 1, 1))
    feeds = cases.feeds(source.signature, 1)
    found = session.infer(feeds)["y"]
    session.close()
    wanted = backends.get("torch").open(source, OpenRequest("fp32", 1, 1)).infer(feeds)["y"]
    assert cases.distance(found, wanted) <= cases.OWN_INT8_TOLERANCE


@needs_executorch
def test_a_relu6_is_quantized_over_its_own_range(folder: Path, tmp_path: Path) -> None:
    """In steps of what comes before it, some hundred times as wide, nothing would be left of it."""
    source = _source(folder, "Clamped")
    request = BuildRequest("int8", batches=(1, 2), calibration=cases.calibration(source.signature, 32))
    engine = BACKEND.build(source, request, tmp_path).save()
    assert engine.facts["executorch"]["layers_int8"] == 2
    session = BACKEND.open(engine, OpenRequest("int8", 2, 1))
    feeds = cases.feeds(source.signature, 2, seed=5)
    found = session.infer(feeds)["y"]
    session.close()
    wanted = backends.get("torch").open(source, OpenRequest("fp32", 2, 1)).infer(feeds)["y"]
    assert cases.distance(found, wanted) <= 0.05


@needs_executorch
def test_a_convolution_behind_a_pad_stays_float_in_dynamic_int8(folder: Path, tmp_path: Path) -> None:
    """XNNPACK refuses its shapes when it runs (ExecuTorch 1.5.1)."""
    engine = BACKEND.build(_source(folder, "Padded"), BuildRequest("int8-dynamic", batches=(1, 2)), tmp_path).save()
    assert (engine.facts["executorch"]["layers"], engine.facts["executorch"]["layers_int8"]) == (2, 1)
