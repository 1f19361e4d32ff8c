"""What each layer brings into the output's error, quantized alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit import graph as graphs
from deploykit.children import report_progress
from deploykit.samples import Samples
from deploykit.stages.precision import alone_bias
from deploykit.stages.precision.int8 import planned, quantized
from deploykit.stages.precision.options import Int8Options
from deploykit.stages.precision.walk import open_session

if TYPE_CHECKING:
    from deploykit.calibration_table import CalibrationTable

_BATCH = 8


@dataclass(frozen=True)
class Contributions:
    """By node name: noise power / signal power over all float outputs with that node alone in INT8 (where a model has no float
    output, the share of values that changed); and its first output."""

    noise: dict[str, float]
    outputs: dict[str, str]


def contributions(
    path: Path, table: CalibrationTable, layout: str, options: Int8Options, samples: Samples, *, corrected: bool
) -> Contributions:
    """The contribution of every layer that `to_int8` would quantize, over these samples (a handful is enough to rank).

    corrected: each layer corrected on these samples. Without, the layers of a graph that will be corrected come in
    another order: EfficientNet-Lite0's first depthwise layer made 42 % of all noise, most of which its bias takes back. The graphs
    run literally. Raises as `to_int8` does.
    """
    graph, names = planned(path, table, layout, options)
    outputs = {node.name: node.output[0] for node in graph.nodes if node.name in set(names)}
    feeds = [dict(batch) for batch, _ in samples.batches(graphs.signature(graph.model).fixed_batch or _BATCH, pad=True)]
    graph.write_back(graph.nodes)
    base = open_session(graph.model, None)
    read, floats = readable(base)
    wanted = [base.run(read, batch) for batch in feeds]
    signal = sum(power(value) if floats else float(value.size) for part in wanted for value in part)
    whole = quantized(path, table, layout, options)[0] if corrected else None
    learnt = (
        alone_bias.corrections(path, whole, layout, feeds, scale_correct=options.scale_correct) if whole is not None else None
    )
    noise: dict[str, float] = {}
    for step, name in enumerate(names):
        report_progress("each layer alone", step / len(names))
        others = tuple(sorted({*options.keep_float, *(other for other in names if other != name)}))
        alone = Int8Options(options.reduce_range, options.weight_scales, others)
        session = open_session(quantized(path, table, layout, alone, learnt)[0], None)
        lost = [_Lost(floats) for _ in read]
        for batch, part in zip(feeds, wanted, strict=True):
            for sums, found, value in zip(lost, session.run(read, batch), part, strict=True):
                sums.see(found, value)
        noise[name] = sum(sums.total for sums in lost) / max(signal, 1e-30)
    return Contributions(noise, outputs)


@dataclass
class _Lost:
    """What one output has lost: the power of its error; of integers how many values changed; all there is where the shape changed
    (another number of boxes)."""

    floats: bool
    total: float = 0.0

    def see(self, found: NDArray[Any], wanted: NDArray[Any]) -> None:
        """Takes in one batch."""
        if found.shape != wanted.shape:
            self.total += power(wanted) if self.floats else float(wanted.size)
        elif not self.floats:
            self.total += float((found != wanted).sum())
        else:
            self.total += power(found - wanted)


def power(values: NDArray[Any]) -> float:
    """The sum of squares."""
    flat = (values.astype(np.float32) if values.dtype == np.float16 else values).reshape(-1)
    return float(np.dot(flat, flat))


def readable(session: Any) -> tuple[list[str], bool]:
    """The names of every float output of a session, and True; where there is none, of every output, and False."""
    known = session.get_outputs()
    names = [value.name for value in known if "float" in value.type or "double" in value.type]
    return (names, True) if names else ([value.name for value in known], False)
