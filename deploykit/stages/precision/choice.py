"""The calibration method that serves a model best: the one whose INT8 graph stays closest to the float model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit import graph as graphs
from deploykit.children import report_progress
from deploykit.errors import InputError
from deploykit.samples import Samples
from deploykit.stages.precision import normal_form
from deploykit.stages.precision.bias import NothingToCorrect, bias_correct
from deploykit.stages.precision.contributions import power, readable
from deploykit.stages.precision.int8 import quantized
from deploykit.stages.precision.options import Int8Options
from deploykit.stages.precision.walk import open_session

if TYPE_CHECKING:
    import onnx

    from deploykit.calibration_table import CalibrationTable

JUDGED_ON = 32
CORRECTED_ON = 16
_BATCH = 8
_DEFAULT = Int8Options()


def noise(
    path: Path, tables: Mapping[str, CalibrationTable], layout: str, samples: Samples, options: Int8Options = _DEFAULT
) -> dict[str, float]:
    """For each table the noise power / signal power of its INT8 graph's outputs, on the last JUDGED_ON of the samples, the graph
    run literally.

    Biases are corrected on the first CORRECTED_ON samples: without, the methods come in another order (EfficientNet-Lite0: mse
    before percentile, 18.2 and 17.8 dB, and with their biases alone corrected 21.6 and 23.0). Raises as `to_int8` does, and InputError where no
    output is a float, or one changes its shape (boxes that are kept or dropped).
    """
    graph, _ = normal_form.load(path)
    graph.write_back(graph.nodes)
    judge = samples.take(range(max(len(samples) - JUDGED_ON, 0), len(samples)), samples.role)
    few = samples.take(range(min(CORRECTED_ON, len(samples))), samples.role)
    feeds = [dict(batch) for batch, _ in judge.batches(graphs.signature(graph.model).fixed_batch or _BATCH, pad=True)]
    base = open_session(graph.model, None)
    names, floats = readable(base)
    if not floats:
        raise InputError(f"{path.name} has no float output to measure noise in", "name a method: --method minmax")
    found = {}
    for step, (method, table) in enumerate(tables.items()):
        report_progress("choosing the calibration method", step / len(tables))
        session = open_session(_corrected(path, table, layout, few, options), None)
        lost = signal = 0.0
        for batch in feeds:  # the float model anew for each: outputs of all samples may not fit into memory
            for value, wanted in zip(session.run(names, batch), base.run(names, batch), strict=True):
                if value.shape != wanted.shape:
                    raise InputError(
                        f"outputs of {path.name} change their shape with its precision", "name a method: --method minmax"
                    )
                lost, signal = lost + power(value - wanted), signal + power(wanted)
        found[method] = lost / max(signal, 1e-30)
    return found


def _corrected(path: Path, table: CalibrationTable, layout: str, samples: Samples, options: Int8Options) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory(prefix="deploykit-choice-") as folder:
        try:
            return graphs.load(bias_correct(path, table, layout, samples, Path(folder) / "int8.onnx", options).path)
        except NothingToCorrect:
            return quantized(path, table, layout, options)[0]
