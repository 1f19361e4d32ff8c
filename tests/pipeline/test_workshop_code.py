"""What a stage's version is made of: no code that decides a kept result is left out."""

from __future__ import annotations

import pytest

from deploykit import backends
from deploykit.pipeline.workshop import PACKAGE, backend_code, stage_files


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("executorch", {"executorch.py", "executorch_build.py", "executorch_file.py", "torch_source.py", "opened.py"}),
        ("tvm", {"apache_tvm.py", "apache_tvm_session.py", "apache_tvm_tuning.py"}),
        ("torch-compile", {"torch_compile.py", "torch_compile_package.py", "torch_eager.py", "torch_source.py"}),
        ("tensorrt-rtx", {"tensorrt_rtx.py", *(f.name for f in (PACKAGE / "trt").glob("*.py"))}),
        ("tensorrt", {"tensorrt_full.py", "runner.py", "builder.py"}),
        ("onnxruntime-cuda", {"onnxruntime_gpu_cuda.py", "onnxruntime_gpu.py"}),
    ],
)
def test_a_backend_is_made_of_all_its_files(name: str, held: set[str]) -> None:
    assert held <= {path.name for path in backend_code(name)}


def test_no_backend_is_made_of_another_ones_files() -> None:
    assert set(backends.names()) == set(backends.MODULES)
    assert not {"openvino_cpu.py", "litert.py", "builder.py"} & {path.name for path in backend_code("onnxruntime")}


def test_the_code_that_chooses_a_calibration_method_goes_into_its_version() -> None:
    assert PACKAGE / "pipeline" / "ranges.py" in stage_files("calibrate")
    assert {"choice.py", "int8.py", "bias.py"} <= {path.name for path in stage_files("calibrate-best")}
