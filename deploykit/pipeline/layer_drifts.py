"""Layer by layer, where the quantized graphs of a run left the float one: a few judging samples through both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploykit import backends, children
from deploykit.artifact import Artifact
from deploykit.children import BugInChild
from deploykit.errors import DeploykitError, OutOfSpace
from deploykit.pipeline.target import Target
from deploykit.pipeline.workshop import STAGE_TIMEOUT_S, Workshop
from deploykit.samples import Samples
from deploykit.signature import Signature
from deploykit.stages import layers

KINDS = ("int8-cpu", "int8-tensorrt", "mixed")
SAMPLES = 16
BATCH = 8


def of_targets(models: Sequence[Target], judge: Samples | None) -> dict[str, dict[str, Any]]:
    """'name kind' -> {'rows': the engines made from that graph, 'n', 'layers': `LayerDrift.to_json()` of each, the worst first,
    'notes'}; from the store where the same two graphs were compared before. No layer is quantized alone (`deploykit compare
    --per-layer` does that). Nothing without real data; a comparison that fails says so in 'notes': it costs no row."""
    if judge is None or judge.random or not len(judge):
        return {}
    few = judge.take(range(min(len(judge), SAMPLES)), judge.role)
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        shop = model.shop
        if shop is None:
            continue
        for kind in (kind for kind in KINDS if kind in shop.graphs):
            rows = [f"{r.backend} {r.precision}" for r in model.rows if not r.skip and _kind(r.backend, r.precision) == kind]
            found[f"{model.name} {kind}"] = {"rows": sorted(set(rows)), **_compared(shop, shop.graphs[kind], few)}
    return found


def _kind(backend: str, precision: str) -> str:
    return backends.get(backend).graph(precision)


def _compared(shop: Workshop, graph: Artifact, few: Samples) -> dict[str, Any]:
    def build(folder: Path) -> Artifact:
        found = children.run(
            *("layers", layers.find, shop.model.path, graph.path, few, BATCH, None, 0),
            progress=shop.narrator.progress,
            timeout_s=STAGE_TIMEOUT_S,
        )
        path = folder / "layers.json"
        path.write_text(json.dumps({"n": found.n, "layers": [x.to_json() for x in found.layers], "notes": list(found.notes)}))
        return Artifact(path, "layers", "none", Signature((), ()), "layers")

    options = {"graph": graph.sha256, "samples": few.digest}
    try:
        kept = shop.keep(
            "layers", f"compare the layers of {graph.options.get('kind', 'the graph')}", shop.model.sha256, options, build
        )
    except OutOfSpace:
        raise
    except (DeploykitError, BugInChild) as exc:
        why = children.in_a_line(exc)
        return {"n": 0, "layers": [], "notes": [f"not compared layer by layer: {why}"]}
    doc: dict[str, Any] = json.loads(kept.path.read_text())
    return doc
