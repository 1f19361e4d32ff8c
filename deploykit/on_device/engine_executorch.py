"""The engine on ExecuTorch's runtime: pip install executorch (its release fits one of torch's)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Engine:
    """A .pte, opened; inputs and outputs are known to it by position only."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        from executorch.runtime import Runtime

        self._inputs = [spec["name"] for spec in facts["inputs"]]
        self._outputs = facts["outputs"]
        self._program = Runtime.get().load_program(folder / facts["file"])
        self._method: Any = self._program.load_method("forward")

    def infer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        import torch

        found = self._method.execute([torch.from_numpy(np.array(feeds[name])) for name in self._inputs])
        return {spec["name"]: np.array(t.numpy()) for spec, t in zip(self._outputs, found, strict=True)}
