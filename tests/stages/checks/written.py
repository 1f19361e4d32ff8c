"""Models written in ONNX's text form, for the tests of the graph checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from deploykit.stages.checks import find
from deploykit.verdict import Finding


def write(path: Path, text: str, *, opset: int = 18, **stored: np.ndarray) -> Path:
    """Saves `text` (a graph in ONNX's text form) with the arrays in `stored` as initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "com.acme": 1, "com.microsoft": 1]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items())
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type.lower()}{index}"
    path.write_bytes(model.SerializeToString())
    return path


def by_code(path: Path, *targets: str) -> dict[str, Finding]:
    """The findings of a model by code; a code given for two targets keeps the first."""
    found: dict[str, Finding] = {}
    for finding in find(path, targets):
        found.setdefault(finding.code, finding)
    return found
