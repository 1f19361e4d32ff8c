"""quantize and run with INT8's switches and with mixed precision on a budget, on a tiny real network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_models
from PIL import Image

pytest.importorskip("onnxruntime")

from deploykit import artifact as artifacts
from deploykit import children, graph
from deploykit.errors import InputError, ModelError
from deploykit.pipeline import line, mixed, mixed_speed, mixed_trials, quantizing, single
from deploykit.pipeline.request import DataRequest, Int8Request, RowsRequest, Silent, SourceRequest
from deploykit.stages.mixed import Budget


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_speed, "DURATION", "smoke")


@pytest.fixture
def net(tmp_path: Path) -> Path:
    tiny_models.conv_net(tmp_path / "net.onnx")
    rng = np.random.default_rng(3)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(36, 3, 8, 8)).astype(np.float32), labels=rng.integers(0, 4, 36))
    return tmp_path / "net.onnx"


def quantize(net: Path, mode: str = "static", layout: str = "cpu", **changes: Any) -> artifacts.Artifact:
    request = DataRequest(**{"data": str(net.parent / "data.npz"), "calib_n": 16, **changes})
    return quantizing.quantize_file(net, mode, layout, net.parent / "out.onnx", request, Silent(), {})


def test_biases_are_corrected_wherever_there_are_samples(net: Path) -> None:
    assert quantize(net).facts["bias_corrected_layers"]
    assert quantize(net, layout="tensorrt").facts["bias_corrected_layers"]
    assert not quantize(net, int8=Int8Request(bias_correct=False)).facts["bias_corrected_layers"]


def test_switches_reach_the_graph(net: Path) -> None:
    made = quantize(net, int8=Int8Request(True, "mse", True, "gptq"))
    assert made.options["weight_scales"] == "mse" and made.options["rounding"] == "gptq" and made.facts["rounded_layers"]
    weights = [t for t in onnx.load(str(made.path)).graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert weights and max(np.abs(onnx.numpy_helper.to_array(t).astype(int)).max() for t in weights) <= 63


def test_correction_needs_samples(net: Path) -> None:
    single.calibrate_file(
        net, DataRequest(str(net.parent / "data.npz"), calib_n=8), net.parent / "calib.json", None, Silent(), {}
    )
    table = net.parent / "calib.json"
    assert not quantize(net, data=None, calib_table=table).facts["bias_corrected_layers"]
    for int8 in (Int8Request(bias_correct=True), Int8Request(rounding="gptq")):
        with pytest.raises(InputError, match="needs calibration samples"):
            quantize(net, data=None, calib_table=table, int8=int8)
    with pytest.raises(InputError, match="no-bias-correct"):
        quantize(net, int8=Int8Request(bias_correct=False, rounding="gptq"))


@pytest.mark.slow
def test_mixed_meets_its_budget_and_goes_on_from_what_it_has(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = quantize(net, "mixed", budget=Budget(min_sqnr_db=1.0))
    found: Any = plain.facts["mixed"]
    assert found["met"] and found["kept_in_float"] == [] and plain.precision == "int8"
    limit = found["tuned"]["sqnr_db"] + 0.5
    made = quantize(net, "mixed", budget=Budget(min_sqnr_db=limit))
    doc: Any = made.facts["mixed"]
    assert made.precision == "mixed" and doc["kept_in_float"] and doc["finished"]
    assert doc["met"] == (doc["judged"]["sqnr_db"] >= limit)
    assert doc["judged"]["n"] == 18 and doc["tuned"]["n"] == 6
    assert doc["speed"]["share_of_int8"] > 0
    assert any("layers in float" in text for text in single.fact_lines(made))
    onnx.checker.check_model(str(made.path), full_check=True)
    assert not [p for p in net.parent.iterdir() if p.name.startswith(".making")]

    def never(*_: object) -> None:
        raise AssertionError("evaluated again")

    notes = json.loads((net.parent / "out.onnx.search.json").read_text())
    monkeypatch.setattr(mixed_trials, "contributions", never)
    again: Any = quantize(net, "mixed", budget=Budget(min_sqnr_db=limit)).facts["mixed"]
    assert again["kept_in_float"] == doc["kept_in_float"] and again["judged"] == doc["judged"]
    assert json.loads((net.parent / "out.onnx.search.json").read_text()) == notes


def test_the_layers_kept_for_tensorrt_are_in_half(net: Path) -> None:
    made = quantize(net, "mixed", layout="tensorrt", budget=Budget(min_sqnr_db=119.0))
    kept = made.facts["mixed"]["kept_in_float"]
    assert kept
    written = onnx.load(str(made.path))
    types = {t.name: t.data_type for t in written.graph.initializer}
    weights = [types[n.input[1]] for n in written.graph.node if n.name in kept]
    assert weights == [onnx.TensorProto.FLOAT16] * len(kept)
    lines = single.fact_lines(made)
    assert any("build-trt GRAPH --int8" in text for text in lines)
    assert any("not measured: the graph is for TensorRT" in text for text in lines)


def test_a_budget_out_of_reach_gives_the_best_and_says_so(net: Path) -> None:
    made = quantize(net, "mixed", budget=Budget(min_sqnr_db=119.0))
    assert not single.budget_met(made)
    assert any("NOT met" in text for text in single.fact_lines(made))
    assert made.path.is_file()


def test_bad_requests(net: Path) -> None:
    with pytest.raises(InputError, match="budget"):
        quantize(net, "mixed")
    with pytest.raises(InputError, match="--mode mixed"):
        quantize(net, "static", budget=Budget(min_sqnr_db=20.0))
    with pytest.raises(InputError, match="data"):
        quantize(net, "mixed", data=None, budget=Budget(min_sqnr_db=20.0))
    quantize(net).path.rename(net.parent / "int8.onnx")
    request = DataRequest(str(net.parent / "data.npz"), budget=Budget(min_sqnr_db=20.0))
    with pytest.raises(ModelError, match="already quantized"):
        quantizing.quantize_file(net.parent / "int8.onnx", "mixed", "cpu", net.parent / "o.onnx", request, Silent(), {})
    assert not (net.parent / "o.onnx").exists()


def test_a_row_of_the_line(net: Path) -> None:
    request = line.LineRequest(
        (SourceRequest(str(net)),),
        DataRequest(str(net.parent / "data.npz"), calib_n=16, budget=Budget(min_sqnr_db=25.0)),
        RowsRequest(("onnxruntime",), ("fp32", "mixed"), (2,), threads=1, duration="smoke"),
        net.parent / "engines",
    )
    row = next(r for r in line.run(request).report.rows if r.precision == "mixed")
    assert row.status == "ok" and row.sqnr_db is not None and row.speedup
    with pytest.raises(InputError, match="budget"):
        line.run(line.LineRequest(request.targets, DataRequest(str(net.parent / "data.npz")), request.rows, net.parent / "other"))


def test_fp16_takes_ranges_and_leaves_what_may_overflow(net: Path) -> None:
    with np.load(net.parent / "data.npz") as given:
        np.savez(net.parent / "large.npz", x=given["x"] * 1e4)
    plain = quantize(net, "fp16", data=None)
    assert not plain.facts["left_in_float"] and plain.options["calibration"] is None
    small: Any = quantize(net, "fp16")
    assert not small.facts["left_in_float"] and small.options["calibration"]
    made: Any = quantize(net, "fp16", data=str(net.parent / "large.npz"))
    assert any("FP16 ends at" in left["reason"] for left in made.facts["left_in_float"])


def test_options_that_would_not_be_used_are_refused(net: Path) -> None:
    with pytest.raises(InputError, match="not for --mode fp16"):
        quantize(net, "fp16", int8=Int8Request(rounding="gptq"))
    with pytest.raises(InputError, match="finds its ranges while"):
        quantize(net, "dynamic")


def test_the_model_is_never_written_over(net: Path) -> None:
    before = net.read_bytes()
    (net.parent / "link.onnx").symlink_to(net)
    for out in (net, net.parent / "link.onnx"):
        with pytest.raises(InputError, match="the model itself"):
            quantizing.quantize_file(net, "dynamic", "cpu", out, DataRequest(), Silent(), {})
    assert net.read_bytes() == before


def test_the_float_parts_of_tensorrts_layout_are_said_to_stay_in_float32(net: Path) -> None:
    assert any("build-trt" in note for note in single.fact_lines(quantize(net, layout="tensorrt")))
    assert not any("build-trt" in note for note in single.fact_lines(quantize(net)))


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"mark": "m"}', '{"mark": "m", "trials": {"": {"n": 3}}}', '{"mark": "m", "trials": {}, "noise": {}}']
)
def test_a_damaged_file_of_trials_is_begun_anew(damage: str, tmp_path: Path) -> None:
    notes = tmp_path / "out.search.json"
    notes.write_text(damage)
    assert mixed._known(notes, "m") == {"mark": "m", "trials": {}}
    good = {"mark": "m", "trials": {"": mixed.Score(3, 20.0).to_json()}, "noise": {}, "cost": {}, "unit": "s"}
    notes.write_text(json.dumps(good))
    assert mixed._known(notes, "m") == good
    assert mixed._known(notes, "other") == {"mark": "other", "trials": {}}


def test_two_mixed_graphs_in_one_folder_each_have_their_own_weights(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 2 GiB weights lie beside the graph (here: always), in a file named after it."""

    def here(_: str, function: Any, *args: Any, **_options: Any) -> Any:
        return function(*args)

    def apart(model: onnx.ModelProto, path: Path) -> tuple[str, ...]:
        data = path.name + ".data"
        onnx.save_model(model, str(path), save_as_external_data=True, location=data, size_threshold=0)
        return (data,)

    monkeypatch.setattr(graph, "save", apart)
    monkeypatch.setattr(children, "run", here)
    monkeypatch.setattr(mixed_speed, "beside", lambda *_: {})
    request = DataRequest(str(net.parent / "data.npz"), calib_n=16, method="minmax", budget=Budget(min_sqnr_db=1.0))
    for name in ("one.onnx", "two.onnx"):
        made = quantizing.quantize_file(net, "mixed", "cpu", net.parent / name, request, Silent(), {})
        assert tuple(made.companions) == (f"{name}.data",) and (net.parent / f"{name}.data").is_file()
    (net.parent / "two.onnx.data").unlink()
    assert artifacts.load(net.parent / "one.onnx").path.is_file()


def test_a_drop_in_top1_needs_labels_in_the_models_order(net: Path) -> None:
    with np.load(net.parent / "data.npz") as given:
        np.savez(net.parent / "bare.npz", x=given["x"])
    for name in "ab":
        (net.parent / "classes" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(ord(name) + i).integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(net.parent / "classes" / name / f"{i}.png")
    budget = Budget(max_drop_pp=0.5)
    for data, fault in (("bare.npz", "needs labels"), ("classes", "which order")):
        request = DataRequest(str(net.parent / data), preprocess="resize=8,crop=8", budget=budget)
        with pytest.raises(InputError, match=fault):
            quantizing.quantize_file(net, "mixed", "cpu", net.parent / "o.onnx", request, Silent(), {})
    assert not list(net.parent.glob("o.onnx*"))
