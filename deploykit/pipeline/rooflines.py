"""Each row under the roofline: measured ceilings for what ran here, the datasheet's bound for an engine built for elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deploykit import datasheet, hosted, machine, roofline
from deploykit.artifact import Artifact
from deploykit.children import BugInChild, in_a_line
from deploykit.errors import DeploykitError, OutOfSpace
from deploykit.pipeline.request import Narrator
from deploykit.pipeline.target import Target
from deploykit.report_document import row_id
from deploykit.roofline import Ceilings, Cost
from deploykit.row import Row
from deploykit.signature import Signature
from deploykit.stages import ceilings as measuring
from deploykit.store import Key, Store, source_hash

FOLDER = "ceilings"
_ABOVE = 1.02  # a row that reaches more of its ceiling says that the ceiling was measured on a busy machine


def placed(
    models: Sequence[Target], table: Sequence[Row], store: Store, threads: int, say: Narrator, *, only_kept: bool = False
) -> tuple[list[Row], Ceilings | None]:
    """The rows with their share of the roofline where it can be told, and this machine's ceilings; None where no row ran,
    no model's cost is known, or no engine that measures ceilings is here. The ceilings are the CPU's: rows of another device
    stand under none. Kept ceilings that a row is above are measured anew, once for the same figures. `only_kept`: nothing is
    measured, and where no ceilings are kept the rows have no share."""
    costs = {model.name: cost for model in models if model.shop and (cost := Cost.from_summary(model.shop.summary))}
    rows = [_elsewhere(row, costs) if row.status == "built" else row for row in table]
    able = [row for row in rows if _has_place(row, costs)]
    if not able or measuring.engine() is None:
        return rows, None
    try:
        if only_kept and _kept(store, threads) is None:
            return rows, None
        found, kept = ceilings(store, threads, say)
        if not only_kept and any(share > _ABOVE for row in able if (share := _share(row, costs, found)) is not None):
            mark = _mark(able, threads)
            if kept and store.find(FOLDER, mark) is None:
                found, _ = ceilings(store, threads, say, fresh=True)
            _keep(store, mark, "measured-anew", {})
    except OutOfSpace:
        raise
    except (DeploykitError, BugInChild) as exc:  # the figures stand without their roofline
        why = in_a_line(exc)
        say.step(f"no roofline: {why}")
        return rows, None
    return [_here(row, costs, found) for row in rows], found


def ceilings(store: Store, threads: int, say: Narrator, *, fresh: bool = False) -> tuple[Ceilings, bool]:
    """This machine's ceilings on so many threads, and whether they were kept from before. `fresh`: measured anew, and the
    higher of old and new stands, since a busy machine only ever lowers them. Raises BackendFailed."""
    key = _key(threads)
    before = _kept(store, threads)
    if before is not None and not fresh:
        return before, True
    say.step("ceilings of this machine (kept for the next time)")
    found = measuring.measure(threads, say.progress)
    if before is not None:
        found = _higher(before, found)
        store.drop(FOLDER, key)
    _keep(store, key, "ceilings", found.to_json())
    return found, False


def _key(threads: int) -> Key:
    options = {"machine": machine.fingerprint(), "threads": threads, "engine": measuring.engine()}
    return Key("ceilings", _version(), None, options, measuring.versions())


def _kept(store: Store, threads: int) -> Ceilings | None:
    old = store.find(FOLDER, _key(threads))
    return Ceilings.from_json(json.loads(old.path.read_text())) if old is not None else None


def _version() -> str:
    return source_hash(*(Path(str(m.__file__)) for m in (measuring, roofline, hosted)))


def _mark(rows: Sequence[Row], threads: int) -> Key:
    """What is kept once the ceilings were measured while these rows had these figures."""
    figures = json.dumps([[row_id(row), row.images_per_s] for row in rows])
    options = {
        "machine": machine.fingerprint(),
        "threads": threads,
        "engine": measuring.engine(),
        "rows": hashlib.sha256(figures.encode()).hexdigest(),
    }
    return Key("above", _version(), None, options, measuring.versions())


def _keep(store: Store, key: Key, name: str, doc: Mapping[str, object]) -> None:
    def build(folder: Path) -> Artifact:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(doc, indent=1))
        return Artifact(path, name, "none", Signature((), ()), name)

    store.make(FOLDER, key, build)


def _higher(one: Ceilings, other: Ceilings) -> Ceilings:
    operations, how = dict(one.ops_per_s), dict(one.how)
    for precision, rate in other.ops_per_s.items():
        if rate > operations.get(precision, 0.0):
            operations[precision], how[precision] = rate, other.how.get(precision, "")
    rates = {size: max(rate, other.bytes_per_s.get(size, 0.0)) for size, rate in one.bytes_per_s.items()}
    return replace(other, ops_per_s=operations, bytes_per_s={**other.bytes_per_s, **rates}, how=how)


def _model(row: Row) -> str:
    return row.name.removesuffix(" asked)").rpartition(" (")[0] if row.name.endswith(" asked)") else row.name


def _has_place(row: Row, costs: Mapping[str, Cost]) -> bool:
    """Whether the row can be put under the CPU's ceilings: it ran there, and its model's cost is known."""
    return row.device == "cpu" and row.status == "ok" and bool(row.images_per_s) and _model(row) in costs


def _share(row: Row, costs: Mapping[str, Cost], found: Ceilings) -> float | None:
    here = roofline.place(costs[_model(row)], row.precision, row.batch, row.batch / (row.images_per_s or 1.0), found)
    return None if here is None else here.share


def _here(row: Row, costs: Mapping[str, Cost], found: Ceilings) -> Row:
    if not _has_place(row, costs) or not row.images_per_s:
        return row
    here = roofline.place(costs[_model(row)], row.precision, row.batch, row.batch / row.images_per_s, found)
    return row if here is None else replace(row, roofline_share=here.share, bound_by=here.bound_by)


def _elsewhere(row: Row, costs: Mapping[str, Cost]) -> Row:
    """A built row with its card's bound in the notes: the share stays empty, since nothing was measured."""
    card, cost = datasheet.ceilings(row.device or ""), costs.get(row.name)
    least = roofline.bound(cost, row.precision, row.batch, card) if cost is not None and card is not None else None
    if least is None or card is None:
        return row
    said = (
        f"no faster than {row.batch / least.least_s:,.0f} img/s at batch {row.batch} on an {card.name} by its datasheet "
        f"({least.nearer}); a bound, not a measurement"
    )
    return replace(row, notes="; ".join(x for x in (row.notes, said) if x))
