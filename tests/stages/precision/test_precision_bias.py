"""Bias correction: mean outputs come back to the float model's, layer by layer, and only for the model it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from quantizable_models import ZOO, const, feeds_for, model, node, residual, run, table_for

from deploykit import graph as graphs
from deploykit.calibration_table import Range
from deploykit.errors import InputError, StaleCalibration
from deploykit.samples import Samples
from deploykit.signature import Outputs
from deploykit.stages.precision import Int8Options, bias, bias_correct, to_int8


@dataclass
class Arrays:
    """Samples held in memory; a constant input is the same for all."""

    values: Outputs
    constant: tuple[str, ...]

    def read(self, indices: Sequence[int]) -> Outputs:
        return {k: v if k in self.constant else v[list(indices)] for k, v in self.values.items()}


def samples_of(made: onnx.ModelProto, n: int = 16) -> Samples:
    signature = graphs.signature(made)
    constant = tuple(s.name for s in signature.inputs if signature.batch_axis(s) is None)
    return Samples("random", "c" * 64, Arrays(feeds_for(made, n, 0), constant), signature, None, tuple(range(n)))


def saved(made: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "float.onnx"
    onnx.save(made, str(path))
    return path


def clipping(table):  # type: ignore[no-untyped-def]
    """The table with its input ranges cut in half: what clips shifts the means."""
    cut = {name: Range(r.low / 2, r.high / 4) for name, r in table.ranges.items()}
    return replace(table, ranges=cut)


@pytest.mark.parametrize("layout", ["cpu", "tensorrt"])
def test_the_mean_output_comes_back(tmp_path: Path, layout: str) -> None:
    made = residual()
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    table, samples = clipping(table_for(path)), samples_of(made)
    feeds = samples.reader.read(range(16))
    wanted = run(made, feeds)[0].mean(axis=0)
    shift = {}
    for kind in ("plain", "corrected"):
        if kind == "plain":
            artifact = to_int8(path, table, layout, out)
        else:
            artifact = bias_correct(path, table, layout, samples, out)
            assert artifact.facts["bias_corrected_layers"] == 5
            assert artifact.options["bias_correction"]
        shift[kind] = float(np.abs(run(out, feeds, literal=True)[0].mean(axis=0) - wanted).max())
        onnx.checker.check_model(str(out), full_check=True)
    assert shift["corrected"] < 0.1 * shift["plain"]


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("odd_gemms", "run_time_weights", "attention")])
def test_awkward_graphs_can_be_corrected(tmp_path: Path, name: str) -> None:
    made = ZOO[name]()
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    assert bias_correct(path, table_for(path), "tensorrt", samples_of(made), out).facts["bias_corrected_layers"] >= 1
    run(out, feeds_for(made, 3))


def test_a_model_of_matrix_products_without_biases_says_so(tmp_path: Path) -> None:
    made = ZOO["attention"]()
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    with pytest.raises(InputError, match="could be corrected"):
        bias_correct(path, table_for(path), "tensorrt", samples_of(made), out)


def test_fp16_rest_takes_the_corrections(tmp_path: Path) -> None:
    made = residual()
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    artifact = bias_correct(path, clipping(table_for(path)), "tensorrt", samples_of(made), out, rest="fp16")
    assert artifact.facts["bias_corrected_layers"] == 5
    assert artifact.options["rest"] == "fp16"
    with pytest.raises(InputError, match="layout 'cpu'"):
        bias_correct(path, table_for(path), "cpu", samples_of(made), out, rest="fp16")


def test_corrections_are_refused_for_another_layout(tmp_path: Path) -> None:
    made = residual()
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    table = table_for(path)
    to_int8(path, table, "cpu", out)
    found = bias.corrections(path, out, samples_of(made), layout="cpu", limit=8)
    assert found.n == 8
    to_int8(path, table, "cpu", out, corrections=found)
    with pytest.raises(StaleCalibration, match="layout"):
        to_int8(path, table, "tensorrt", out, corrections=found)


def test_a_layer_kept_in_float_is_not_corrected(tmp_path: Path) -> None:
    made = residual()
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    options = Int8Options(keep_float=("conv_c1",))
    assert bias_correct(path, table_for(path), "cpu", samples_of(made), out, options).facts["bias_corrected_layers"] == 4


def test_no_samples_is_an_error(tmp_path: Path) -> None:
    made = model([node("Gemm", ["x", "w"], ["y"])], [ZOO["shared_weights"]().graph.initializer[0]], {"x": ["batch", 6]})
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    empty = samples_of(made).take((), "calibrate")
    with pytest.raises(InputError, match="needs calibration samples"):
        bias_correct(path, table_for(path), "cpu", empty, out)


def test_a_graph_with_a_fixed_batch_is_corrected_on_whole_batches(tmp_path: Path) -> None:
    made = residual()
    samples = samples_of(made, 6)
    for value in [*made.graph.input, *made.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 4
    path, samples = saved(made, tmp_path), replace(samples, signature=graphs.signature(made))
    found = bias_correct(path, table_for(path, batch=4), "cpu", samples, tmp_path / "fixed.onnx")
    assert found.signature.fixed_batch == 4


@pytest.mark.parametrize("layout", ["cpu", "tensorrt"])
def test_a_gemm_s_beta_does_not_scale_its_correction(tmp_path: Path, layout: str) -> None:
    nodes = [node("Gemm", ["x", "w", "c"], ["y"], beta=0.25, name="first")]
    made = model(nodes, [const("w", 6, 5), const("c", 5)], {"x": ["batch", 6]})
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    table, samples = clipping(table_for(path)), samples_of(made, 64)
    feeds = samples.reader.read(range(64))
    wanted = run(made, feeds)[0].mean(axis=0)
    to_int8(path, table, layout, out)
    plain = float(np.abs(run(out, feeds, literal=True)[0].mean(axis=0) - wanted).max())
    assert bias_correct(path, table, layout, samples, out).facts["bias_corrected_layers"] == 1
    assert float(np.abs(run(out, feeds, literal=True)[0].mean(axis=0) - wanted).max()) < 0.1 * plain


def test_a_gemm_that_adds_a_matrix_takes_no_correction(tmp_path: Path) -> None:
    nodes = [node("Gemm", ["x", "w", "m"], ["a"], name="matrix"), node("Gemm", ["a", "v", "c"], ["y"], name="row")]
    made = model(nodes, [const("w", 6, 5), const("m", 4, 5), const("v", 5, 3), const("c", 3)], {"x": [4, 6]})
    path = saved(made, tmp_path)
    samples = Samples("random", "c" * 64, Arrays(feeds_for(made, 4, 0), ()), graphs.signature(made), None, tuple(range(4)))
    found = bias_correct(path, table_for(path, batch=4), "tensorrt", samples, tmp_path / "int8.onnx")
    assert found.facts["bias_corrected_layers"] == 1 and found.facts["quantized_layers"] == 2


def test_a_convolution_of_unknown_shape_is_corrected(tmp_path: Path) -> None:
    """Behind an operator that shape inference knows nothing of, a convolution's rank is its weight's."""
    made = residual()
    path, out = saved(made, tmp_path), tmp_path / "int8.onnx"
    table, samples = table_for(path), samples_of(made)
    to_int8(path, table, "cpu", out)
    whole = bias.corrections(path, out, samples, layout="cpu")
    graph, _ = bias.normal_form.load(path)
    graph.shapes.clear()
    wanted = bias.correctable(graph, graphs.load(out))
    feeds = [dict(batch) for batch, _ in samples.batches(8)]
    moments = bias.float_moments(graph, wanted, feeds, 1)
    assert {name: value.mean.shape for name, value in moments.items()} == {n: d.shape for n, d in whole.deltas.items()}
