"""Random networks through the precision stages, the checks and a real build: nothing crashes, what the checks pass the builder
accepts, whoever quantized it, and what asked for INT8 runs in it.

DEPLOYKIT_RANDOM_EXAMPLES: how many networks each test tries, where other ones than the usual few are wanted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import random_networks as nets
import trt_graphs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploykit import backends, children
from deploykit.errors import BackendFailed
from deploykit.pipeline.prepare import build_engine
from deploykit.session import BuildRequest
from deploykit.stages import precision
from deploykit.stages.checks import api as checks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backends.get("tensorrt-rtx").missing() is not None, reason="tensorrt-rtx is not installed"),
]
ASKED = os.environ.get("DEPLOYKIT_RANDOM_EXAMPLES")
SEEDS = st.integers(0, 99)
MOSTLY = st.sampled_from((True, True, False))
Grown = list[tuple[str, int]]


def examples(usual: int) -> settings:
    """So many networks, always the same ones; as many as were asked for, each time others."""
    return settings(
        max_examples=int(ASKED) if ASKED else usual,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=not ASKED,
        database=None,
    )


@pytest.fixture(scope="module")
def child() -> Iterator[children.Child]:
    with children.Child("random builds") as made:
        yield made


@examples(16)
@given(kinds=nets.KINDS, head=nets.HEAD, seed=SEEDS, target=st.sampled_from(("sm80", "sm86", "sm89", "sm120")))
def test_random_networks_build_in_int8_as_asked(
    child: children.Child, tmp_path_factory: pytest.TempPathFactory, kinds: Grown, head: Grown, seed: int, target: str
) -> None:
    folder = tmp_path_factory.mktemp("random")
    net = nets.Net.grown(seed, kinds, head)
    path = net.save(folder / "f.onnx")
    made = precision.to_int8_fp16(path, nets.table(path), folder / "q.onnx").save()
    assert [f for f in checks.find(made.path, ("tensorrt-rtx",)) if f.severity == "error"] == []
    request = BuildRequest("int8", target, (1, 4), options={"verify_rebuild": False})
    engine = child.call(build_engine, "tensorrt-rtx", made, request, folder, timeout_s=120.0)
    assert sum(engine.facts["requested"].get("Conv", {}).values()) == net.count("Conv")
    assert sum(sum(row.values()) for row in engine.facts["requested"].values()) == net.count("Conv", "Gemm", "MatMul")
    told = engine.facts["fell_back"]
    assert bool(engine.facts["fallback"]) == (told is not None)
    short = [row for row in engine.facts["fallback"] if row["op"] == "Conv"]
    assert short == [], f"{told}: {kinds} {head}"


@examples(6)
@given(kinds=nets.KINDS, head=nets.HEAD, seed=SEEDS, target=st.sampled_from(("sm75", "sm89")))
def test_random_networks_build_in_fp16(
    child: children.Child, tmp_path_factory: pytest.TempPathFactory, kinds: Grown, head: Grown, seed: int, target: str
) -> None:
    folder = tmp_path_factory.mktemp("random")
    path = nets.Net.grown(seed, kinds, head).save(folder / "f.onnx")
    made = precision.to_fp16(path, folder / "h.onnx").save()
    assert [f for f in checks.find(made.path, ("tensorrt-rtx",)) if f.severity == "error"] == []
    request = BuildRequest("fp16", target, (1, 4), options={"verify_rebuild": False})
    engine = child.call(build_engine, "tensorrt-rtx", made, request, folder, timeout_s=120.0)
    assert "Float" not in engine.facts["layers"].get("convolution", {})


@examples(10)
@given(
    kinds=nets.KINDS,
    head=nets.HEAD,
    seed=SEEDS,
    unsigned=st.sampled_from(((False, False), (False, False), (True, False), (True, True))),
    per_channel=st.booleans(),
    extras=st.fixed_dictionaries(
        {
            "ActivationSymmetric": MOSTLY,
            "WeightSymmetric": MOSTLY,
            "QuantizeBias": MOSTLY.map(lambda value: not value),
            "DedicatedQDQPair": st.booleans(),
            "ForceQuantizeNoInputCheck": st.booleans(),
        }
    ),
)
def test_what_the_checks_pass_of_another_quantizer_the_builder_accepts(
    child: children.Child,
    tmp_path_factory: pytest.TempPathFactory,
    kinds: Grown,
    head: Grown,
    seed: int,
    unsigned: tuple[bool, bool],
    per_channel: bool,
    extras: dict[str, bool],
) -> None:
    """ONNX Runtime's quantizer, with whatever settings."""
    folder = tmp_path_factory.mktemp("random")
    path = nets.Net.grown(seed, kinds, head).save(folder / "f.onnx")
    made = trt_graphs.artifact(
        trt_graphs.quantized_by_onnxruntime(path, folder / "q.onnx", unsigned, per_channel, extras), "int8"
    )
    refused = [f for f in checks.lint(made.path, "tensorrt-rtx") if f.severity == "error"]
    if refused:
        return
    request = BuildRequest("mixed", "sm89", (1, 4), options={"verify_rebuild": False})
    try:
        engine = child.call(build_engine, "tensorrt-rtx", made, request, folder, timeout_s=120.0)
    except BackendFailed as exc:
        raise AssertionError(f"the checks passed it, and: {exc}; {kinds} {head} {unsigned} {per_channel} {extras}") from exc
    assert engine.facts["plan_layers"] > 0
