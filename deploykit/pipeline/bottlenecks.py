"""Why an engine is no faster: its runtime's own profile, taken in a child process and explained."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit import backends, children, data, machine, preprocess
from deploykit.artifact import Artifact
from deploykit.children import BugInChild
from deploykit.errors import DeploykitError, InputError, MissingBackend, OutOfSpace
from deploykit.kernel_profile import KINDS
from deploykit.measurement import Measurement
from deploykit.pipeline import engines, single
from deploykit.pipeline.measuring import Entry, Results
from deploykit.pipeline.request import DataRequest, Narrator, RowsRequest
from deploykit.pipeline.workshop import backend_code
from deploykit.session import OpenRequest
from deploykit.signature import Feeds, ShapeRange, Signature
from deploykit.stages import bottleneck
from deploykit.stages.bottleneck import Explanation
from deploykit.store import Key, Store, source_hash

FOLDER = "explanations"
POOL = 4  # different inputs
PROFILE_TIMEOUT_S = 600.0


def explain(
    path: Path,
    backend_name: str | None,
    request: DataRequest,
    shapes: Mapping[str, ShapeRange],
    narrator: Narrator,
    *,
    batch: int = 1,
    threads: int | None = None,
) -> Explanation:
    """The explanation of the engine or .onnx file at `path`; a backend must be named for an .onnx file alone, and an engine
    has its own. Without data random inputs serve: the time hardly depends on them.

    Raises InputError for a folder of several engines, a file of another backend's, data that do not fit; MissingBackend.
    """
    engine, name, own = _engine(path, backend_name)
    backend = backends.get(name)
    missing = backend.cannot_run()
    if missing is not None:
        raise MissingBackend(f"{path} cannot run here: {missing.why}", missing.remedy)
    size = engine.signature.fixed_batch or batch
    used = preprocess.chosen(request.preprocess, own.get("preprocess"))
    spec = request.data or f"random:{POOL * size}"
    samples = data.open(spec, engine.signature, preprocess=used, limit=POOL * size, shapes=shapes)
    pool = [feeds for feeds, _ in samples.batches(size, pad=True)]
    count = threads or children.available_threads()
    narrator.step(f"profile {path.name} with {name}, batch {size}, {count} threads")
    opened = OpenRequest(engine.precision, size, count, dict(shapes))
    graph = engine.path if engine.path.suffix == ".onnx" else None
    return children.run(
        f"profile {path.name}",
        bottleneck.explain,
        *(name, engine, graph, opened, pool, machine.features(), platform.machine()),
        threads=count,
        timeout_s=PROFILE_TIMEOUT_S,
    )


def of_entries(
    entries: Sequence[Entry],
    results: Results,
    pools: Mapping[int, Sequence[Feeds]],
    pool_digest: str,
    rows: RowsRequest,
    store: Store,
    narrator: Narrator,
) -> dict[str, dict[str, Any]]:
    """'name backend precision' -> why it is not faster, of each measured INT8 engine whose runtime has a profile, at its least
    batch; from the store where the same engine was explained before. A profile that fails says so in its 'verdict': it costs
    no row."""
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda e: e.row.batch):
        row = entry.row
        name = f"{row.name} {row.backend} {row.precision}"
        quantized = row.precision in ("int8", "int8-dynamic", "mixed") and row.backend in bottleneck.BACKENDS
        if not quantized or name in found or not isinstance(results.measured.get(row.id), Measurement):
            continue
        count = rows.threads or children.available_threads()
        key = _key(entry, pool_digest, rows, count)
        if rows.remeasure:
            store.drop(FOLDER, key)
        kept = store.find(FOLDER, key)
        if kept is not None:
            found[name] = json.loads(kept.path.read_text())
            continue
        graph = entry.engine.path if entry.engine.path.suffix == ".onnx" else None
        narrator.step(f"profile {name}, batch {row.batch}")
        try:
            made = children.run(
                f"profile {name}",
                bottleneck.explain,
                *(row.backend, entry.engine, graph, entry.request(row.batch, rows, count), list(pools[row.batch])[:POOL]),
                *(machine.features(), platform.machine()),
                threads=count,
                timeout_s=PROFILE_TIMEOUT_S,
            )
        except OutOfSpace:
            raise
        except (DeploykitError, BugInChild) as exc:
            why = children.in_a_line(exc)
            found[name] = {"verdict": f"not profiled: {why}", "batch": row.batch, "findings": []}
            continue
        doc = made.to_json()
        found[name] = {part: doc[part] for part in ("verdict", "batch", "threads", "kinds", "findings")}
        _keep(store, key, found[name])
    return found


def _key(entry: Entry, pool: str, rows: RowsRequest, threads: int) -> Key:
    package = Path(__file__).parent.parent
    code = [*backend_code(entry.row.backend), *sorted((package / "stages" / "bottleneck").glob("*.py"))]
    code += [package / "kernel_profile.py", package / "quantized_layers.py", Path(__file__)]
    options: dict[str, Any] = {
        "engine": [entry.engine.sha256, entry.engine.parent, dict(entry.options)],
        "row": entry.row.id,
        "pool": pool,
        "threads": threads,
        "shapes": repr(sorted(rows.shapes.items())),
        "machine": machine.fingerprint(),
    }
    return Key("explain", source_hash(*code), None, options, backends.get(entry.row.backend).versions())


def _keep(store: Store, key: Key, doc: Mapping[str, Any]) -> None:
    def build(folder: Path) -> Artifact:
        path = folder / "explanation.json"
        path.write_text(json.dumps(doc))
        return Artifact(path, "explanation", "none", Signature((), ()), "explain")

    store.make(FOLDER, key, build)


def _engine(path: Path, backend_name: str | None) -> tuple[Artifact, str, Mapping[str, Any]]:
    found = engines.find(path)
    if len(found) > 1:
        raise InputError(f"{path} holds {len(found)} engines", f"name one, e.g. {found[0].path}")
    if found:
        made = str(found[0].options["backend"])
        if backend_name not in (None, made):
            raise InputError(f"{path} is an engine of {made}, not of {backend_name}", f"leave --backend out, or name {made}")
        return found[0], made, found[0].facts
    if backend_name is None:
        raise InputError(f"{path} is an .onnx file, which several runtimes take", "name one: --backend onnxruntime or openvino")
    model = single.open_model(path).artifact
    return replace(model, precision="int8"), backend_name, model.facts


def kind_rows(found: Explanation) -> list[list[str]]:
    """what, kernels, milliseconds a run, share of the time; in the order of KINDS."""
    p = found.profile
    rows = []
    for kind, what in KINDS.items():
        kernels = p.of_kind(kind)
        if kernels:
            rows.append(
                [what, str(len(kernels)), f"{sum(k.seconds for k in kernels) * 1e3:.3f}", f"{p.share(kernels) * 100:.1f} %"]
            )
    return rows


def kernel_rows(found: Explanation, top: int) -> list[list[str]]:
    """The `top` kernels that take most time: name, operator, precision, milliseconds a run, share, implementation."""
    p = found.profile
    slowest = sorted(p.kernels, key=lambda kernel: -kernel.seconds)[:top]
    return [
        [k.name, k.op, k.precision or "-", f"{k.seconds * 1e3:.3f}", f"{p.share([k]) * 100:.1f} %", k.detail or KINDS[k.kind]]
        for k in slowest
    ]


def finding_rows(found: Explanation) -> list[list[str]]:
    """share of the time, what was found, what to do."""
    return [["" if f.share is None else f"{f.share * 100:.1f} %", f"{f.text} -> {f.remedy}"] for f in found.findings]
