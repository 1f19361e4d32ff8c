"""The calibration method that serves a model best: the one whose INT8 graph stays closest to the float model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit import graph as graphs
from deploykit.children import report_progress
from deploykit.samples import Samples
from deploykit.stages.precision import normal_form
from deploykit.stages.precision.contributions import centred_power, run_floats
from deploykit.stages.precision.int8 import quantized
from deploykit.stages.precision.options import Int8Options

if TYPE_CHECKING:
    from deploykit.calibration_table import CalibrationTable

JUDGED_ON = 32
_BATCH = 8
_DEFAULT = Int8Options()


def noise(
    path: Path,
    tables: Mapping[str, CalibrationTable],
    layout: str,
    samples: Samples,
    options: Int8Options = _DEFAULT,
    *,
    limit: int = JUDGED_ON,
) -> dict[str, float]:
    """For each table the noise power / signal power of its INT8 graph's outputs, on the last `limit` of the samples.

    What shifts all samples alike is left out: bias correction takes it away (without correction the order of the methods on
    EfficientNet-Lite0 is another one). The graphs run literally. Raises as `to_int8` does.
    """
    graph, _ = normal_form.load(path)
    graph.write_back(graph.nodes)
    chosen = samples.take(range(max(len(samples) - limit, 0), len(samples)), samples.role)
    feeds = [dict(batch) for batch, _ in chosen.batches(graphs.signature(graph.model).fixed_batch or _BATCH, pad=True)]
    wanted = run_floats(graph.model, feeds)
    signal = sum(float(np.square(value).sum()) for value in wanted)
    found = {}
    for step, (method, table) in enumerate(tables.items()):
        report_progress("choosing the calibration method", step / len(tables))
        model, _ = quantized(path, table, layout, options)
        outputs = run_floats(model, feeds)
        power = sum(centred_power(a - b) for a, b in zip(outputs, wanted, strict=True))
        found[method] = power / max(signal, 1e-30)
    return found
