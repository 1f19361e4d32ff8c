"""--explain: after a build that failed, the smallest part of the graph that still fails, found in child builds."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from deploykit import children
from deploykit.artifact import Artifact
from deploykit.errors import BackendFailed
from deploykit.pipeline import limited
from deploykit.pipeline.limited import Limits
from deploykit.pipeline.prepare import build_engine
from deploykit.session import BuildRequest
from deploykit.trt import explain

BUILD_LIMIT_S = 300.0


def explained(
    failure: BackendFailed,
    backend_name: str,
    graph: Artifact,
    wanted: BuildRequest,
    out: Path,
    limits: Limits | None = None,
    scratch: Path | None = None,
) -> BackendFailed:
    """The failure with what was found about it; the part that still fails is written to `out`. Each attempt has the limits of
    the build that failed, and at most five minutes; what the attempts write lies in `scratch`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = Limits(BUILD_LIMIT_S) if limits is None else replace(limits, seconds=min(limits.seconds, BUILD_LIMIT_S))
    found = children.run(f"explain {backend_name}", find, backend_name, graph, wanted, out, kept, scratch)
    if found is None:
        return BackendFailed(f"{failure.message}; built once more, it did not fail", "try again: the failure is not a steady one")
    return BackendFailed(f"{failure.message}; {found} after {found.builds} builds", failure.remedy)


def find(
    backend_name: str, graph: Artifact, wanted: BuildRequest, out: Path, limits: Limits, scratch: Path | None
) -> explain.Explained | None:
    """The smallest failing part of a graph; each attempt builds in a child of this process."""
    from deploykit import graph as graphs

    # A part may lack the Q/DQ nodes that an INT8 engine must have; 'mixed' is the same build without that demand.
    typed = wanted.precision == "int8" and not wanted.options.get("calibration")
    request = replace(
        wanted, precision="mixed" if typed else wanted.precision, options={**wanted.options, "verify_rebuild": False}
    )

    def attempt(part: Path) -> explain.Failure | None:
        made = replace(graph, path=part, signature=graphs.signature(graphs.load(part)))
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            return explain.outcome(
                lambda: limited.run("attempt", build_engine, backend_name, made, request, Path(folder), limits=limits)
            )

    return explain.smallest_failing(graph.path, attempt, out, scratch=scratch)
