"""Graphs that are no image classifiers: every row runs or says why it does not, and the others go on."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.artifact import Artifact
from deploykit.backends.openvino_cpu import _really
from deploykit.drift import Drift
from deploykit.errors import DataError, MissingBackend, NotForThisGraph
from deploykit.measurement import Measurement, Window
from deploykit.pipeline import assemble, prepare, single
from deploykit.pipeline.measuring import Results, engine_id
from deploykit.pipeline.plan import PlannedRow
from deploykit.pipeline.request import RowsRequest, Silent, SourceRequest
from deploykit.pipeline.workshop import Workshop
from deploykit.report_document import row_id
from deploykit.signature import Signature
from deploykit.store import Store

pytest.importorskip("onnxruntime")
F = TensorProto.FLOAT


def _lstm(path: Path) -> Path:
    """x [5, batch, 6], h0 and c0 [1, batch, 4], a scalar k -> y [5, batch, 4], hn."""
    rng = np.random.default_rng(0)
    weights = {"w": (1, 16, 6), "r": (1, 16, 4)}
    stored = [numpy_helper.from_array((rng.normal(size=s) * 0.3).astype(np.float32), n) for n, s in weights.items()]
    stored.append(numpy_helper.from_array(np.array([1]), "one"))
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["scaled"]),
        helper.make_node("LSTM", ["scaled", "w", "r", "", "", "h0", "c0"], ["all", "hn"], hidden_size=4),
        helper.make_node("Squeeze", ["all", "one"], ["y"]),
    ]
    shapes: dict[str, list[int | str]] = {"x": [5, "batch", 6], "h0": [1, "batch", 4], "c0": [1, "batch", 4], "k": []}
    outputs: dict[str, list[int | str]] = {"y": [5, "batch", 4], "hn": [1, "batch", 4]}
    graph = helper.make_graph(
        nodes,
        "lstm",
        [helper.make_tensor_value_info(n, F, s) for n, s in shapes.items()],
        [helper.make_tensor_value_info(n, F, s) for n, s in outputs.items()],
        stored,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_a_recurrent_model_with_a_scalar_input_runs_and_its_int8_rows_say_why_not(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    _lstm(tmp_path / "lstm.onnx")
    rng = np.random.default_rng(1)
    arrays = {
        name: rng.normal(size=s).astype(np.float32) for name, s in {"x": (5, 9, 6), "h0": (1, 9, 4), "c0": (1, 9, 4)}.items()
    }
    np.savez(tmp_path / "data.npz", k=np.array(0.5, np.float32), **arrays)
    options = "--data data.npz --backend onnxruntime,openvino --batch 2 --threads 1 --duration smoke -o out"
    done = subprocess.run(
        [sys.executable, "-m", "deploykit", "run", "lstm.onnx", *options.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    by = {(r["backend"], r["precision"]): r for r in rows}
    assert by["onnxruntime", "fp32"]["status"] == "ok"
    assert by["openvino", "fp32"]["status"] == "ok"
    assert by["openvino", "fp32"]["sqnr_db"] > 80
    for backend in ("onnxruntime", "openvino"):
        assert by[backend, "int8"]["status"] == "skipped"
        assert "can be quantized" in by[backend, "int8"]["reason"]


def _matmul(path: Path, *, baked: bool = False, shape: list[int | str] | None = None) -> Path:
    """x [batch, 2, 4] -> y [batch, 4]; `baked`: a Reshape holds the batch at 1."""
    stored = [
        numpy_helper.from_array(np.eye(8, 4, dtype=np.float32), "w"),
        numpy_helper.from_array(np.array([1 if baked else 0, 8]), "shape"),
    ]
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    given = [helper.make_tensor_value_info("x", F, ["batch", 2, 4])]
    graph = helper.make_graph(nodes, "m", given, [helper.make_tensor_value_info("y", F, shape)], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_a_graph_that_bakes_its_batch_runs_at_that_batch_and_the_other_rows_say_so(tmp_path: Path) -> None:
    _matmul(tmp_path / "baked.onnx", baked=True, shape=["batch", 4])
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(6, 2, 4)).astype(np.float32))
    options = "--data data.npz --backend onnxruntime --precision fp32 --batch 1,2 --threads 1 --duration smoke -o out"
    done = subprocess.run(
        [sys.executable, "-m", "deploykit", "run", "baked.onnx", *options.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 4, done.stderr
    rows = {r["batch"]: r for r in json.loads((tmp_path / "out" / "report.json").read_text())["rows"]}
    assert rows[1]["status"] == "ok"
    assert rows[2]["status"] == "failed"
    assert "Reshape" in rows[2]["reason"]


def test_an_output_without_a_shape_gets_the_inferred_one(tmp_path: Path) -> None:
    given = SourceRequest(str(_matmul(tmp_path / "m.onnx")))
    shop = prepare.open_source(given, Store(tmp_path / "store"), Silent(), batches=(1,))
    assert shop.signature.outputs[0].shape[1:] == (4,)


def test_an_adopted_graph_is_said_to_run_and_to_be_held_against_nothing() -> None:
    proof = {"against": "nothing: the graph is the source", "runs": [{"batch": 1, "finite": {"y": True}}]}
    made = Artifact(Path("m.onnx"), "onnx", "fp32", Signature((), ()), "export", facts={"proof": proof})
    assert single.proof_lines(made) == ["runs at batch 1, against nothing: the graph is the source"]
    proof = {"against": "the source", "tolerance": "1e-4", "runs": [{"batch": 2, "outputs": {"y": {"max_abs_error": 3e-7}}}]}
    assert single.proof_lines(replace(made, facts={"proof": proof})) == [
        "proven at batch 2, against the source: largest error 3e-07 (1e-4)"
    ]


def test_a_precision_that_the_graph_cannot_have_is_no_failure_and_bad_data_is(tmp_path: Path) -> None:
    shop = prepare.open_source(
        SourceRequest(str(_lstm(tmp_path / "lstm.onnx"))), Store(tmp_path / "store"), Silent(), batches=(1,)
    )

    def no_table() -> Artifact:
        raise DataError("NaN in the data")

    with pytest.raises(NotForThisGraph, match="would change nothing") as caught:
        prepare.graph_for(shop, "int8-dynamic", no_table)
    assert isinstance(caught.value, MissingBackend)  # the row is skipped, exit code 3 only where it was asked for
    with pytest.raises(DataError, match="NaN"):
        prepare.graph_for(shop, "int8-cpu", no_table)


@pytest.mark.parametrize(("op", "base"), [("DynamicQuantizeLSTM", "int8"), ("QGemm", "int8"), ("LSTM", "fp32")])
def test_a_graph_is_int8_when_any_operator_is(tmp_path: Path, op: str, base: str) -> None:
    nothing = Artifact(tmp_path / "m.onnx", "onnx", "fp32", Signature((), ()), "given")
    spec: Any = None
    shop = Workshop(Store(tmp_path), Silent(), spec, nothing, None, summary={"ops": {op: 1}})
    assert shop.base_precision == base


def test_a_row_in_which_another_precision_ran_is_no_second_row_of_that_precision(tmp_path: Path) -> None:
    engine = Artifact(tmp_path / "m.onnx", "onnx", "fp32", Signature((), ()), "engine")
    planned = [PlannedRow("m", "onnxruntime", p, "cpu", 1, p == "fp32") for p in ("fp32", "int8")]
    ran = Measurement(1, ((Window((0.1, 0.1), 0.2),),), precision="fp32")
    drifts = {engine_id(row): Drift(5, (), agreed=n) for row, n in zip(planned, (5, 3), strict=True)}
    results = Results({row.id: ran for row in planned}, drifts, "now", False, {1: planned[0].id})
    built = {row.engine_key: engine for row in planned}
    table = assemble.rows_of(planned, built, results, RowsRequest())
    assert [row.precision for row in table] == ["fp32", "fp32"]
    assert [row.name for row in table] == ["m", "m (int8 asked)"]
    assert len({row_id(row) for row in table}) == 2

    class One:
        rows = planned

    One.built = built  # type: ignore[attr-defined]
    found = assemble.drift_documents([One], results)  # type: ignore[list-item]
    assert {key: doc["agreed"] for key, doc in found.items()} == {row_id(r): n for r, n in zip(table, (5, 3), strict=True)}


@pytest.mark.parametrize(
    ("asked", "counts", "ran"),
    [
        ("int8", {"u8": 1, "f32": 1}, "int8"),
        ("fp32", {"u8": 1, "f32": 1}, "fp32"),
        ("int8", {"u8": 1, "f32": 2}, "fp32"),
        ("int8", {}, "fp32"),
    ],
)
def test_openvino_names_the_precision_of_most_layers(asked: str, counts: dict[str, int], ran: str) -> None:
    assert _really(asked, counts)[0] == ran


def test_one_sample_judges_and_calibrates_nothing(tmp_path: Path) -> None:
    import tiny_models

    tiny_models.conv_net(tmp_path / "net.onnx")
    np.savez(tmp_path / "one.npz", x=np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32))
    options = "--data one.npz --backend onnxruntime --precision fp32,int8 --batch 1 --threads 1 --duration smoke -o out"
    done = subprocess.run(
        [sys.executable, "-m", "deploykit", "run", "net.onnx", *options.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stderr  # int8 was asked for by name
    rows = {r["precision"]: r for r in json.loads((tmp_path / "out" / "report.json").read_text())["rows"]}
    assert rows["fp32"]["status"] == "ok"
    assert rows["int8"]["status"] == "skipped"
    assert "the only sample there is judges" in rows["int8"]["reason"]


def test_a_graph_that_bakes_its_batch_is_judged_at_the_batch_it_runs_at(tmp_path: Path) -> None:
    _matmul(tmp_path / "baked.onnx", baked=True, shape=["batch", 4])
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(70, 2, 4)).astype(np.float32))
    options = "--data data.npz --backend onnxruntime,openvino --precision fp32 --batch 1,2 --threads 1 --duration smoke -o out"
    subprocess.run(
        [sys.executable, "-m", "deploykit", "run", "baked.onnx", *options.split()], capture_output=True, check=False, cwd=tmp_path
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    ran = [row for row in report["rows"] if row["status"] == "ok"]
    assert {(row["backend"], row["batch"]) for row in ran} >= {("onnxruntime", 1), ("openvino", 1)}
    assert all(row["agreement"] == 1.0 for row in ran)
    assert any("judged at batch 1: the reference fails at batch 8" in note for note in report["notes"])
