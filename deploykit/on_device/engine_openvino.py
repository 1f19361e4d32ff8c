"""The engine on OpenVINO: pip install openvino."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Engine:
    """An IR, compiled for the CPU at the packaged batch, with the arithmetic it was measured with."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        import openvino as ov

        model = ov.Core().read_model(str(folder / facts["file"]))
        model.reshape({spec["name"]: spec["shape"] for spec in facts["inputs"]})
        hint = "bf16" if facts["precision"] == "bf16" else "f32"
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        self._outputs = [spec["name"] for spec in facts["outputs"]]
        self._compiled = ov.Core().compile_model(model, "CPU", config)

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        found = self._compiled(feeds)
        return {name: np.array(found[name]) for name in self._outputs}
