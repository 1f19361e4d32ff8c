"""compare --per-layer and explain, as a user types them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import onnx
import pytest
from quantizable_models import residual, table_for

from deploykit.cli.main import run
from deploykit.stages.precision import to_int8


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    path, out = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(residual(), str(path))
    to_int8(path, table_for(path), "cpu", out)
    return path, out


def test_compare_per_layer_as_a_table_json_and_a_page(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, doc = tmp_path / "layers.html", tmp_path / "layers.json"
    line = [
        "compare",
        *map(str, pair),
        "--data",
        "random:8",
        "--per-layer",
        "--alone",
        "2",
        "--html",
        str(page),
        "--json",
        str(doc),
    ]
    assert run(line) == 0
    said = capsys.readouterr().out
    assert "conv_c3" in said and "own_db" in said
    assert "quantized alone, these cost the output most" in said
    assert "note: 2 of 5 layers were measured alone" in said
    layers = json.loads(doc.read_text())["layers"]
    assert len(layers) == 5 and sum(layer["own_sqnr_db"] is not None for layer in layers) == 2
    html = page.read_text()
    HTMLParser().feed(html)
    assert "<svg" in html and "conv_c3" in html and "http://" not in html.replace("http://www.w3.org/2000/svg", "")


def test_the_page_escapes_names(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = onnx.load(str(pair[0]))
    made.graph.node[0].name = "<script>alert(1)</script>"
    onnx.save(made, str(pair[0]))
    page = tmp_path / "layers.html"
    assert run(["compare", *map(str, pair), "--data", "random:2", "--per-layer", "--alone", "0", "--html", str(page)]) == 0
    assert "<script>" not in page.read_text() and "&lt;script&gt;" in page.read_text()


def test_what_per_layer_refuses(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["compare", *map(str, pair), "--data", "random:2"]
    assert run([*base, "--html", str(tmp_path / "x.html")]) == 2
    assert run([*base, "--per-layer", "--alone", "some"]) == 2
    pytest.importorskip("openvino")
    assert run(["build", str(pair[1]), "--backend", "openvino", "--precision", "int8", "-o", str(tmp_path / "built")]) == 0
    (engine,) = (tmp_path / "built").rglob("*.xml")
    assert run(["compare", str(pair[0]), str(engine), "--data", "random:2", "--per-layer"]) == 2
    assert "layers are compared in graphs only" in capsys.readouterr().err
    assert run(["explain", str(engine), "--json", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["backend"] == "openvino"
    assert run(["explain", str(engine), "--backend", "onnxruntime"]) == 2


def test_explain_as_a_table_and_as_json(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(pair[1]), "--backend", "onnxruntime", "--batch", "2", "--threads", "1", "--top", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("5 of 5 convolutions and matrix products run in integers")
    assert "where the time goes" in said and "slowest kernels" in said
    assert run(["explain", str(pair[0]), "--backend", "onnxruntime", "--json", "-"]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc["verdict"].startswith("none of the 5")
    assert sum(kind["share"] for kind in doc["kinds"]) == pytest.approx(1)


def test_what_explain_refuses(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(pair[1])]) == 2
    assert "name one: --backend onnxruntime or openvino" in capsys.readouterr().err
    assert run(["explain", str(pair[1]), "--backend", "torch"]) == 2
    assert run(["explain", str(tmp_path / "absent.onnx"), "--backend", "onnxruntime"]) == 2
    assert run(["explain", str(pair[1]), "--backend", "onnxruntime", "--batch", "0"]) == 2
    assert run(["explain", str(pair[1]), "--backend", "tensorrt"]) in (2, 3)
