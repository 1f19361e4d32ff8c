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
from deploykit.stages.precision.int8 import planned, quantized
from deploykit.stages.precision.options import Int8Options
from deploykit.stages.precision.walk import open_session

if TYPE_CHECKING:
    from deploykit.calibration_table import CalibrationTable

_BATCH = 8


@dataclass(frozen=True)
class Contributions:
    """By node name: noise power / signal power over all float outputs with that node alone in INT8; and its first output."""

    noise: dict[str, float]
    outputs: dict[str, str]


def contributions(
    path: Path, table: CalibrationTable, layout: str, options: Int8Options, samples: Samples, *, centred: bool
) -> Contributions:
    """The contribution of every layer that `to_int8` would quantize, over these samples (a handful is enough to rank).

    centred: what shifts all samples alike is left out of the noise, since bias correction takes it away. The graphs run
    literally. Raises as `to_int8` does.
    """
    graph, names = planned(path, table, layout, options)
    outputs = {node.name: node.output[0] for node in graph.nodes if node.name in set(names)}
    feeds = [dict(batch) for batch, _ in samples.batches(graphs.signature(graph.model).fixed_batch or _BATCH, pad=True)]
    graph.write_back(graph.nodes)
    wanted = run_floats(graph.model, feeds)
    signal = sum(float(np.square(value).sum()) for value in wanted)
    noise: dict[str, float] = {}
    for step, name in enumerate(names):
        report_progress("each layer alone", step / len(names))
        others = tuple(sorted({*options.keep_float, *(other for other in names if other != name)}))
        alone = Int8Options(options.reduce_range, options.weight_scales, others)
        model, _ = quantized(path, table, layout, alone)
        found = run_floats(model, feeds)
        noise[name] = sum((centred_power(a - b) if centred else _power(a - b)) for a, b in zip(found, wanted, strict=True)) / max(
            signal, 1e-30
        )
    return Contributions(noise, outputs)


def _power(error: NDArray[Any]) -> float:
    return float(np.square(error).sum())


def centred_power(error: NDArray[Any]) -> float:
    """The power of an error [samples, ...] without what all samples have in common."""
    if error.ndim > 1 and error.shape[0] > 1:
        error = error - error.mean(axis=0, keepdims=True)
    return _power(error)


def run_floats(model: Any, feeds: list[dict[str, NDArray[Any]]]) -> list[NDArray[np.float64]]:
    """Every float output over all batches, samples along axis 0."""
    session = open_session(model, None)
    names = [value.name for value in session.get_outputs() if "float" in value.type]
    parts = [session.run(names, batch) for batch in feeds]
    return [np.concatenate([np.atleast_1d(p[i]) for p in parts]).astype(np.float64) for i in range(len(names))]
