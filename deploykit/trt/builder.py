"""Plan: an engine's bytes and what is known of them, built from an ONNX graph by any generation of TensorRT.

One path for TensorRT 8.6, 10, 11 and TensorRT-RTX: each flag and method is used where the module has it. Native code may
crash on a graph it does not like, so whoever calls this does it in a child process.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit import graph
from deploykit.errors import BackendFailed, InputError, ModelError
from deploykit.signature import Signature
from deploykit.trt import implicit
from deploykit.trt import layers as layer_listing
from deploykit.trt.log import Heard, recorder
from deploykit.trt.profiles import Profile

if TYPE_CHECKING:
    import onnx

_EXPLAIN = "`deploykit build-trt --explain` finds the smallest part of the graph that still fails"
# The parser's codes that say the file itself is wrong, not that the builder lacks something.
_BAD_FILE = ("MODEL_DESERIALIZE_FAILED", "INVALID_GRAPH")


@dataclass(frozen=True)
class PlanSpec:
    """What to build: profiles in order, the GPU generation ('sm75', ...; None = the GPU that is here), the builder flags
    that this generation still has, the text of a calibration cache for implicit INT8 (TensorRT up to 10), and a limit on
    scratch memory (None: TensorRT's own).
    """

    profiles: tuple[Profile, ...] = ()
    target: str | None = None
    builder_flags: tuple[str, ...] = ()
    calibration_cache: str | None = None
    workspace_bytes: int | None = None
    timing_cache: bytes | None = None


@dataclass(frozen=True)
class Plan:
    """A serialized engine, the layers it runs where the builder lists them, its warnings, and seconds spent."""

    data: bytes
    layers: tuple[layer_listing.Layer, ...]
    warnings: tuple[str, ...]
    network_layers: int
    parse_s: float
    build_s: float
    timing_cache: bytes | None = None


_builds = 0  # in this process
_failed = False  # whether one of them failed


def build(trt: Any, model: onnx.ModelProto, path: Path, signature: Signature, spec: PlanSpec) -> Plan:
    """The plan for a model from `parser_graph.load`. `path` is where it came from, for graphs too large to pass in memory.

    Raises ModelError and BackendFailed naming the operator and node where the parser does, InputError for a target or
    flag that this generation does not have.
    """
    global _builds, _failed
    if spoiled(trt):
        raise BackendFailed("a build failed in this process before, and the next would be wrong", "build in a new process")
    _builds += 1
    logger, heard = recorder(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt, typed=not spec.builder_flags))
    parser = trt.OnnxParser(network, logger)
    start = time.perf_counter()
    if graph.fits_inline(model):
        parsed = parser.parse(model.SerializeToString(deterministic=True))
    else:
        parsed = parser.parse_from_file(str(path))
    parse_s = time.perf_counter() - start
    if not parsed or parser.num_errors:
        raise _parser_error(trt, parser, heard, model)
    _check_network(trt, network, signature)
    config = _config(trt, builder, network, spec)
    cache = _timing_cache(config, spec.timing_cache)
    start = time.perf_counter()
    memory = builder.build_serialized_network(network, config)
    build_s = time.perf_counter() - start
    if memory is None:
        _failed = True
        reason = heard.first_error() or "it gave no reason"
        raise BackendFailed(f"{trt.__name__} could not build the engine: {reason}", _remedy(reason))
    found = tuple(layer for text in heard.listing for layer in layer_listing.from_listing(text))
    saved = bytes(memoryview(cache.serialize())) if cache is not None else None
    return Plan(bytes(memoryview(memory)), found, heard.notable_warnings(), network.num_layers, parse_s, build_s, saved)


def has_built() -> bool:
    """Whether this process has built before."""
    return _builds > 0


def spoiled(trt: Any) -> bool:
    """Whether this process must not build any more.

    Seen with TensorRT-RTX 1.7.1: after a build for sm75 that failed, the next plan in that process carries Turing's kernels,
    whatever target it asked for and its header names.
    """
    return _failed and bool(targets(trt))


def with_layers(made: Plan, found: tuple[layer_listing.Layer, ...]) -> Plan:
    """The plan with the layers that its inspector listed, where the builder's log had none."""
    return replace(made, layers=found or made.layers)


def network_flags(trt: Any, *, typed: bool = True) -> int:
    """The creation flags of this generation: strongly typed where that can be chosen, explicit batch where it must be.

    STRONGLY_TYPED is 1 in TensorRT 10 and 0 in 11 and RTX, so its value is read from the module. Precision flags, and
    with them implicit INT8, need a network that is not strongly typed.
    """
    flag = trt.NetworkDefinitionCreationFlag
    bits = 0
    if hasattr(flag, "STRONGLY_TYPED") and typed:
        bits |= 1 << int(flag.STRONGLY_TYPED)
    if hasattr(flag, "EXPLICIT_BATCH"):
        bits |= 1 << int(flag.EXPLICIT_BATCH)
    return bits


def precision_flags(trt: Any, precision: str, *, calibrated: bool = False) -> tuple[str, ...]:
    """The builder flags that a precision needs: none for a strongly typed network, where the graph says it all.

    TensorRT 8.6 has only weakly typed networks, so FP16 and INT8 are flags there; `calibrated` is implicit INT8.
    """
    if calibrated:
        return implicit.FLAGS
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or precision == "fp32":
        return ()
    return ("FP16",) if precision == "fp16" else implicit.FLAGS


def inspect(trt: Any, data: bytes, shapes: Profile | None = None) -> tuple[layer_listing.Layer, ...]:
    """The layers of a plan as its inspector lists them at the best shapes of its first profile; needs the GPU it was built for.

    Without a context at some shapes the inspector of a dynamic plan says 'N/A due to dynamic shapes' for every type (NVIDIA,
    "Engine Inspector"). Raises BackendFailed.
    """
    logger, heard = recorder(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise BackendFailed(f"{trt.__name__} cannot load the plan it has just built: {heard.first_error() or 'no reason given'}")
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context() if shapes else None  # the first context has the first profile
    if context is not None and all(context.set_input_shape(name, sizes.opt) for name, sizes in (shapes or {}).items()):
        inspector.execution_context = context
    return layer_listing.from_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def targets(trt: Any) -> tuple[str, ...]:
    """The GPU generations this module builds for ahead of time; empty where it builds for the GPU at hand only."""
    if not hasattr(trt, "ComputeCapability"):
        return ()
    return tuple(n.lower() for n in trt.ComputeCapability.__members__ if n.startswith("SM"))


def _check_network(trt: Any, network: Any, signature: Signature) -> None:
    if network.num_layers == 0:
        raise ModelError("the parser found no layers in the graph", "the model computes nothing; export it again")
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    for tensor in inputs:
        if tensor.is_shape_tensor:
            raise BackendFailed(
                f"input '{tensor.name}' decides shapes inside the graph; a plan would be bound to its values",
                "export the model with that input as a constant",
            )
    pairs = (
        ("inputs", [t.name for t in inputs], [s.name for s in signature.inputs]),
        ("outputs", [network.get_output(i).name for i in range(network.num_outputs)], [s.name for s in signature.outputs]),
    )
    for what, found, expected in pairs:
        if sorted(found) != sorted(expected):
            raise BackendFailed(
                f"{trt.__name__} sees the {what} {found}, the model has {expected}", "a graph input that nothing reads? remove it"
            )
    _check_types(trt, inputs, signature)


def _check_types(trt: Any, inputs: list[Any], signature: Signature) -> None:
    """Seen with TensorRT-RTX 1.7.1: a float64 input becomes float32 without a word."""
    for tensor in inputs:
        asked = signature.input(tensor.name).dtype
        try:
            found = np.dtype(trt.nptype(tensor.dtype)).name
        except TypeError as exc:
            raise BackendFailed(
                f"input '{tensor.name}' is {asked}, a type that numpy and so the runner lacks", "export it with float32 inputs"
            ) from exc
        narrowed = (asked, found) == ("int64", "int32")  # TensorRT 8.6 has no int64; its runner converts
        if found != asked and not narrowed:
            raise BackendFailed(
                f"input '{tensor.name}' is {asked}, and {trt.__name__} would take it as {found}",
                f"export the model with {found} inputs",
            )


def _config(trt: Any, builder: Any, network: Any, spec: PlanSpec) -> Any:
    config = builder.create_builder_config()
    if spec.workspace_bytes is not None:  # TensorRT's own limit is the GPU's memory; a lower one refuses large networks
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if spec.target is not None:
        known = targets(trt)
        if spec.target not in known:
            raise InputError(
                f"{trt.__name__} cannot build for '{spec.target}'",
                f"choose from: {', '.join(known)}" if known else "it builds for the GPU that is here; leave --target out",
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, spec.target.upper()), 0)
    for name in spec.builder_flags:
        if not hasattr(trt.BuilderFlag, name):
            raise InputError(f"{trt.__name__} {trt.__version__} has no builder flag {name}", "precision is in the graph there")
        config.set_flag(getattr(trt.BuilderFlag, name))
    _add_profiles(builder, config, network, spec.profiles)
    if spec.calibration_cache is not None:
        if not implicit.available(trt):
            raise InputError(
                f"{trt.__name__} {trt.__version__} has no INT8 calibrators", "use Q/DQ in the graph: --int8-mode explicit"
            )
        config.int8_calibrator = implicit.calibrator(trt, spec.calibration_cache)
    return config


def _add_profiles(builder: Any, config: Any, network: Any, profiles: tuple[Profile, ...]) -> None:
    """Names and order are checked here: `set_shape` takes wrong names, and min > opt, without a word."""
    names = {network.get_input(i).name for i in range(network.num_inputs)}
    for wanted in profiles:
        profile = builder.create_optimization_profile()
        for name, sizes in wanted.items():
            if name not in names:
                raise InputError(f"a profile names '{name}', which is no input", f"the inputs are: {', '.join(sorted(names))}")
            profile.set_shape(name, sizes.min, sizes.opt, sizes.max)
        if config.add_optimization_profile(profile) < 0:
            raise InputError(f"the builder refused the profile {wanted}", "min <= opt <= max must hold on each axis")


def _timing_cache(config: Any, data: bytes | None) -> Any | None:
    """Tactic timings of earlier builds, where bytes are given. Raises InputError for those of another GPU or version."""
    if data is None:
        return None
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        raise InputError("the timing cache is damaged, or of another GPU or TensorRT", "name a new file, or delete this one")
    return cache


def _parser_error(trt: Any, parser: Any, heard: Heard, model: onnx.ModelProto) -> Exception:
    if parser.num_errors == 0:
        return BackendFailed(f"{trt.__name__} could not parse the graph: {heard.first_error() or 'no reason given'}", _EXPLAIN)
    error = parser.get_error(0)
    code = getattr(error.code(), "name", str(error.code()))
    said = error.desc().strip().removeprefix("Assertion failed: ")
    operator, name = _culprit(error, model)
    where = f"node '{name}' ({operator})" if operator else f"node {name}" if name else "the graph's inputs, outputs or weights"
    if code in _BAD_FILE:
        return ModelError(f"{trt.__name__} cannot read the graph: {said}", "export the model again")
    if code.startswith("UNSUPPORTED"):
        detail = "" if said in ("false", "") else f": {said}"
        return BackendFailed(
            f"{trt.__name__} does not support {where}{detail}",
            "replace the operator, or cut the graph before it with `deploykit export --outputs NAME`",
        )
    return BackendFailed(f"{trt.__name__} refuses {where}: {said}", _remedy(said))


def _culprit(error: Any, model: onnx.ModelProto) -> tuple[str, str]:
    """Operator and name of the node that a parser's error is about, empty where it is about none. TensorRT 8.6 gives its
    number only."""
    if hasattr(error, "node_operator") and hasattr(error, "node_name"):
        return error.node_operator(), error.node_name()
    number = error.node()
    if not 0 <= number < len(model.graph.node):
        return "", ""
    return model.graph.node[number].op_type, model.graph.node[number].name


def _remedy(reason: str) -> str:
    """What to do about a refusal that is known."""
    low = reason.lower()
    if "zero point" in low:
        return "TensorRT takes symmetric int8 only: `deploykit quantize --mode static --layout tensorrt`"
    if "scale" in low and "positive" in low:
        return "a channel was dead in calibration (scale 0): calibrate on more data, or `deploykit quantize` again"
    if "turing" in low or "sm75" in low:
        return "a T4 (sm75) takes FP16 from TensorRT-RTX: `--fp16`"
    if "memory" in low or "workspace limit" in low:
        return "use a smaller maximum batch, or a machine with more memory"
    return _EXPLAIN
