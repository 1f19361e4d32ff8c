"""Where it was lost: layers matched whoever quantized them, ranked, measured alone; each reason both given and withheld."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from quantizable_models import ZOO, const, conv, feeds_for, model, node, residual, run, sqnr_db, table_for

from deploykit import data, qoperator, quantized_layers
from deploykit import graph as graphs
from deploykit.errors import DataError, InputError
from deploykit.layer import Pair
from deploykit.samples import Samples
from deploykit.stages import layers
from deploykit.stages.layers import LayerDrift, LayerReport, reasons
from deploykit.stages.precision import to_fp16, to_int8, to_int8_dynamic


def saved(made: onnx.ModelProto, folder: Path, name: str = "float.onnx") -> Path:
    path = folder / name
    onnx.save(made, str(path))
    return path


def samples_for(path: Path, n: int = 16) -> Samples:
    return data.open(f"random:{n}", graphs.signature(graphs.load(path)))


def int8(path: Path, layout: str = "cpu") -> Path:
    out = path.with_name(f"int8-{layout}.onnx")
    to_int8(path, table_for(path), layout, out)
    return out


def compared(path: Path, other: Path, **options: int | None) -> LayerReport:
    return layers.find(path, other, samples_for(path), 8, 1, **options)


def by_name(report: LayerReport) -> dict[str, LayerDrift]:
    return {row.layer: row for row in report.layers}


def codes(report: LayerReport, layer: str) -> set[str]:
    return {reason.code for reason in by_name(report)[layer].reasons}


def peer(path: Path, *, per_channel: bool = True, operators: bool = False) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    made, out = graphs.load(path), path.with_name("peer.onnx")

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([feeds_for(made, 8, seed) for seed in range(4)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    kind = QuantFormat.QOperator if operators else QuantFormat.QDQ
    quantize_static(str(path), str(out), Reader(), quant_format=kind, per_channel=per_channel)
    return out


def spread_conv(weight_scale: np.ndarray | None = None, *, channels: int = 8) -> onnx.ModelProto:
    """Two convolutions, the first's output channels scaled by `weight_scale`."""
    first = numpy_helper.to_array(const("w", channels, 3, 3, 3)).copy()
    if weight_scale is not None:
        first *= weight_scale.reshape(-1, 1, 1, 1).astype(np.float32)
    nodes = [conv("x", "c", "w"), node("Relu", ["c"], ["r"]), conv("r", "y", "v")]
    return model(nodes, [numpy_helper.from_array(first, "w"), const("v", 4, channels, 3, 3)])


@pytest.mark.parametrize("layout", ["cpu", "tensorrt"])
def test_every_layer_is_found_and_the_last_has_the_output_s_error(tmp_path: Path, layout: str) -> None:
    path = saved(residual(), tmp_path)
    out = int8(path, layout)
    report = compared(path, out)
    assert len(report.layers) == 5
    assert [row.sqnr_db for row in report.layers] == sorted(row.sqnr_db or 0 for row in report.layers)
    samples = samples_for(path)
    wanted, got = [], []
    for feeds, _ in samples.batches(8):
        wanted.append(run(path, dict(feeds))[0])
        got.append(run(out, dict(feeds), literal=True)[0])
    last = next(row for row in report.layers if row.op == "Gemm")
    assert last.sqnr_db == pytest.approx(sqnr_db(np.concatenate(wanted), np.concatenate(got)), abs=0.05)


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"run_time_weights", "old_opset"}))
def test_awkward_graphs_are_compared_layer_by_layer(tmp_path: Path, name: str) -> None:
    path = saved(ZOO[name](), tmp_path)
    report = compared(path, int8(path), most_alone=None)
    quantized = [row for row in report.layers if row.quantized and not row.identical]
    assert quantized
    for row in quantized:
        assert row.sqnr_db is not None and row.sqnr_db > 15
        assert row.own_sqnr_db is not None or row.own_why, row


def test_one_layer_alone_costs_less_than_all_and_together_they_make_most_of_the_error(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    report = compared(path, int8(path), most_alone=None)
    whole = next(row.sqnr_db for row in report.layers if row.op == "Gemm")
    own = [row.own_sqnr_db for row in report.layers]
    assert whole is not None and all(db is not None and db > whole for db in own)
    summed = -10 * np.log10(sum(10 ** (-(db or 0) / 10) for db in own))
    assert whole - 1 < summed < whole + 6  # the additions between the layers have pairs of their own


def test_batch_normalization_in_one_graph_and_folded_in_the_other(tmp_path: Path) -> None:
    path = saved(ZOO["batch_norm"](), tmp_path)
    report = compared(path, int8(path))
    (row,) = report.layers
    assert row.weights_sqnr_db is not None and 35 < row.weights_sqnr_db < 60
    assert row.own_sqnr_db == pytest.approx(row.sqnr_db, abs=0.1)  # the only layer: alone it is all there is


@pytest.mark.parametrize("per_channel", [True, False])
def test_onnx_runtime_s_own_graph_with_its_relu_gone(tmp_path: Path, per_channel: bool) -> None:
    path = saved(residual(), tmp_path)
    out = peer(path, per_channel=per_channel)
    report = compared(path, out, most_alone=None)
    assert len(report.layers) == 5
    assert {row.matched_by for row in report.layers} == {"name"}
    for row in report.layers:
        assert row.sqnr_db is not None and row.sqnr_db > 15
        assert row.own_sqnr_db is not None and row.own_sqnr_db > 20


def test_onnx_runtime_s_operator_form_is_read_as_q_dq(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    out = peer(path, operators=True)
    made, report = graphs.load(out), compared(path, out, most_alone=None)
    other = compared(path, peer(path), most_alone=None)
    assert len(report.layers) == 5
    for row in report.layers:
        assert row.sqnr_db == pytest.approx(by_name(other)[row.layer].sqnr_db, abs=2.0)
        assert row.weights_sqnr_db == pytest.approx(by_name(other)[row.layer].weights_sqnr_db, abs=0.01)
    feeds = feeds_for(made, 4)
    wanted = run(made, feeds)[0]
    assert qoperator.to_qdq(made) == 5
    onnx.checker.check_model(made, full_check=True)
    assert sqnr_db(wanted, run(made, feeds, literal=True)[0]) > 30
    assert qoperator.to_qdq(graphs.load(path)) == 0


def test_renamed_graphs_are_matched_by_place(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    out = int8(path)
    expected = compared(path, out)
    made = onnx.load(str(out))
    keep = {v.name for v in [*made.graph.input, *made.graph.output]}
    for at, found in enumerate(made.graph.node):
        found.name = f"n{at}"
        for names in (found.input, found.output):
            for k, name in enumerate(names):
                names[k] = name if name in keep or not name else f"t_{name}"
    for stored in made.graph.initializer:
        stored.name = f"t_{stored.name}"
    made.graph.ClearField("value_info")
    report = compared(path, saved(made, tmp_path, "renamed.onnx"))
    by = {row.matched_by for row in report.layers}
    assert by == {"name", "position"}  # the output keeps its name
    for row in report.layers:
        assert row.sqnr_db == pytest.approx(by_name(expected)[row.layer].sqnr_db, abs=0.01)
        assert row.own_sqnr_db == pytest.approx(by_name(expected)[row.layer].own_sqnr_db, abs=0.01)


def test_the_same_graph_twice_has_no_error_and_no_reason(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    report = compared(path, path)
    assert all(row.identical and row.sqnr_db is None for row in report.layers)
    assert not any(row.reasons for row in report.layers)
    assert any("no Q/DQ nodes" in note for note in report.notes)


def test_fp16_and_dynamic_graphs_are_ranked_too(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    to_fp16(path, tmp_path / "fp16.onnx")
    report = compared(path, tmp_path / "fp16.onnx")
    assert report.layers and all(row.sqnr_db is None or row.sqnr_db > 50 for row in report.layers)
    to_int8_dynamic(path, tmp_path / "dynamic.onnx")
    report = compared(path, tmp_path / "dynamic.onnx")
    assert report.layers and all(row.own_sqnr_db is None for row in report.layers)


def test_a_quantized_reference_is_said(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    report = compared(int8(path), int8(path, "tensorrt"))
    assert len(report.layers) == 5
    assert any("reference is quantized itself" in note for note in report.notes)
    assert all(row.own_why for row in report.layers)


def test_other_weights_are_not_measured_alone(tmp_path: Path) -> None:
    path = saved(spread_conv(), tmp_path)
    factor = np.linspace(0.5, 2, 8)
    equalized = graphs.load(saved(spread_conv(factor), tmp_path, "equalized.onnx"))
    for stored in equalized.graph.initializer:
        if stored.name == "v":
            stored.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(stored) / factor.reshape(1, -1, 1, 1).astype(np.float32), "v")
            )
    report = compared(path, int8(saved(equalized, tmp_path, "equalized.onnx")))
    assert all("not the reference's" in row.own_why and row.weights_sqnr_db is None for row in report.layers)
    assert by_name(report)["conv_y"].sqnr_db is not None and (by_name(report)["conv_y"].sqnr_db or 0) > 20


def test_how_many_are_measured_alone(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    report = compared(path, int8(path), most_alone=2)
    assert sum(row.own_sqnr_db is not None for row in report.layers) == 2
    assert any(note.startswith("2 of 5 layers") for note in report.notes)


def test_results_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    out, samples = int8(path), samples_for(path)
    one, seven = (layers.find(path, out, samples, batch, 1) for batch in (1, 7))
    for row in one.layers:
        assert row.sqnr_db == pytest.approx(by_name(seven)[row.layer].sqnr_db, abs=1e-3)
        assert {r.code for r in row.reasons} == codes(seven, row.layer)


def test_graphs_of_two_models_are_refused(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    other = saved(ZOO["odd_gemms"](), tmp_path, "other.onnx")
    with pytest.raises(InputError, match="takes"):
        compared(path, other)
    stranger = model([node("Sigmoid", ["x"], ["y"])], [])
    with pytest.raises(InputError, match="in common"):
        compared(path, saved(stranger, tmp_path, "stranger.onnx"))


def test_no_samples_is_an_error(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    with pytest.raises(DataError, match="no samples"):
        layers.find(path, path, samples_for(path).take([], "all"))


# The reasons, each fired by one change and withheld without it.


def rescaled(path: Path, tensor: str, factor: float) -> Path:
    """The Q/DQ graph with the scale of one activation pair multiplied."""
    made = onnx.load(str(path))
    for stored in made.graph.initializer:
        if stored.name == f"{tensor}_scale":
            stored.CopyFrom(
                numpy_helper.from_array((numpy_helper.to_array(stored) * np.float32(factor)).astype(np.float32), stored.name)
            )
    return saved(made, path.parent, f"rescaled-{factor}.onnx")


def test_a_good_int8_graph_gives_no_reason(tmp_path: Path) -> None:
    path = saved(spread_conv(), tmp_path)
    report = compared(path, int8(path))
    assert all(not row.reasons or codes(report, row.layer) <= {"inherited"} for row in report.layers)


@pytest.mark.parametrize(("factor", "code"), [(4.0, "few-levels"), (0.25, "saturation")])
def test_a_range_too_wide_or_too_narrow(tmp_path: Path, factor: float, code: str) -> None:
    path = saved(spread_conv(), tmp_path)
    out = int8(path)
    assert code not in codes(compared(path, out), "conv_c")
    changed = compared(path, rescaled(out, "x", factor))
    assert code in codes(changed, "conv_c")
    assert (by_name(changed)["conv_c"].own_sqnr_db or 0) < (by_name(compared(path, out))["conv_c"].own_sqnr_db or 99) - 3


def outlying(folder: Path, value: float) -> tuple[Path, Path, Samples]:
    path = saved(spread_conv(), folder)
    inputs = np.random.default_rng(0).normal(0, 1, (16, 3, 8, 8)).astype(np.float32)
    inputs[3, 1, 2, 2] = value
    np.savez(folder / "x.npz", x=inputs)
    samples = data.open(str(folder / "x.npz"), graphs.signature(graphs.load(path)))
    from deploykit.stages import calibration

    table = calibration.collect(path, samples)["minmax"]
    to_int8(path, table, "cpu", folder / "int8.onnx")
    return path, folder / "int8.onnx", samples


def test_one_far_value_is_an_outlier(tmp_path: Path) -> None:
    path, out, samples = outlying(tmp_path, 100.0)
    report = layers.find(path, out, samples, 8, 1)
    assert "range-outlier" in codes(report, "conv_c")
    said = next(r.text for r in by_name(report)["conv_c"].reasons if r.code == "range-outlier")
    assert "input" in said and "of 256 levels" in said
    path, out, samples = outlying(tmp_path, 3.0)
    assert "range-outlier" not in codes(layers.find(path, out, samples, 8, 1), "conv_c")


def test_channels_of_unequal_reach_share_one_scale(tmp_path: Path) -> None:
    factor = np.ones(8)
    factor[0] = 60.0
    path = saved(spread_conv(factor), tmp_path)
    assert codes(compared(path, int8(path)), "conv_y") & {"unequal-channels", "range-outlier"}
    path = saved(spread_conv(), tmp_path)
    assert not codes(compared(path, int8(path)), "conv_y") & {"unequal-channels", "range-outlier"}


def test_weights_with_one_scale_for_unequal_channels(tmp_path: Path) -> None:
    factor = np.ones(8)
    factor[0] = 60.0
    path = saved(spread_conv(factor), tmp_path)
    assert "per-tensor-weights" in codes(compared(path, peer(path, per_channel=False)), "conv_c")
    assert "per-tensor-weights" not in codes(compared(path, peer(path)), "conv_c")
    path = saved(spread_conv(), tmp_path)
    assert "per-tensor-weights" not in codes(compared(path, peer(path, per_channel=False)), "conv_c")


def test_channels_without_weights_are_dead(tmp_path: Path) -> None:
    factor = np.ones(8)
    factor[2:4] = 0.0
    path = saved(spread_conv(factor), tmp_path)
    report = compared(path, int8(path))
    assert [r.text for r in by_name(report)["conv_c"].reasons if r.code == "dead-channels"] == [
        "2 of 8 output channels have weights of zero"
    ]
    path = saved(spread_conv(), tmp_path)
    assert "dead-channels" not in codes(compared(path, int8(path)), "conv_c")


def test_error_from_the_layers_before_is_called_so(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    out = rescaled(int8(path), "x", 30.0)  # ruins the first layer only
    report = compared(path, out)
    assert "inherited" in codes(report, "conv_c3")
    assert "inherited" not in codes(report, "conv_c1")
    assert min(report.layers, key=lambda row: row.own_sqnr_db or 99).layer == "conv_c1"


def test_fine_rounding_that_later_layers_enlarge() -> None:
    assert [r.code for r in reasons.of_cost(40.0, 16.0, 15.0)] == ["amplified"]
    assert not reasons.of_cost(40.0, 25.0, 15.0)  # others cost far more
    assert not reasons.of_cost(20.0, 16.0, 15.0)  # its own rounding is coarse
    assert not reasons.of_cost(40.0, None, 15.0)


def test_a_pair_s_reach_and_levels() -> None:
    pair = Pair(np.array(0.5, np.float32), np.array(128, np.uint8), "uint8")
    assert pair.levels == (0, 255)
    assert pair.reach == (-64.0, 63.5)
    assert pair.per_tensor


def test_a_weight_quantized_by_nodes_is_read_as_it_runs(tmp_path: Path) -> None:
    """Q and DQ on a float initializer (NNCF, ModelOpt, torch's exporter), along axis 0."""
    weight = numpy_helper.to_array(const("w", 4, 3, 3, 3))
    scale = numpy_helper.from_array(np.abs(weight).max(axis=(1, 2, 3)) / 127, "s")
    zero = numpy_helper.from_array(np.zeros(4, np.int8), "z")
    nodes = [
        node("QuantizeLinear", ["w", "s", "z"], ["wq"], axis=0),
        node("DequantizeLinear", ["wq", "s", "z"], ["wd"], axis=0),
        conv("x", "y", "wd"),
    ]
    made = model(nodes, [const("w", 4, 3, 3, 3), scale, zero])
    (layer,) = quantized_layers.load(saved(made, tmp_path)).layers
    probe = helper.make_model(
        helper.make_graph(
            made.graph.node[:2], "g", [], [helper.make_empty_tensor_value_info("wd")], list(made.graph.initializer)
        ),
        opset_imports=list(made.opset_import),
        ir_version=10,
    )
    assert layer.weight_pair is not None and layer.weight is not None
    np.testing.assert_allclose(layer.weight, run(probe, {})[0], rtol=1e-6)


def test_results_that_are_not_finite_come_first(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    made = graphs.load(int8(path))
    scale = next(n for n in made.graph.node if n.op_type == "DequantizeLinear" and n.output[0].startswith("w5")).input[1]
    for stored in made.graph.initializer:
        if stored.name == scale:
            stored.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(stored), np.inf), scale))
    report = compared(path, saved(made, tmp_path, "endless.onnx"))
    first = report.layers[0]
    assert first.sqnr_db is None and not first.identical
    assert "not-finite" in {reason.code for reason in first.reasons}
    assert report.layers[-1].sqnr_db is not None
