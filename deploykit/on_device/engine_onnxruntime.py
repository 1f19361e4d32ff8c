"""The engine on ONNX Runtime: pip install onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray


class Engine:
    """An .onnx file, opened on the CPU."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        import onnxruntime as ort

        self._outputs = [spec["name"] for spec in facts["outputs"]]
        self._session = ort.InferenceSession(str(folder / facts["file"]), providers=["CPUExecutionProvider"])

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
