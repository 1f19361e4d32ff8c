"""The checks before the parser say what the builder then does: refuses, runs in float without a word, or builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt_graphs import artifact, attempt_unguarded, qdq_conv

from deploykit import backends, children
from deploykit.errors import BackendFailed
from deploykit.session import BuildRequest
from deploykit.stages.checks import api as checks

BACKEND = backends.get("tensorrt-rtx")
pytestmark = pytest.mark.skipif(BACKEND.missing() is not None, reason=str(BACKEND.missing()))
SILENTLY_FLOAT = {"DK110", "DK111", "DK116"}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, "builds"),
        ({"zero_point": 3}, "refused"),
        ({"zero_point": 128, "zero_dtype": np.uint8}, "refused"),
        ({"zero_dtype": np.uint8}, "refused"),
        ({"scale": 0.0}, "refused"),
        ({"computed_scale": True}, "refused"),
        ({"activation": "Det"}, "refused"),
        ({"axis": 1}, "float"),
        ({"weight_dq": False}, "float"),
        ({"scale_through": "Identity"}, "builds"),
        ({"scale_through": "Cast"}, "builds"),
        ({"moved": "MaxPool"}, "builds"),
        ({"moved": "Identity"}, "builds"),
        ({"moved": "Cast"}, "float"),
        ({"moved": "Cast", "weight_dq": False}, "float"),
        ({"moved": "Relu"}, "float"),
    ],
)
def test_checks_and_builder_agree(tmp_path: Path, how: dict[str, Any], expected: str) -> None:
    path = qdq_conv(tmp_path / "m.onnx", **how)
    found = checks.find(path, ("tensorrt-rtx",))
    errors = [f for f in found if f.severity == "error"]
    warned = SILENTLY_FLOAT & {f.code for f in found}
    request = BuildRequest("int8", "sm89", (1,), options={"verify_rebuild": False})
    if expected == "refused":
        assert errors
        with pytest.raises(BackendFailed):
            BACKEND.build(artifact(path, "int8"), request, tmp_path)
        return
    assert errors == []
    made = BACKEND.build(artifact(path, "int8"), request, tmp_path)
    assert made.facts["requested"]["Conv"] == {"Int8": 1}
    assert bool(made.facts["fell_back"]) == (expected == "float") == bool(warned)


@pytest.mark.slow
def test_what_we_refuse_before_the_parser_would_have_crashed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    path = qdq_conv(tmp_path / "m.onnx", computed_scale=True)
    with pytest.raises(BackendFailed, match="SIGSEGV"):
        children.run("attempt", attempt_unguarded, path, timeout_s=120.0)
