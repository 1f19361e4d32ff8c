"""The engine on Apache TVM's virtual machine: pip install apache-tvm, of the release that compiled it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Engine:
    """A library compiled for one kind of CPU."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        import tvm
        from tvm import relax

        self._inputs = [spec["name"] for spec in facts["inputs"]]
        self._outputs = [spec["name"] for spec in facts["outputs"]]
        self._machine: Any = relax.VirtualMachine(tvm.runtime.load_module(str(folder / facts["file"])), tvm.cpu())

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        import tvm

        found = self._machine["main"](*(tvm.runtime.tensor(np.ascontiguousarray(feeds[name])) for name in self._inputs))
        values = [found] if hasattr(found, "numpy") else list(found)
        return {name: np.array(value.numpy()) for name, value in zip(self._outputs, values, strict=True)}
