"""Backends known by name that this version does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.backends import absent
from deploykit.errors import MissingBackend, UnknownName
from deploykit.session import PRECISIONS, BuildRequest, OpenRequest
from deploykit.signature import Signature


def test_is_known_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(absent.BACKENDS, "later", absent.Absent("later", "An Engine"))
    backend = backends.get("later")
    assert backend.name == "later"
    assert "later" not in backends.names()
    assert "not in this version" in str(backend.missing())
    assert all(backend.unsupported(p, "cpu") is not None for p in PRECISIONS)
    nothing = Artifact(tmp_path / "m.onnx", "onnx", "fp32", Signature((), ()), "given")
    with pytest.raises(MissingBackend, match="not in this version"):
        backend.build(nothing, BuildRequest("fp32"), tmp_path)
    with pytest.raises(MissingBackend, match="not in this version"):
        backend.open(nothing, OpenRequest("fp32", 1, 1))


def test_a_name_close_to_one_is_unknown() -> None:
    with pytest.raises(UnknownName, match="did you mean 'executorch'"):
        backends.get("executorc")
