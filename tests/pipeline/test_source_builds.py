"""`build` of a source that is no .onnx file: exported first, or handed to a backend that makes its own graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_cases as cases
import numpy as np
import pytest

from deploykit import artifact as artifacts
from deploykit import backends, children
from deploykit.errors import InputError
from deploykit.pipeline import prepare, source_builds
from deploykit.pipeline.request import DataRequest, Silent, SourceRequest
from deploykit.session import BuildRequest, OpenRequest

needs_torch = pytest.mark.skipif(not children.has_module("torch"), reason="PyTorch is not installed")


def _here(name: str) -> Any:
    missing = backends.get(name).missing()
    return pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture
def source(tmp_path: Path) -> SourceRequest:
    cases.model("conv_net", tmp_path)
    return SourceRequest(f"{tmp_path / 'conv_net_factory.py'}:make")


def _built(source: SourceRequest, backend: str, wanted: BuildRequest, folder: Path, **data: Any) -> artifacts.Artifact:
    made = source_builds.build(source, backend, wanted, folder / "engines", DataRequest(**data), Silent())
    assert [path.name for path in (folder / "engines").iterdir()] == [made.path.parent.name]  # and nothing half-made
    return artifacts.load(made.path)


def _outputs(engine: artifacts.Artifact, batch: int) -> np.ndarray:
    session = backends.get(str(engine.options["backend"])).open(engine, OpenRequest(engine.precision, batch, 1))
    try:
        return session.infer(cases.feeds(engine.signature, batch))["logits"]
    finally:
        session.close()


@needs_torch
@_here("onnxruntime")
def test_a_backend_of_graphs_gets_the_export(source: SourceRequest, tmp_path: Path) -> None:
    engine = _built(source, "onnxruntime", BuildRequest("int8", batches=(1, 2)), tmp_path, data="random:16")
    assert engine.options["model"] == "conv_net_factory" and engine.precision == "int8"
    plain = _built(source, "torch", BuildRequest("fp32", batches=(1, 2)), tmp_path / "other")
    assert cases.distance(_outputs(engine, 2), _outputs(plain, 2)) <= cases.OWN_INT8_TOLERANCE


@needs_torch
def test_an_engines_time_is_its_own_not_its_graphs(tmp_path: Path) -> None:
    source = cases.graph_of("source", cases.model("conv_net", tmp_path), tmp_path)
    hasty = replace(source, facts={**source.facts, "build_s": 99.0})
    (tmp_path / "out").mkdir()
    assert "build_s" not in prepare.build_engine("torch", hasty, BuildRequest("fp32"), tmp_path / "out").facts


@needs_torch
@_here("executorch")
def test_a_backend_that_quantizes_by_itself_gets_the_samples(source: SourceRequest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs samples to calibrate"):
        _built(source, "executorch", BuildRequest("int8"), tmp_path)
    with pytest.raises(InputError, match="finds its own ranges"):
        _built(source, "executorch", BuildRequest("int8"), tmp_path, data="random:8", calib_table=tmp_path / "calib.json")
    assert not (tmp_path / "engines").exists()
    engine = _built(source, "executorch", BuildRequest("int8", batches=(1, 2)), tmp_path, data="random:16")
    assert engine.facts["executorch"]["layers_int8"] == 3
    assert _outputs(engine, 2).shape == (2, 4)


@needs_torch
@_here("executorch")
def test_an_onnx_file_is_not_for_it(tmp_path: Path) -> None:
    fp32 = cases.model("conv_net", tmp_path)
    with pytest.raises(InputError, match="of PyTorch sources"):
        _built(SourceRequest(str(fp32.path)), "executorch", BuildRequest("fp32"), tmp_path)


@pytest.mark.slow
@needs_torch
@_here("litert")
def test_int8_inputs_and_outputs_of_litert(source: SourceRequest, tmp_path: Path) -> None:
    wanted = BuildRequest("int8", batches=(1, 2), options={"io": "int8"})
    engine = _built(source, "litert", wanted, tmp_path, data="random:16")
    ports: Any = engine.facts["inputs"]
    assert engine.options["io"] == "int8" and ports[0]["dtype"] == "int8"
    assert _outputs(engine, 2).shape == (2, 4)
