"""A target on its way: a model or a ready-made engine, its planned rows, and what was built for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.errors import ChecksFailed, DeploykitError, InputError, MissingBackend
from deploykit.pipeline import engines, prepare
from deploykit.pipeline.plan import PlannedRow, plan
from deploykit.pipeline.request import Narrator, RowsRequest, SourceRequest
from deploykit.pipeline.workshop import Workshop
from deploykit.signature import Signature
from deploykit.store import Store


@dataclass
class Target:
    """One target on its way: its planned rows, and per engine the artifact or what stopped it. asked: what the user wrote; the engines
    of one folder have it in common."""

    name: str
    signature: Signature
    rows: list[PlannedRow]
    shop: Workshop | None
    built: dict[tuple[str, str, str, str], Artifact | DeploykitError] = field(default_factory=dict)
    asked: str = ""

    def runs(self) -> set[tuple[str, str, str, str]]:
        """The engines that were built and can run here."""
        return {
            r.engine_key for r in self.rows if not r.skip and r.runnable and isinstance(self.built.get(r.engine_key), Artifact)
        }


def open_targets(target: SourceRequest, rows: RowsRequest, store: Store, say: Narrator) -> list[Target]:
    """The model, or every engine, that `target` names; with their planned rows. Raises ChecksFailed for a file that no
    engine could load, InputError for a folder without engines, and what the export raises."""
    path = Path(target.text)
    found = engines.find(path)
    if found:
        return [replace(_engine_model(engine, rows), asked=target.text) for engine in found]
    if path.is_dir():
        raise InputError(
            f"the folder {path} holds no deploykit engines (*.manifest.json)", "give an .onnx file, an engine or a SOURCE"
        )
    shop = prepare.open_source(target, store, say, batches=rows.batches)
    chosen = rows.backends or backends.default_names()
    prepare.check(shop, tuple(chosen), rows.shapes)
    errors = [f for f in shop.findings if f.severity == "error" and f.target == "any"]
    if errors:
        raise ChecksFailed(
            f"{errors[0].code}: {errors[0].message}" + (f" (node {errors[0].node})" if errors[0].node else ""), errors[0].remedy
        )
    base = shop.base_precision
    planned = plan(shop.name, shop.spec.kind, shop.signature, rows, base_precision=base, findings=shop.findings)
    return [Target(shop.name, shop.signature, planned, shop, asked=target.text)]


def _engine_model(engine: Artifact, request: RowsRequest) -> Target:
    """A ready-made engine as a target: one row a batch on the backend that made it."""
    backend_name = str(engine.options.get("backend", ""))
    backend = backends.get(backend_name)
    name = str(engine.options.get("model") or engine.path.stem)
    if request.backends is not None and backend_name not in request.backends:
        raise InputError(f"{engine.path.name} is an engine of {backend_name}, not of {', '.join(request.backends)}")
    missing = backend.cannot_run()
    if missing is not None:
        raise MissingBackend(f"{engine.path.name} cannot run here: {missing.why}", missing.remedy)
    fixed = engine.signature.fixed_batch
    batches = (fixed,) if fixed is not None else request.batches
    rows = [PlannedRow(name, backend_name, engine.precision, engine.device, batch) for batch in batches]
    return Target(name, engine.signature, rows, None, {rows[0].engine_key: engine})


def name_apart(models: Sequence[Target]) -> None:
    """Gives two targets of one name and the same rows names of their own: model, model#2."""
    seen: dict[tuple[str, str, str, str], int] = {}
    for model in models:
        keys = {row.engine_key for row in model.rows}
        clash = max((seen.get(key, 0) for key in keys), default=0)
        for key in keys:
            seen[key] = clash + 1
        if clash:
            model.name = f"{model.name}#{clash + 1}"
            renamed = [replace(row, name=model.name) for row in model.rows]
            model.built = {(model.name, *key[1:]): value for key, value in model.built.items()}
            model.rows = renamed
