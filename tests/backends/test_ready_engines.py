"""A finished engine is refused only where its runtime is missing, not where its builder is."""

from __future__ import annotations

import pytest

from deploykit import backends
from deploykit.backends import installed


def test_litert_runs_without_its_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    litert = backends.get("litert")
    monkeypatch.setattr(installed, "has_module", lambda name: name == "ai_edge_litert")
    assert "litert_torch" in str(litert.missing())
    assert litert.cannot_run() is None
    monkeypatch.setattr(installed, "has_module", lambda name: name != "ai_edge_litert")
    assert "ai_edge_litert" in str(litert.cannot_run())


@pytest.mark.parametrize("name", ["torch", "torch-compile", "onnxruntime", "openvino", "executorch", "litert", "tvm"])
def test_no_runtime_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "has_module", lambda _: False)
    cannot = backends.get(name).cannot_run()
    assert cannot is not None and "pip install" in cannot.remedy
