"""What each layer costs alone, at the model's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deploykit.children import report_progress
from deploykit.errors import DeploykitError
from deploykit.quantized_layers import View
from deploykit.samples import Samples
from deploykit.stages.layers import alone
from deploykit.stages.layers.match import Match
from deploykit.stages.layers.statistics import Error
from deploykit.stages.layers.sums import batches, opened

_GROUP_BYTES = 512 << 20  # of models open at once
_GROUP = 6


@dataclass(frozen=True)
class Own:
    """The SQNR in dB of the model's output (the worst of several) with one layer quantized; None with the reason why it was
    not measured, or without one where the output did not change."""

    sqnr_db: float | None
    why: str


def measure(mine: View, chosen: Mapping[int, Match], name: str, samples: Samples, batch: int, threads: int) -> dict[int, Own]:
    """For each chosen layer what it costs alone. The samples pass once for every few layers, beside the reference."""
    size = max(1, min(_GROUP, _GROUP_BYTES // max(mine.model.ByteSize(), 1)))
    found: dict[int, Own] = {}
    keys = list(chosen)
    for start in range(0, len(keys), size):
        group = {key: chosen[key] for key in keys[start : start + size]}
        found.update(_group(mine, group, name, samples, batch, threads, (start / len(keys), len(group) / len(keys))))
    return found


def _group(
    mine: View,
    group: Mapping[int, Match],
    name: str,
    samples: Samples,
    batch: int,
    threads: int,
    progress: tuple[float, float],
) -> dict[int, Own]:
    outputs = [value.name for value in mine.model.graph.output]
    base = opened(mine.model, name, outputs, samples, batch, threads)
    result: dict[int, Own] = {}
    sessions = {}
    for key, match in group.items():
        try:
            sessions[key] = opened(alone.graph(mine, match), f"{name} ({match.layer.name})", outputs, samples, batch, threads)
        except DeploykitError as exc:  # this layer's graph only; said in its row
            result[key] = Own(None, exc.message)
    errors: dict[int, dict[str, Error]] = {key: {output: Error() for output in base.layouts} for key in sessions}
    done, (first, share) = 0, progress
    for feeds, count in batches(samples, base, *sessions.values()):
        wanted = base.run(feeds)
        for key, session in sessions.items():
            got = session.run(feeds)
            for output, tensor in wanted.items():
                if output in got:
                    rows = base.rows(output, tensor, feeds, count)
                    errors[key][output].see(rows, session.rows(output, got[output], feeds, count))
        done += count
        report_progress("layers alone", first + share * done / len(samples))
    for key, by_output in errors.items():
        known = [error.sqnr_db for error in by_output.values()]
        if any(not error.finite for error in by_output.values()):
            result[key] = Own(None, "the output is not finite")
            continue
        result[key] = Own(min((db for db in known if db is not None), default=None), "")
    return result
