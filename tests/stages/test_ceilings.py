"""ceilings: the chains really run in the precision they are named after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploykit import graph
from deploykit.errors import BackendFailed
from deploykit.stages import ceilings


def test_an_integer_chain_computes_what_a_float_one_would(tmp_path: Path) -> None:
    """Small enough to run in both; the quantized one is checked against its own weights in float."""
    ort = pytest.importorskip("onnxruntime")
    path = tmp_path / "chain.onnx"
    graph.save(ceilings.chain(8, 6, 2, integer=True), path)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    x = np.abs(np.random.default_rng(0).normal(size=(1, 8, 6, 6))).astype(np.float32)
    literal = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    integer = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert np.abs(literal).max() > 0
    np.testing.assert_allclose(integer, literal, atol=0.06)


def test_every_precision_has_a_rate_and_the_chain_it_was_found_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = ceilings.engine()
    if name is None:
        pytest.skip("neither openvino nor onnxruntime is installed")
    monkeypatch.setattr(ceilings, "SECONDS", 0.02)
    monkeypatch.setattr(ceilings, "CHAINS", ((16, 8),))
    found = ceilings.convolutions(name, 1, tmp_path)
    assert {"fp32", "int8"} <= set(found)
    assert all(rate > 1e6 and name in said for rate, said in found.values())


def test_a_chain_that_runs_in_another_precision_is_refused(tmp_path: Path) -> None:
    if ceilings.engine() is None:
        pytest.skip("neither openvino nor onnxruntime is installed")
    path = tmp_path / "chain.onnx"
    graph.save(ceilings.chain(16, 8, 1, integer=False), path)
    with pytest.raises(BackendFailed, match="ran fp32 where int8 was asked for"):
        ceilings._fastest(str(ceilings.engine()), path, "int8", 1, 0.01)


def test_memory_has_a_rate_for_each_working_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_BANDWIDTH_S", 0.01)
    monkeypatch.setattr(ceilings, "last_level_bytes", lambda: 2 << 20)
    found = ceilings.memory(1)
    assert set(found) == {256 << 10, 1 << 20, 4 << 20, 8 << 20}
    assert all(1e8 < rate < 1e13 for rate in found.values())
