"""Engines made of another one: LiteRT's quantized files of its FP32 file, which is converted once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine_cases as cases
import pytest

from deploykit import artifact as artifacts
from deploykit import backends, source_spec
from deploykit.artifact import Artifact
from deploykit.pipeline import line
from deploykit.pipeline.line import LineRequest
from deploykit.pipeline.request import DataRequest, RowsRequest, Silent, SourceRequest
from deploykit.pipeline.workshop import Workshop
from deploykit.signature import Signature
from deploykit.store import Store


def test_two_threads_that_need_the_same_make_it_once(tmp_path: Path) -> None:
    model = Artifact(tmp_path / "m.onnx", "onnx", "fp32", Signature((), ()), "test")
    shop = Workshop(Store(tmp_path / "store"), Silent(), source_spec.parse("resnet18"), model, None)
    begun: list[int] = []
    at_once = threading.Barrier(2)

    def build(folder: Path) -> Artifact:
        begun.append(1)
        time.sleep(0.2)
        (folder / "engine").write_bytes(b"engine")
        return Artifact(folder / "engine", "litert", "fp32", Signature((), ()), "test")

    def need(_: int) -> Artifact:
        at_once.wait()
        return shop.keep("engine", "litert fp32", "parent", {}, build, versions={})

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(need, range(2))
    assert first == second
    assert (len(begun), shop.made, shop.reused) == (1, ["litert fp32"], [])


@pytest.mark.slow
@pytest.mark.skipif(backends.get("litert").missing() is not None, reason=str(backends.get("litert").missing()))
def test_a_run_converts_once_for_all_rows_of_litert(tmp_path: Path) -> None:
    cases.model("conv_net", tmp_path)
    rows = RowsRequest(backends=("litert",), precisions=("int8", "int8-dynamic"), batches=(2,), duration="smoke")
    source = SourceRequest(f"{tmp_path / 'conv_net_factory.py'}:make")
    found = line.run(LineRequest((source,), DataRequest(data="random:24"), rows, tmp_path / "store"))
    assert [name for name in found.made if name.startswith("litert")].count("litert fp32") == 1
    engines = [a for a in found.built if a.format == "litert"]
    assert {a.precision for a in engines} == {"int8", "int8-dynamic"}  # the FP32 one was not asked for, and has no row
    (shop,) = found.workshops
    assert shop.source is not None
    for engine in engines:
        assert artifacts.load(engine.path).parent == shop.source.sha256
        assert engine.facts["layers"] == {engine.precision: 3}
    assert all(row.status == "ok" for row in found.report.rows)
