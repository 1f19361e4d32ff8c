"""Dynamic INT8: only matrix products by constant weights, and a clear no where it would change nothing."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from quantizable_models import ZOO, feeds_for, residual, run, sqnr_db, table_for

from deploykit import graph as graphs
from deploykit.errors import InputError, ModelError
from deploykit.stages.precision import to_int8, to_int8_dynamic


def saved(made: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "float.onnx"
    onnx.save(made, str(path))
    return path


@pytest.mark.parametrize(("name", "layers"), [("attention", 3), ("hidden_weights", 1), ("residual", 1), ("shared_weights", 3)])
def test_matrix_products_by_constants_become_integers(tmp_path: Path, name: str, layers: int) -> None:
    made = ZOO[name]()
    path, out = saved(made, tmp_path), tmp_path / "dynamic.onnx"
    artifact = to_int8_dynamic(path, out)
    assert artifact.precision == "int8-dynamic"
    assert artifact.facts["quantized_layers"] == layers
    assert artifact.signature == graphs.signature(made)
    assert not any(n.op_type == "ConvInteger" for n in onnx.load(str(out)).graph.node)
    for batch in (1, 2, 7):
        feeds = feeds_for(made, batch, seed=99)
        for wanted, found in zip(run(made, feeds), run(out, feeds), strict=True):
            assert sqnr_db(wanted, found) > 30


def test_a_network_of_convolutions_is_told_that_it_rarely_pays(tmp_path: Path) -> None:
    facts = to_int8_dynamic(saved(residual(), tmp_path), tmp_path / "dynamic.onnx").facts
    assert facts["convolutions_left_in_float"] == 4
    assert any("rarely pays" in note for note in facts["notes"])


def test_nothing_to_quantize_is_an_error_that_says_why(tmp_path: Path) -> None:
    path, out = saved(ZOO["grouped"](), tmp_path), tmp_path / "dynamic.onnx"
    with pytest.raises(InputError, match=r"would change nothing.*ConvInteger"):
        to_int8_dynamic(path, out)
    assert not out.exists()


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    path = saved(residual(), tmp_path)
    to_int8(path, table_for(path), "cpu", tmp_path / "int8.onnx")
    with pytest.raises(ModelError, match="quantized already"):
        to_int8_dynamic(tmp_path / "int8.onnx", tmp_path / "dynamic.onnx")
