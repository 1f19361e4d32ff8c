"""How each peer is driven: model and calibration samples in, a quantized graph out; defaults as its own documentation shows them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Write = Callable[[Path], object]

# Runs in ModelOpt's own environment: model, samples (.npy), input, method, out.
_MODELOPT = """
import sys
import numpy as np
from modelopt.onnx.quantization import quantize
model, samples, name, method, out = sys.argv[1:]
quantize(model, quantize_mode="int8", calibration_data={name: np.load(samples)}, calibration_method=method,
         calibration_eps=["cpu"], high_precision_dtype="fp32", output_path=out, log_level="ERROR")
"""


def rows(model: Path, name: str, calib: Floats, samples: Path, modelopt: Path | None) -> dict[str, Write]:
    """Name of a row -> what writes its graph to a path. An OpenVINO model is written as .xml, beside the .onnx asked for."""
    found: dict[str, Write] = {}
    for kind in ("MinMax", "Entropy", "Percentile"):
        found[f"onnxruntime {kind.lower()}"] = lambda out, k=kind: _onnx_runtime(model, name, calib, out, k)  # type: ignore[misc]
    found["nncf"] = lambda out: _nncf_openvino(model, name, calib, out)
    found["nncf mixed preset"] = lambda out: _nncf_openvino(model, name, calib, out, preset="MIXED")
    found["nncf on onnx"] = lambda out: _nncf_onnx(model, name, calib, out)
    found["nncf on onnx, no bias correction"] = lambda out: _nncf_onnx(model, name, calib, out, fast_bias_correction=None)
    found["nncf accuracy control"] = lambda out: _nncf_control(model, name, calib, out)
    for method in ("entropy", "max"):
        found[f"modelopt {method}"] = lambda out, m=method: _modelopt(modelopt, model, samples, name, m, out)  # type: ignore[misc]
    return found


def _onnx_runtime(model: Path, name: str, calib: Floats, out: Path, kind: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

    class Feed(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter([{name: calib[i : i + 1]} for i in range(len(calib))])

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self._batches, None)

    quantize_static(
        str(model),
        str(out),
        Feed(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, kind),
    )


def _nncf_openvino(model: Path, name: str, calib: Floats, out: Path, preset: str | None = None) -> None:
    """As NNCF's guide shows it for OpenVINO: on the OpenVINO model, everything at its default."""
    import nncf
    import openvino as ov

    data = nncf.Dataset([{name: calib[i : i + 1]} for i in range(len(calib))])
    chosen = {} if preset is None else {"preset": nncf.QuantizationPreset[preset]}
    made = nncf.quantize(_for_openvino(model, name, calib), data, subset_size=len(calib), **chosen)
    ov.save_model(made, out.with_suffix(".xml"), compress_to_fp16=False)


def _for_openvino(model: Path, name: str, calib: Floats) -> Any:
    import openvino as ov

    read = ov.Core().read_model(str(model))
    read.reshape({name: [1, *calib.shape[1:]]})
    return read


def _nncf_onnx(model: Path, name: str, calib: Floats, out: Path, **more: Any) -> None:
    import nncf
    import onnx

    data = nncf.Dataset([{name: calib[i : i + 1]} for i in range(len(calib))])
    if "fast_bias_correction" in more:
        more = {"advanced_parameters": nncf.AdvancedQuantizationParameters(disable_bias_correction=True)}
    onnx.save(nncf.quantize(onnx.load(str(model)), data, subset_size=len(calib), **more), str(out))


def _nncf_control(model: Path, name: str, calib: Floats, out: Path) -> None:
    """`quantize_with_accuracy_control`: the share of the last quarter of the samples with the float model's top-1 may fall by
    0.02; it keeps layers in float until it does not."""
    import nncf
    import openvino as ov

    cut = len(calib) - len(calib) // 4
    source = _for_openvino(model, name, calib)
    compiled = ov.Core().compile_model(source, "CPU")
    items = [(calib[i : i + 1], int(compiled(calib[i : i + 1])[0].argmax())) for i in range(len(calib))]

    def validate(found: Any, data: Any) -> tuple[float, list[float]]:
        hits = [float(found(x)[0].argmax() == label) for x, label in data]
        return float(np.mean(hits)), hits

    made = nncf.quantize_with_accuracy_control(
        source,
        nncf.Dataset(items[:cut], lambda item: {name: item[0]}),
        nncf.Dataset(items[cut:]),
        validate,
        subset_size=cut,
        max_drop=0.02,
    )
    ov.save_model(made, out.with_suffix(".xml"), compress_to_fp16=False)


def _modelopt(python: Path | None, model: Path, samples: Path, name: str, method: str, out: Path) -> None:
    if python is None:
        raise SystemExit(
            "skipped: ModelOpt pins older packages; make its environment with benchmarks/modelopt_scales.py --venv DIR"
        )
    done = subprocess.run(
        [python, "-c", _MODELOPT, str(model), str(samples), name, method, str(out)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"ModelOpt failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
