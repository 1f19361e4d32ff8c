"""Split: which samples train, calibrate and judge; the three never share one.

Every share is cut from one order of the data set: a permutation seeded by its content, stratified by label, so that any
stretch of it holds the classes in their proportions. Training takes its end, calibration its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from deploykit.data.idx import IdxReader
from deploykit.data.images import ImageReader
from deploykit.errors import DataError
from deploykit.samples import Samples

CALIBRATION_N = 512
FEW_TO_CALIBRATE = 32
FEW_TO_JUDGE = 100
TRAIN_SHARE = 0.6
IDX_TRAIN_SHARE = 0.95  # of train-*: the rest is left for calibration


def split(
    samples: Samples,
    *,
    calib: Samples | None = None,
    calib_n: int | None = None,
    exclude: Collection[int] = (),
    judge_n: int | None = None,
) -> tuple[Samples, Samples]:
    """(what calibrates, what judges), disjoint; `exclude` names the samples a model was trained on (reader's indices).

    With one DATA, calibration takes `calib_n` (512 by default), at most half: 8 samples give 4. Of an IDX folder that
    has both files, train-* calibrates and t10k-* judges. With `calib`, calibration is taken from it and all of `samples`
    judges, but for samples they share, which only judge.
    Raises DataError when a share would be empty.
    """
    wanted = CALIBRATION_N if calib_n is None else calib_n
    if wanted < 1:
        raise DataError(f"calibration needs at least one sample, not {wanted}", "use -n 512")
    notes: tuple[str, ...] = ()
    if calib is not None and calib.content != samples.content:
        calibrators, notes = _apart(calib, samples)
        chosen = _order(calibrators)[:wanted]
        judges = held_out(samples, exclude=exclude)
        calibrate = calibrators.take(chosen, "calibrate")
    else:
        if calib is not None:
            notes = ("calibration and judging were given the same data: it was shared between them",)
        calibrate, judges, more = _share_one(samples, wanted, exclude, asked=calib_n is not None)
        notes += more
    if judge_n is not None:
        judges = judges.take(range(min(judge_n, len(judges))), "judge")
    return _noted(calibrate, notes, FEW_TO_CALIBRATE), _noted(judges, notes, FEW_TO_JUDGE)


def held_out(samples: Samples, *, exclude: Collection[int] = ()) -> Samples:
    """What judges when nothing is calibrated: all samples (of an IDX folder with both files: t10k-*) that are not in
    `exclude`. Raises DataError when none is left."""
    free = _without(samples, exclude)
    train, rest = _idx_parts(free)
    positions = rest if train is not None else list(range(len(free)))
    if not positions:
        raise DataError(
            f"{samples.spec}: no sample is left to judge with; the model was trained on all {len(samples)}", "give other data"
        )
    part = free.take(positions, "judge")
    return part.take(_order(part), "judge")


def train_share(samples: Samples, *, exclude: Collection[int] = ()) -> Samples:
    """What training may use, always the same: 60 % of a data set, or 95 % of an IDX folder's train-*; never t10k-*.

    Pass its indices to `split` as `exclude`. `exclude` here keeps samples out of training. Raises DataError when empty.
    """
    train, _ = _idx_parts(samples)
    pool = samples if train is None else samples.take(train, "train")
    order = _order(pool)
    share = TRAIN_SHARE if train is None else IDX_TRAIN_SHARE
    barred = set(exclude)
    kept = [p for p in order[len(order) - int(len(order) * share) :] if pool.indices[p] not in barred]
    if not kept:
        raise DataError(f"{samples.spec} leaves no sample to train on ({len(samples)} in all)", "give more data")
    return pool.take(kept, "train")


def limited(samples: Samples, limit: int) -> Samples:
    """At most `limit` samples, stratified (of an IDX folder: so many of each file), in the data set's order."""
    if limit < 1:
        raise DataError(f"a limit of {limit} leaves no samples", "use --limit 100")
    train, rest = _idx_parts(samples)
    parts = [train, rest] if train is not None else [list(range(len(samples)))]
    chosen: list[int] = []
    for part in parts:
        picked = samples.take(part, samples.role)
        chosen += sorted(part[p] for p in _order(picked)[:limit])
    if len(chosen) == len(samples):
        return samples
    note = f"limited to {len(chosen)} of {len(samples)} samples"
    return replace(samples.take(chosen, samples.role), notes=(*samples.notes, note))


def _share_one(
    samples: Samples, wanted: int, exclude: Collection[int], *, asked: bool
) -> tuple[Samples, Samples, tuple[str, ...]]:
    free = _without(samples, exclude)
    train, rest = _idx_parts(free)
    if train is not None and rest:
        if not train:
            raise DataError(f"{samples.spec}: no training picture is left to calibrate with", "give --calib-data")
        pool, judges = free.take(train, "calibrate"), free.take(rest, "judge")
        return pool.take(_order(pool)[:wanted], "calibrate"), judges.take(_order(judges), "judge"), ()
    if len(free) < 2:
        left = f" once the {len(samples) - len(free)} it was trained on are left out" if len(free) < len(samples) else ""
        raise DataError(
            f"{samples.spec} has {len(free)} sample(s){left}: samples that calibrate never judge, so at least 2 are needed",
            "give more data, or calibrate on other data with --calib-data",
        )
    count = min(wanted, len(free) // 2)
    notes: tuple[str, ...] = ()
    if count < wanted and asked and wanted != CALIBRATION_N:
        notes = (f"{count} of the {wanted} samples asked for calibrate: at most half of one data set may",)
    order = _order(free)
    judges = free.take(order[count:], "judge")
    # The same picture under two names would judge what it calibrated: it only judges.
    calibrate, dropped = _apart(free.take(order[:count], "calibrate"), judges)
    return calibrate, judges, notes + dropped


def _apart(calib: Samples, judges: Samples) -> tuple[Samples, tuple[str, ...]]:
    """`calib` without the images that `judges` holds too, byte for byte. Raises DataError when none is left."""
    if not isinstance(calib.reader, ImageReader) or not isinstance(judges.reader, ImageReader):
        return calib, ()
    judged = {judges.reader.digests[i] for i in judges.indices}
    keep = [p for p, i in enumerate(calib.indices) if calib.reader.digests[i] not in judged]
    if len(keep) == len(calib):
        return calib, ()
    if not keep:
        raise DataError(
            f"every image of {calib.spec} that could calibrate is among those that judge, byte for byte",
            "calibrate on other images",
        )
    return calib.take(keep, calib.role), (
        f"{len(calib) - len(keep)} image(s) that calibrate and judge have in common only judge",
    )


def _without(samples: Samples, exclude: Collection[int]) -> Samples:
    barred = set(exclude)
    if not barred:
        return samples
    return samples.take([p for p, index in enumerate(samples.indices) if index not in barred], samples.role)


def _idx_parts(samples: Samples) -> tuple[list[int] | None, list[int]]:
    """Positions of train-* and of t10k-*; None for train when this is no IDX folder with both."""
    reader = samples.reader
    if not isinstance(reader, IdxReader) or len(reader.counts) < 2:
        return None, []
    train = [p for p, index in enumerate(samples.indices) if index < reader.train_n]
    return train, [p for p, index in enumerate(samples.indices) if index >= reader.train_n]


def _order(samples: Samples) -> list[int]:
    """Positions in an order fixed by the content: sample k of the m of its class stands at about k/m of the way."""
    rng = np.random.default_rng(int(samples.content[:16], 16))
    shuffled = rng.permutation(len(samples))
    if samples.labels is None:
        return [int(p) for p in shuffled]
    labels = np.asarray(samples.labels)[shuffled]
    place = np.empty(len(samples))
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        place[mine] = (np.arange(len(mine)) + rng.random()) / len(mine)
    return [int(p) for p in shuffled[np.argsort(place, kind="stable")]]


def _noted(samples: Samples, notes: Sequence[str], few: int) -> Samples:
    what = {"calibrate": "calibrate", "judge": "judge"}[samples.role]
    found = [*samples.notes, *notes]
    if len(samples) < few:
        found.append(f"only {len(samples)} samples {what}: " + _what_few_mean(samples))
    return replace(samples, notes=tuple(dict.fromkeys(found)))


def _what_few_mean(samples: Samples) -> str:
    if samples.role == "calibrate":
        return "ranges may be too narrow"
    return f"one sample is {100 / max(1, len(samples)):.{max(0, 1 - math.floor(math.log10(100 / max(1, len(samples)))))}f} pp"


def calibration_share(samples: Samples, wanted: int) -> Samples:
    """At most `wanted` samples to calibrate on, where nothing is judged: of an IDX folder with both files, of train-*."""
    train, _ = _idx_parts(samples)
    pool = samples if not train else samples.take(train, "calibrate")
    if not len(pool):
        raise DataError(f"{samples.spec} holds no sample to calibrate with", "give more data")
    return _noted(pool.take(_order(pool)[:wanted], "calibrate"), (), FEW_TO_CALIBRATE)
