"""The explanation of one engine's speed: its time by kind, the findings, and a verdict in one line."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import quantized_layers
from deploykit.artifact import Artifact
from deploykit.backends import onnx_runtime_profile, openvino_profile
from deploykit.errors import UnknownName
from deploykit.kernel_profile import KINDS, KernelProfile
from deploykit.session import OpenRequest
from deploykit.signature import Feeds
from deploykit.stages.bottleneck import causes
from deploykit.stages.bottleneck.causes import Finding

BACKENDS = {"onnxruntime": onnx_runtime_profile.profile, "openvino": openvino_profile.profile}
_LITTLE = 0.10  # of the time outside integer kernels: below it nothing in the graph is worth a change
_UNAVOIDABLE = "unavoidable"


@dataclass(frozen=True)
class Explanation:
    """A profile, what was found in it (the costliest first), and the verdict."""

    profile: KernelProfile
    findings: tuple[Finding, ...]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        p = self.profile
        return {
            "backend": p.backend,
            "batch": p.batch,
            "threads": p.threads,
            "runs": p.runs,
            "run_s": p.run_s,
            "kernels_s": p.seconds,
            "verdict": self.verdict,
            "kinds": [
                {
                    "kind": kind,
                    "what": what,
                    "kernels": len(found),
                    "seconds": sum(k.seconds for k in found),
                    "share": p.share(found),
                }
                for kind, what in KINDS.items()
                if (found := p.of_kind(kind))
            ],
            "findings": [finding.to_json() for finding in self.findings],
            "kernels": [{**kernel.to_json(), "share": p.share([kernel])} for kernel in p.kernels],
        }


def explain(
    backend: str,
    engine: Artifact,
    graph: Path | None,
    request: OpenRequest,
    pool: Sequence[Feeds],
    has: Collection[str],
    arch: str,
) -> Explanation:
    """Runs the engine under its runtime's profiler and reads the profile against `graph`, the .onnx file it was made from
    (None where it is not at hand). `has`: the CPU's features, `arch` its architecture.

    Raises UnknownName for a backend without a profile, and what the backend raises.
    """
    if backend not in BACKENDS:
        raise UnknownName("backend with a profile of its kernels", backend, BACKENDS)
    profile = BACKENDS[backend](engine, request, pool)
    view = None if graph is None else quantized_layers.load(graph)
    return judge(profile, view, has, arch)


def judge(profile: KernelProfile, view: quantized_layers.View | None, has: Collection[str], arch: str) -> Explanation:
    """The findings of a profile, those that cost most first, and the verdict."""
    found = [
        *causes.floats(profile, view),
        *causes.steps(profile, view),
        *causes.reformats(profile),
        *causes.others(profile),
        *causes.dynamic(profile),
        *causes.depthwise(profile, view),
    ]
    found.sort(key=lambda finding: -(finding.share or 0.0))
    found += causes.features(profile, has, arch)
    return Explanation(profile, tuple(found), _verdict(profile, found))


def _verdict(profile: KernelProfile, found: Sequence[Finding]) -> str:
    integer, floating = profile.of_kind("integer"), profile.of_kind("float")
    inside = profile.share(profile.of_kind("integer", "other-integer"))
    whole = len(integer) + len(floating)
    if not whole:
        return "there is no convolution or matrix product in this engine: INT8 has nothing to speed up"
    layers = f"{len(integer)} of {whole} convolutions and matrix products run in integers"
    costs = [f for f in found if f.share is not None and f.code != "depthwise" and not f.remedy.startswith(_UNAVOIDABLE)]
    missing = next((f for f in found if f.code in ("no-vnni", "no-dotprod")), None)
    if not integer:
        return f"none of the {whole} convolutions and matrix products runs in integers: {costs[0].text}; {costs[0].remedy}"
    if 1.0 - inside >= _LITTLE and costs:
        worst = costs[0]
        return (
            f"{layers}, and {(1.0 - inside) * 100:.0f} % of the time goes outside integer kernels; the largest cost, "
            f"{(worst.share or 0.0) * 100:.0f} %, is {worst.text}; {worst.remedy}"
        )
    if missing is not None:
        return (
            f"{layers}, with {inside * 100:.0f} % of the time in integer kernels: what holds it back is the CPU: {missing.text}"
        )
    bound = next((f for f in found if f.code == "depthwise"), None)
    more = f"; {(bound.share or 0.0) * 100:.0f} % are depthwise convolutions, which gain least from integers" if bound else ""
    return f"{layers}, with {inside * 100:.0f} % of the time in integer kernels: the graph leaves nothing to gain{more}"
