"""LiteRT: what a .tflite really holds and runs, its INT8 inputs and outputs, max-pools, batches that cannot be resized, bad files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_cases as cases
import numpy as np
import pytest

from deploykit import artifact as artifacts
from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.backends import litert_convert, litert_flatbuffer
from deploykit.errors import BackendFailed, InputError, ModelError, UnknownName
from deploykit.session import BuildRequest, OpenRequest
from deploykit.signature import Signature, TensorSpec

LITERT = backends.get("litert")
pytestmark = pytest.mark.skipif(LITERT.missing() is not None, reason=str(LITERT.missing()))

POOLED = """
import torch


class Pooled(torch.nn.Module):
    INPUTS = ["x:float32:batchx3x16x16"]
    OUTPUTS = ["logits"]

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.fc = torch.nn.Linear(8 * 8 * 8, 4)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(self.conv(x).ACTIVATION(), 3, 2, 1)
        return self.fc(x.flatten(1))


def make():
    return Pooled()


class Lacking(torch.nn.Module):
    INPUTS = ["x:float32:batchx4x4"]
    OUTPUTS = ["y"]

    def forward(self, x):
        return torch.linalg.svdvals(x)


class Branching(torch.nn.Module):
    INPUTS = ["x:float32:batchx4"]
    OUTPUTS = ["y"]

    def forward(self, x):
        if x.sum() > 1e9:
            return x * 2
        return x + 1
"""
POOLED_SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 3, 16, 16)),), (TensorSpec("logits", "float32", ("batch", 4)),)
)


def _source(folder: Path, function: str, signature: Signature, activation: str = "relu") -> Artifact:
    import json

    from deploykit import source_spec

    (folder / "pooled.py").write_text(POOLED.replace("ACTIVATION", activation))
    path = folder / f"{function}.json"
    path.write_text(json.dumps(source_spec.parse(f"{folder / 'pooled.py'}:{function}").to_json()))
    return Artifact(path, "source", "fp32", signature, "test", facts={"notes": ["of the source"]}).save()


def _int8(folder: Path, activation: str, **options: Any) -> tuple[Artifact, Artifact]:
    source = _source(folder, "make", POOLED_SIGNATURE, activation)
    out = folder / "-".join(["built", *options.values()])
    out.mkdir()
    request = BuildRequest("int8", options=options, calibration=cases.calibration(POOLED_SIGNATURE, 24))
    return source, LITERT.build(source, request, out).save()


def _reference(source: Artifact, feeds: dict[str, Any]) -> Any:
    return backends.get("torch").open(source, OpenRequest("fp32", len(feeds["x"]), 1)).infer(feeds)["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_padding_of_a_max_pool_spoils_no_scale(activation: str, tmp_path: Path) -> None:
    source, engine = _int8(tmp_path, activation)
    session = LITERT.open(artifacts.load(engine.path), OpenRequest("int8", 2, 1))
    feeds = cases.feeds(POOLED_SIGNATURE, 2, seed=99)
    assert session.precision == "int8"
    assert cases.distance(session.infer(feeds)["logits"], _reference(source, feeds)) <= cases.OWN_INT8_TOLERANCE
    assert engine.facts["layers"] == {"int8": 2}
    names = {name for _, name, _ in litert_flatbuffer.operators(litert_flatbuffer.read(engine.path))}
    assert ("PADV2" in names) == (activation != "relu")  # behind a Relu, zeros do


@pytest.mark.slow
def test_int8_inputs_and_outputs_are_in_the_file_and_its_manifest(tmp_path: Path) -> None:
    source, engine = _int8(tmp_path, "relu", io="int8")
    (taken,), (given,) = engine.facts["inputs"], engine.facts["outputs"]
    assert (taken["name"], taken["dtype"], given["name"], given["dtype"]) == ("x", "int8", "logits", "int8")
    assert engine.facts["notes"] == ["of the source"]
    assert taken["scale"] > 0 and -128 <= taken["zero_point"] <= 127
    session = LITERT.open(artifacts.load(engine.path), OpenRequest("int8", 2, 1))
    feeds = cases.feeds(POOLED_SIGNATURE, 2, seed=99)
    assert any("INT8 inputs" in note for note in session.notes)
    assert session.infer(feeds)["logits"].dtype == np.float32
    assert cases.distance(session.infer(feeds)["logits"], _reference(source, feeds)) <= cases.OWN_INT8_TOLERANCE


def test_float_files_have_no_int8_inputs(tmp_path: Path) -> None:
    source = _source(tmp_path, "make", POOLED_SIGNATURE)
    with pytest.raises(InputError, match="float inputs"):
        LITERT.build(source, BuildRequest("fp32", options={"io": "int8"}), tmp_path)
    with pytest.raises(UnknownName):
        LITERT.build(source, BuildRequest("int8", options={"io": "int4"}), tmp_path)
    with pytest.raises(InputError, match="samples"):
        LITERT.build(source, BuildRequest("int8"), tmp_path)


@pytest.mark.slow
def test_fp16_is_stored_and_fp32_is_what_runs(tmp_path: Path) -> None:
    source = _source(tmp_path, "make", POOLED_SIGNATURE)
    engine = LITERT.build(source, BuildRequest("fp16"), tmp_path).save()
    session = LITERT.open(artifacts.load(engine.path), OpenRequest("fp16", 1, 1))
    assert engine.facts["layers"] == {"fp16": 2}
    assert session.precision == "fp32"
    assert any("stored in FP16" in note for note in session.notes)
    feeds = cases.feeds(POOLED_SIGNATURE, 1)
    assert cases.distance(session.infer(feeds)["logits"], _reference(source, feeds)) <= cases.TOLERANCE["fp16"]


def test_an_operator_the_converter_lacks_is_named(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", 4, 4)),), (TensorSpec("y", "float32", ("batch", 4)),))
    with pytest.raises(BackendFailed, match="svd"):
        LITERT.build(_source(tmp_path, "Lacking", signature), BuildRequest("fp32"), tmp_path)


@pytest.mark.slow
def test_control_flow_that_depends_on_values_is_named(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),))
    with pytest.raises(ModelError, match="branches on the values"):
        LITERT.build(_source(tmp_path, "Branching", signature), BuildRequest("fp32"), tmp_path)


def test_a_file_for_some_batches_names_them(tmp_path: Path) -> None:
    facts = {"files": {"1": "model.tflite", "8": "model-batch8.tflite"}}
    engine = Artifact(tmp_path / "model.tflite", "litert", "fp32", POOLED_SIGNATURE, "test", facts=facts)
    with pytest.raises(InputError, match="made for batch 1, 8, not 3"):
        LITERT.open(engine, OpenRequest("fp32", 3, 1))


@pytest.mark.parametrize("content", [b"", b"not a flatbuffer at all", b"\x1c\0\0\0TFL3" + os.urandom(4000)])
def test_a_foreign_file_is_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(content)
    engine = Artifact(tmp_path / "model.tflite", "litert", "fp32", POOLED_SIGNATURE, "test")
    with pytest.raises((ModelError, BackendFailed)):
        LITERT.open(engine, OpenRequest("fp32", 1, 1))


@pytest.mark.slow
def test_threads_are_the_ones_asked_for(tmp_path: Path) -> None:
    source = _source(tmp_path, "make", POOLED_SIGNATURE)
    engine = LITERT.build(source, BuildRequest("fp32"), tmp_path).save()
    code = f"""
import os, pathlib
from deploykit import artifact, backends
from deploykit.session import OpenRequest
import ai_edge_litert.interpreter
found = []
for threads in (1, 3):
    before = len(os.listdir('/proc/self/task'))
    session = backends.get('litert').open(artifact.load(pathlib.Path({str(engine.path)!r})), OpenRequest('fp32', 1, threads))
    assert session.threads == threads
    found.append(len(os.listdir('/proc/self/task')) - before)
print(found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 2]"  # the caller works too


def test_an_error_of_the_converter_without_a_name_keeps_its_first_line() -> None:
    found = litert_convert.explained(RuntimeError("Lowering not found: aten._foo.default\nmany\nlines"))
    assert "aten._foo.default" in str(found)
    assert "no reason known" in str(litert_convert.explained(ValueError("no reason known")))
