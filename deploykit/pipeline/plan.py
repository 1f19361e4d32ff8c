"""The plan: every row of the table before any work, with the reason of each one that will not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deploykit import backends
from deploykit.errors import EXIT_MISSING, UnknownName
from deploykit.pipeline.request import RowsRequest
from deploykit.session import PRECISIONS, Missing
from deploykit.signature import Signature
from deploykit.verdict import Finding

_TORCH_KINDS = ("torchvision", "timm", "factory", "pt2", "keras")


@dataclass(frozen=True)
class PlannedRow:
    """One row to come. `skip` says why it will not run; `runnable` False means built here, run elsewhere."""

    name: str
    backend: str
    precision: str
    target: str
    batch: int
    reference: bool = False
    skip: str = ""
    skip_code: int = 0
    runnable: bool = True
    cannot_run: str = ""

    @property
    def engine_key(self) -> tuple[str, str, str, str]:
        """Rows that share one engine share this: model, backend, precision, target."""
        return (self.name, self.backend, self.precision, self.target)

    @property
    def id(self) -> str:
        """The row in words, unique in a table."""
        where = "" if self.target == "cpu" else f" {self.target}"
        return f"{self.name} {self.backend} {self.precision}{where} b{self.batch}"


def check_names(request: RowsRequest) -> None:
    """Raises UnknownName for a backend, precision or target that deploykit does not know."""
    for name in request.backends or ():
        backends.get(name)
    for precision in request.precisions or ():
        if precision not in PRECISIONS:
            raise UnknownName("precision", precision, PRECISIONS)
    known = {t for name in backends.names() for t in backends.get(name).all_targets()}
    for target in request.targets or ():
        if target not in known:
            raise UnknownName("target", target, known)


def reference_of(kind: str) -> str:
    """The backend of the reference row: PyTorch eager where the source is PyTorch's, else ONNX Runtime."""
    return "torch" if kind in _TORCH_KINDS and backends.get("torch").missing() is None else "onnxruntime"


def plan(
    name: str,
    kind: str,
    signature: Signature,
    request: RowsRequest,
    *,
    base_precision: str = "fp32",
    findings: Sequence[Finding] = (),
) -> list[PlannedRow]:
    """Every row of one model, the reference of each batch first.

    `base_precision` is the precision the given graph already has; other ones are offered only for an FP32 graph.
    """
    check_names(request)
    reference = reference_of(kind)
    refused = {f.target: f for f in findings if f.severity == "error" and f.target != "any"}
    rows: list[PlannedRow] = []
    chosen = list(request.backends) if request.backends is not None else list(backends.default_names())
    for backend_name in [reference, *(b for b in chosen if b != reference)]:
        named = request.backends is not None and backend_name in request.backends
        wanted = _precisions(backend_name, request, base_precision, is_reference=backend_name == reference)
        if request.backends is not None and not named:
            wanted = [base_precision]  # only there to be the reference
        for precision in wanted:
            for target in _targets(backend_name, request):
                row = PlannedRow(
                    name, backend_name, precision, target, 0, backend_name == reference and precision == base_precision
                )
                rows.append(_judge(row, kind, base_precision, refused))
    if request.backends is not None and reference not in request.backends and all(r.skip for r in rows if r.backend != reference):
        why = "nothing that was asked for can run here, so there is nothing to hold against it"
        rows = [r if r.backend != reference or r.skip else replace(r, skip=why) for r in rows]
    return [_at_batch(row, batch, signature) for batch in _batches(signature, request) for row in rows]


def _precisions(backend_name: str, request: RowsRequest, base: str, *, is_reference: bool) -> list[str]:
    offered = backends.get(backend_name).precisions()
    if request.precisions is None:
        wanted = list(offered) if base == "fp32" else [base]
    else:
        wanted = [p for p in request.precisions if p in offered or request.backends is not None or _can(backend_name, p)]
    if is_reference and base not in wanted:
        wanted.insert(0, base)
    return wanted


def _can(backend_name: str, precision: str) -> bool:
    backend = backends.get(backend_name)
    return any(backend.unsupported(precision, target) is None for target in backend.targets())


def _targets(backend_name: str, request: RowsRequest) -> tuple[str, ...]:
    backend = backends.get(backend_name)
    if request.targets is None:
        return backend.targets()
    mine = tuple(t for t in request.targets if t in backend.all_targets())
    return mine if mine or backend.targets() != ("cpu",) else ("cpu",)


def _judge(row: PlannedRow, kind: str, base: str, refused: Mapping[str, Finding]) -> PlannedRow:
    backend = backends.get(row.backend)
    missing = backend.missing() or backend.unsupported(row.precision, row.target)
    if missing is not None:
        return replace(row, skip=str(missing), skip_code=EXIT_MISSING)
    if backend.graph(row.precision).startswith("source") and kind not in _TORCH_KINDS:
        why = f"{row.backend} runs PyTorch models, and this is an .onnx file; give the PyTorch source instead"
        return replace(row, skip=why, skip_code=EXIT_MISSING)
    if base not in ("fp32", row.precision):
        return replace(
            row, skip=f"the graph is {base} already; give the FP32 model to have other precisions", skip_code=EXIT_MISSING
        )
    if row.backend in refused:
        finding = refused[row.backend]
        return replace(row, skip=f"{finding.code}: {finding.message}; {finding.remedy}", skip_code=EXIT_MISSING)
    cannot = backend.cannot_run()
    if cannot is None and row.target != "cpu" and backend.targets() == ("cpu",):
        cannot = Missing(f"it is cross-compiled for {row.target}", "copy it to such a machine")
    return replace(row, runnable=cannot is None, cannot_run="" if cannot is None else str(cannot))


def _batches(signature: Signature, request: RowsRequest) -> list[int]:
    batches = list(dict.fromkeys(request.batches))
    fixed = signature.fixed_batch
    if fixed is not None and fixed not in batches:
        batches.append(fixed)
    return batches


def _at_batch(row: PlannedRow, batch: int, signature: Signature) -> PlannedRow:
    fixed = signature.fixed_batch
    if fixed is not None and batch != fixed and not row.skip:
        why = f"the graph has batch {fixed} baked in; it runs at batch {fixed} only (export it with a dynamic batch axis)"
        return replace(row, batch=batch, skip=why)
    return replace(row, batch=batch)
