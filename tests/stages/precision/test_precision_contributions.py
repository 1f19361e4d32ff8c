"""What each layer costs alone: of float outputs noise, of integers how many change; outputs of changing shape are no crash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from quantizable_models import const, conv, model, node, residual, table_for
from test_precision_bias import samples_of, saved

from deploykit.calibration_table import CalibrationTable
from deploykit.errors import InputError
from deploykit.stages.precision import Int8Options, contributions, method_noise
from deploykit.stages.precision.contributions import _Lost


def ending_in(operator: str, kind: int = TensorProto.INT64, **attributes: int) -> onnx.ModelProto:
    """Two convolutions and that operator, whose output is what the model gives."""
    nodes = [conv("x", "c", "w"), node("Relu", ["c"], ["r"]), conv("r", "d", "v"), node(operator, ["d"], ["y"], **attributes)]
    made = model(nodes[:3], [const("w", 8, 3, 3, 3), const("v", 6, 8, 3, 3)], outputs=("d",))
    made.graph.node.append(nodes[3])
    del made.graph.output[:]
    made.graph.output.append(helper.make_tensor_value_info("y", kind, None))
    return onnx.shape_inference.infer_shapes(made)


@pytest.mark.parametrize("centred", [True, False])
def test_the_noise_of_float_outputs(tmp_path: Path, centred: bool) -> None:
    path = saved(residual(), tmp_path)
    found = contributions(path, table_for(path), "cpu", Int8Options(), samples_of(residual()), centred=centred)
    assert len(found.noise) == 5 and all(0 < noise < 0.01 for noise in found.noise.values())


def test_what_all_samples_have_in_common_is_left_out_batch_by_batch() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(12, 5)).astype(np.float32)
    found = wanted + 3.0 + 0.1 * rng.normal(size=(12, 5)).astype(np.float32)
    lost = _Lost(floats=True, centred=True)
    for start in (0, 8):
        lost.see(found[start : start + 8], wanted[start : start + 8])
    error = (found - wanted).astype(np.float64)
    assert lost.total == pytest.approx(np.square(error - error.mean(axis=0)).sum(), rel=1e-3)


def test_of_classes_the_share_that_changes(tmp_path: Path) -> None:
    made = ending_in("ArgMax", axis=1)
    path = saved(made, tmp_path)
    found = contributions(path, table_for(path), "cpu", Int8Options(), samples_of(made), centred=True)
    assert len(found.noise) == 2 and all(0 <= share < 0.5 for share in found.noise.values()) and any(found.noise.values())


def test_outputs_that_change_their_shape(tmp_path: Path) -> None:
    made = ending_in("NonZero")
    path = saved(made, tmp_path)
    samples = samples_of(made)
    found = contributions(path, table_for(path), "cpu", Int8Options(), samples, centred=True)
    assert len(found.noise) == 2 and all(0 <= share <= 1 for share in found.noise.values())


def test_methods_are_not_compared_by_classes(tmp_path: Path) -> None:
    made = ending_in("ArgMax", axis=1)
    path = saved(made, tmp_path)
    tables: dict[str, CalibrationTable] = {"minmax": table_for(path)}
    with pytest.raises(InputError, match="no float output"):
        method_noise(path, tables, "cpu", samples_of(made))
    plain = saved(residual(), tmp_path)
    assert 0 < method_noise(plain, {"minmax": table_for(plain)}, "cpu", samples_of(residual()))["minmax"] < 0.01
