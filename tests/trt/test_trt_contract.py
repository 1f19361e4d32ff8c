"""Every class, flag and method of NVIDIA's that our code touches, held against the real bindings of each generation.

What the code touches is read from its own source, so a new call is held too, without a line here.
"""

from __future__ import annotations

import ast
import inspect
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trt_bindings

from deploykit.children import has_module
from deploykit.trt import builder, implicit, loaded, log

# The name a value has in our code -> NVIDIA's class.
HOLDERS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "error": "ParserError",
    "tensor": "ITensor",
    "runtime": "Runtime",
    "_runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
    "_cache": "IRuntimeCache",
    "cache": "ITimingCache",
}
# What is used only where the module has it (hasattr), and which generations lack it.
GUARDED = {
    ("module", "ComputeCapability"): {"8.6", "10", "11"},
    ("module", "CudaGraphStrategy"): {"8.6", "10", "11"},
    ("module", "IInt8EntropyCalibrator2"): {"11", "rtx"},
    ("IBuilderConfig", "num_compute_capabilities"): {"8.6", "10", "11"},
    ("IBuilderConfig", "set_compute_capability"): {"8.6", "10", "11"},
    ("IBuilderConfig", "int8_calibrator"): {"11", "rtx"},
    ("ParserError", "node_name"): {"8.6"},
    ("ParserError", "node_operator"): {"8.6"},
    ("ICudaEngine", "create_runtime_config"): {"8.6"},
    ("IExecutionContext", "is_stream_capturable"): {"8.6", "10", "11"},
    **{
        ("IRuntimeConfig", member): {"8.6", "10", "11"}
        for member in (
            "create_runtime_cache",
            "set_runtime_cache",
            "cuda_graph_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
        )
    },
    **{("IRuntimeCache", member): {"8.6", "10", "11"} for member in ("serialize", "deserialize")},
    ("module", "DynamicShapesKernelSpecializationStrategy"): {"8.6", "10", "11"},
    ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"): {"8.6"},
    ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"): {"11", "rtx"},
}
GENERATIONS = ("8.6", "10", "11", "rtx")


def touched() -> set[tuple[str, str]]:
    """(class, member) of NVIDIA's that builder, implicit, log and loaded use."""
    found = set()
    for module in (builder, implicit, log, loaded):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute):
                found |= _read(node, module)
    return found


def _read(node: ast.Attribute, module: ModuleType) -> set[tuple[str, str]]:
    holder = node.value
    if isinstance(holder, ast.Attribute) and isinstance(holder.value, ast.Name) and holder.value.id == "trt":
        return {(holder.attr, node.attr)} if not node.attr.startswith("__") else set()
    name = holder.id if isinstance(holder, ast.Name) else holder.attr if isinstance(holder, ast.Attribute) else ""
    if name in ("trt", "_trt"):
        return {("module", node.attr)} if not node.attr.startswith("__") else set()
    if name == "flag" and module is builder:
        return {("NetworkDefinitionCreationFlag", node.attr)}
    if name in HOLDERS:
        return {(HOLDERS[name], node.attr)}
    return set()


@pytest.fixture(scope="module", params=GENERATIONS)
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path | None]:
    generation: str = request.param
    if generation == "rtx":
        if not has_module("tensorrt_rtx"):
            pytest.skip("tensorrt-rtx is not installed")
        import tensorrt_rtx as trt

        classes = {n: dir(getattr(trt, n)) for n in dir(trt) if isinstance(getattr(trt, n), type)}
        return generation, {"module": dir(trt), "classes": classes, "version": trt.__version__}, None
    for tool in ("gcc", "nm", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: the bindings need stub libraries")
    try:
        folder = trt_bindings.install(generation, tmp_path_factory.mktemp(f"trt{generation}"))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        pytest.skip(f"PyPI has no {trt_bindings.WHEELS[generation]} for this Python: {exc}")
    return generation, trt_bindings.run(folder, trt_bindings.MEMBERS), folder


def test_the_source_is_read_for_what_it_touches() -> None:
    seen = touched()
    for expected in (
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "set_memory_pool_limit"),
        ("MemoryPoolType", "WORKSPACE"),
        ("IExecutionContext", "execute_async_v3"),
        ("ICudaEngine", "get_tensor_profile_shape"),
        ("module", "IInt8EntropyCalibrator2"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
    ):
        assert expected in seen
    assert len(seen) > 50


@pytest.mark.slow
def test_every_member_our_code_touches_exists(bindings: tuple[str, Any, Path | None]) -> None:
    generation, found, _ = bindings
    absent = {
        (cls, member)
        for cls, member in touched()
        if member not in (found["module"] if cls == "module" else found["classes"].get(cls, ()))
    }
    allowed = {pair for pair, lacking in GUARDED.items() if generation in lacking}
    dependent = {pair for pair in absent if ("module", pair[0]) in allowed}  # members of a class that is guarded itself
    assert absent - allowed - dependent == set()
    assert allowed <= absent, "a guard that this generation does not need any more"


@pytest.mark.slow
def test_flags_are_chosen_by_what_the_module_has(bindings: tuple[str, Any, Path | None]) -> None:
    generation, _, folder = bindings
    code = """
from deploykit.trt import builder, implicit
print(json.dumps({
    "typed": builder.network_flags(trt), "weak": builder.network_flags(trt, typed=False),
    "fp16": builder.precision_flags(trt, "fp16"), "int8": builder.precision_flags(trt, "int8"),
    "implicit": implicit.available(trt), "targets": builder.targets(trt),
    "flags": [hasattr(trt.BuilderFlag, f) for f in implicit.FLAGS],
    "nptype": str(trt.nptype(trt.DataType.HALF)),
}))
"""
    if folder is None:
        import tensorrt_rtx as trt

        assert builder.network_flags(trt) == 1
        assert builder.precision_flags(trt, "int8") == ()
        assert not implicit.available(trt)
        assert builder.targets(trt) == ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
        return
    said = trt_bindings.run(folder, code)
    assert (said["typed"], said["weak"]) == {"8.6": (1, 1), "10": (3, 1), "11": (1, 0)}[generation]
    assert said["implicit"] is (generation != "11")
    assert said["flags"] == [generation != "11"] * 2
    assert said["targets"] == []
    assert said["fp16"] == (["FP16"] if generation == "8.6" else [])
    assert said["int8"] == (["FP16", "INT8"] if generation == "8.6" else [])


@pytest.mark.slow
def test_the_calibrator_is_made_of_the_real_class_and_serves_our_cache(bindings: tuple[str, Any, Path | None]) -> None:
    generation, _, folder = bindings
    if folder is None or generation == "11":
        pytest.skip("this generation has no calibrators")
    code = """
from pathlib import Path
from deploykit.trt import implicit
path = Path(sys.path[0]) / "other.cache"
path.write_text("TRT-8501-EntropyCalibration2\\nx: 3c010a14\\na:b: 0\\n")
text = implicit.cache_text(trt, path)
made = implicit.calibrator(trt, text)
print(json.dumps({"text": text, "read": made.read_calibration_cache().decode(), "batch": made.get_batch(["x"]),
                  "size": made.get_batch_size(), "kind": isinstance(made, trt.IInt8EntropyCalibrator2)}))
"""
    said = trt_bindings.run(folder, code)
    header = {"8.6": "TRT-8601", "10": "TRT-101601"}[generation]
    assert said["text"] == f"{header}-EntropyCalibration2\nx: 3c010a14\na:b: 0\n"
    assert said["read"] == said["text"]
    assert (said["batch"], said["size"], said["kind"]) == (None, 1, True)


@pytest.mark.slow
def test_the_recorder_is_a_real_logger(bindings: tuple[str, Any, Path | None]) -> None:
    _, _, folder = bindings
    if folder is None:
        pytest.skip("the real builder uses it in tests/backends/test_tensorrt_rtx.py")
    code = """
from deploykit.trt.log import recorder
logger, heard = recorder(trt)
logger.log(trt.ILogger.Severity.ERROR, "Error Code 1: first")
logger.log(trt.ILogger.Severity.VERBOSE, "chatter")
print(json.dumps({"first": heard.first_error(), "kind": isinstance(logger, trt.ILogger)}))
"""
    assert trt_bindings.run(folder, code) == {"first": "Error Code 1: first", "kind": True}
