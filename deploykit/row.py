"""Row: one line of the table; the JSON and the CSV share its names. None where something was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Row:
    """status: ok | built | skipped | failed. Times in seconds, top1/top5/agreement/cov as fractions, drops in
    percentage points (positive = worse), speedup over the report's reference at the same batch. roofline_share: of the
    nearer ceiling, a fraction; bound_by: compute | memory | overhead. scenario: of
    MLPerf's LoadGen, its figure in `scenario_unit` (s or samples/s), and its own verdict. streams: requests at once, which
    share the threads. layout: of images and filters in memory, where it is not the backend's usual one."""

    name: str
    backend: str
    precision: str
    batch: int
    status: str
    reason: str = ""
    device: str | None = None
    threads: int | None = None
    images_per_s: float | None = None
    p50_s: float | None = None
    p90_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None
    cov: float | None = None
    stable: bool | None = None
    n_timed: int | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    top1: float | None = None
    top5: float | None = None
    top1_drop_pp: float | None = None
    top1_drop_low: float | None = None
    top1_drop_high: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    size_bytes: int | None = None
    peak_rss_bytes: int | None = None
    build_s: float | None = None
    roofline_share: float | None = None
    clock: str | None = None
    boundary: str | None = None
    notes: str = ""
    bound_by: str | None = None
    scenario: str | None = None
    scenario_value: float | None = None
    scenario_unit: str | None = None
    scenario_valid: bool | None = None
    streams: int | None = None
    layout: str | None = None

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What makes it the same row in another report: name, backend, precision, batch, device."""
        return (self.name, self.backend, self.precision, self.batch, self.device or "")

    @property
    def is_copy(self) -> bool:
        """Whether it is an A/A copy of the reference, there to show the machine's own spread."""
        return "A/A:" in self.notes

    @property
    def label(self) -> str:
        """The row in words, for messages."""
        where = f" {self.device}" if self.device and self.device.startswith("sm") else ""
        return f"{self.name} {self.backend} {self.precision}{where} batch {self.batch}"

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> Row:
        """The row that `to_json` wrote; names it does not know are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in doc.items() if k in known})


COLUMNS = tuple(f.name for f in fields(Row))
