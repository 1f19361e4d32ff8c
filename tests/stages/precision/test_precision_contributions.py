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
from deploykit.stages.precision import Int8Options, alone_bias, bias, contributions, method_noise, to_int8
from deploykit.stages.precision.int8 import quantized


def ending_in(operator: str, kind: int = TensorProto.INT64, **attributes: int) -> onnx.ModelProto:
    """Two convolutions and that operator, whose output is what the model gives."""
    nodes = [conv("x", "c", "w"), node("Relu", ["c"], ["r"]), conv("r", "d", "v"), node(operator, ["d"], ["y"], **attributes)]
    made = model(nodes[:3], [const("w", 8, 3, 3, 3), const("v", 6, 8, 3, 3)], outputs=("d",))
    made.graph.node.append(nodes[3])
    del made.graph.output[:]
    made.graph.output.append(helper.make_tensor_value_info("y", kind, None))
    return onnx.shape_inference.infer_shapes(made)


@pytest.mark.parametrize("corrected", [True, False])
def test_the_noise_of_float_outputs(tmp_path: Path, corrected: bool) -> None:
    path = saved(residual(), tmp_path)
    found = contributions(path, table_for(path), "cpu", Int8Options(), samples_of(residual()), corrected=corrected)
    assert len(found.noise) == 5 and all(0 < noise < 0.01 for noise in found.noise.values())


def test_what_a_bias_takes_back_is_no_noise(tmp_path: Path) -> None:
    """Weights in 7 bits of inputs that are never negative shift a layer's mean; each alone, and its bias corrected, it loses less."""
    path = saved(residual(), tmp_path)
    options = Int8Options(reduce_range=True)
    plain, level = (
        contributions(path, table_for(path), "cpu", options, samples_of(residual()), corrected=corrected).noise
        for corrected in (False, True)
    )
    assert plain.keys() == level.keys()
    assert sum(level.values()) < sum(plain.values())


def test_the_correction_of_a_layer_alone_is_that_of_the_walk(tmp_path: Path) -> None:
    """With one layer quantized and the others float, both ways to the correction give the same."""
    path = saved(residual(), tmp_path)
    table, samples = table_for(path), samples_of(residual())
    feeds = [dict(batch) for batch, _ in samples.batches(8)]
    found = alone_bias.corrections(path, quantized(path, table, "cpu", Int8Options())[0], "cpu", feeds)
    names = list(found.deltas)
    assert len(names) == 5
    for name in names:
        only = Int8Options(keep_float=tuple(other for other in names if other != name))
        to_int8(path, table, "cpu", tmp_path / "one.onnx", only)
        walked = bias.corrections(path, tmp_path / "one.onnx", samples, layout="cpu", options=only)
        np.testing.assert_allclose(found.gains[name], walked.gains[name], atol=1e-5)
        np.testing.assert_allclose(found.deltas[name], walked.deltas[name], atol=1e-5)


def test_of_classes_the_share_that_changes(tmp_path: Path) -> None:
    made = ending_in("ArgMax", axis=1)
    path = saved(made, tmp_path)
    found = contributions(path, table_for(path), "cpu", Int8Options(), samples_of(made), corrected=True)
    assert len(found.noise) == 2 and all(0 <= share < 0.5 for share in found.noise.values()) and any(found.noise.values())


def test_outputs_that_change_their_shape(tmp_path: Path) -> None:
    made = ending_in("NonZero")
    path = saved(made, tmp_path)
    samples = samples_of(made)
    found = contributions(path, table_for(path), "cpu", Int8Options(), samples, corrected=True)
    assert len(found.noise) == 2 and all(0 <= share <= 1 for share in found.noise.values())


def test_methods_are_not_compared_by_classes(tmp_path: Path) -> None:
    made = ending_in("ArgMax", axis=1)
    path = saved(made, tmp_path)
    tables: dict[str, CalibrationTable] = {"minmax": table_for(path)}
    with pytest.raises(InputError, match="no float output"):
        method_noise(path, tables, "cpu", samples_of(made))
    plain = saved(residual(), tmp_path)
    assert 0 < method_noise(plain, {"minmax": table_for(plain)}, "cpu", samples_of(residual()))["minmax"] < 0.01
