"""The engine on LiteRT's interpreter: pip install ai-edge-litert (or tflite-runtime)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Engine:
    """A .tflite, its tensors allocated for the packaged batch."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter: Any = Interpreter(model_path=str(folder / facts["file"]))
        runner = self._interpreter.get_signature_runner()
        self._inputs, self._outputs = runner.get_input_details(), runner.get_output_details()
        del runner
        for spec in facts["inputs"]:
            if list(self._inputs[spec["name"]]["shape"]) != spec["shape"]:
                self._interpreter.resize_tensor_input(self._inputs[spec["name"]]["index"], spec["shape"])
        self._interpreter.allocate_tensors()

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name; an int8 input is quantized and an int8 output made real with the file's own scales."""
        for name, details in self._inputs.items():
            value = feeds[name]
            if details["dtype"] == np.int8 and value.dtype.kind == "f":
                scale, zero = details["quantization"]
                value = np.clip(np.rint(value / scale) + zero, -128, 127)
            self._interpreter.set_tensor(details["index"], value.astype(details["dtype"]))  # the file may hold int64 as int32
        self._interpreter.invoke()
        found: dict[str, NDArray[Any]] = {}
        for name, details in self._outputs.items():
            value = self._interpreter.get_tensor(details["index"])
            scale, zero = details["quantization"]
            integer = details["dtype"] == np.int8 and scale
            found[name] = (value.astype(np.float32) - zero) * np.float32(scale) if integer else value
        return found
