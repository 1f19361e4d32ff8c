"""What TensorRT-RTX makes of the graphs, built ahead of time without a GPU: the precision that layers really get."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from quantizable_models import ZOO, table_for

from deploykit.stages.precision import to_fp16, to_int8, to_int8_fp16

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX: pip install 'deploykit[rtx]'"
)
LISTER = Path(__file__).parents[2] / "rtx_layers.py"
INTEGER_LAYERS = {"residual": 5, "grouped": 2, "squeeze_excite": 3, "dead_channel": 2, "odd_gemms": 3, "shared_weights": 3}


def layers(path: Path, target: str) -> list[tuple[str, str]]:
    done = subprocess.run([sys.executable, str(LISTER), str(path), target], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [(kind, source) for kind, source in json.loads(done.stdout)]


def saved(name: str, folder: Path) -> Path:
    path = folder / "float.onnx"
    onnx.save(ZOO[name](), str(path))
    return path


@pytest.mark.parametrize(("name", "count"), INTEGER_LAYERS.items())
def test_every_quantized_layer_runs_in_int8_on_ampere(tmp_path: Path, name: str, count: int) -> None:
    path, out = saved(name, tmp_path), tmp_path / "int8.onnx"
    to_int8_fp16(path, table_for(path), out)
    heavy = [source for kind, source in layers(out, "SM80") if kind in ("correlation", "gemm")]
    assert heavy.count("Int8") == len(heavy) == count


def test_int8_with_float_around_it_runs_in_int8_too(tmp_path: Path) -> None:
    path, out = saved("residual", tmp_path), tmp_path / "int8.onnx"
    to_int8(path, table_for(path), "tensorrt", out)
    heavy = [source for kind, source in layers(out, "SM89") if kind in ("correlation", "gemm")]
    assert heavy == ["Int8"] * 5


def test_turing_takes_half_and_runs_the_quantized_convolutions_in_half(tmp_path: Path) -> None:
    path, out = saved("residual", tmp_path), tmp_path / "half.onnx"
    to_fp16(path, out)
    assert {source for kind, source in layers(out, "SM75") if kind == "correlation"} == {"Half"}
    to_int8_fp16(path, table_for(path), out)
    assert {source for kind, source in layers(out, "SM75") if kind == "correlation"} == {"Half"}
