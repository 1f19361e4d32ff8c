"""What is learnt on samples about a quantized model, and how it goes back into the graph: into biases and weight scales."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import StaleCalibration
from deploykit.graph import attribute
from deploykit.stages.precision.view import FloatGraph, set_attribute, tensor

Rounded = tuple[NDArray[np.int8], NDArray[np.float32]]


@dataclass(frozen=True)
class Corrections:
    """For the model of that digest and one layout, by node name, a value for each output channel [channels].

    gains: what to multiply a node's result by, through the scales of its weights and its bias; deltas: what to add to it then, through
    its bias. integers: weights rounded other than to the nearest, and the scale of each channel that they belong to, before its gain.
    """

    model_sha256: str
    layout: str
    deltas: dict[str, NDArray[np.float32]]
    n: int = 0
    integers: dict[str, Rounded] = field(default_factory=dict)
    gains: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 over everything here."""
        digest = hashlib.sha256(f"{self.model_sha256} {self.layout}".encode())
        for name, values in sorted(self.deltas.items()):
            digest.update(name.encode() + b"\0" + values.tobytes())
        for name, (integers, scale) in sorted(self.integers.items()):
            digest.update(name.encode() + b"\1" + integers.tobytes() + scale.tobytes())
        for name, values in sorted(self.gains.items()):
            digest.update(name.encode() + b"\2" + values.tobytes())
        return digest.hexdigest()

    def apply(self, graph: FloatGraph, chosen: Iterable[int]) -> int:
        """Corrects the biases of those nodes, in place, where they have corrections: bias * gain + delta; a node without a bias gets
        one. The gains of the weights are the quantizer's part. Returns how many nodes got theirs."""
        count = 0
        for i in chosen:
            node = graph.nodes[i]
            delta = self.deltas.get(node.name)
            if delta is None:
                continue
            count += 1
            old = node.input[2] if len(node.input) > 2 else ""
            values = graph.array(old).reshape(-1) if old else np.zeros(1, np.float32)
            if node.op_type == "Gemm" and (beta := attribute(node, "beta", 1.0)) != 1.0:
                values = values * np.float32(beta)  # else it would scale the correction too
                set_attribute(node, "beta", 1.0)
            gain = self.gains.get(node.name, np.ones(1, np.float32))
            name = graph.fresh(f"{node.name}_corrected_bias")
            graph.constants[name] = tensor(name, (values * gain + delta).astype(np.float32))
            graph.elem_types[name], graph.shapes[name] = 1, (delta.size,)
            del node.input[2:]
            node.input.append(name)
        graph.index()
        return count

    def require_match(self, model_sha256: str, layout: str) -> None:
        """Raises StaleCalibration unless the corrections were made for that model and layout."""
        if (self.model_sha256, self.layout) != (model_sha256, layout):
            raise StaleCalibration(
                f"corrections were made for model {self.model_sha256[:12]}... in layout '{self.layout}', "
                f"not {model_sha256[:12]}... in '{layout}'",
                "rerun with --recalibrate",
            )
