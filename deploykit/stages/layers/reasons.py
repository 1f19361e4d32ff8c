"""Why a layer loses accuracy: what its values, its weights and its scales say, each with the figure behind it.

The thresholds are in levels: 8 bits have 256, and a channel or the bulk of a tensor that is left with fewer than about a
sixth of them keeps less than 6 bits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.layer import Layer, Pair
from deploykit.stages.layers.statistics import Rounding, Spread, decibels

OUTLIER = 6.0  # the range over the 99.9th percentile of magnitudes: from here on 99.9 % have fewer than 43 of 256 levels
UNEQUAL = 16.0  # the largest channel over the median one: the median has 16 levels or fewer
UNEQUAL_WEIGHTS = 8.0
UNUSED = 2.0  # the range over the largest value: from here on more than half of the levels are never used
CLIPPED = 0.5  # share of the rounding error that values out of range make
RARE = 1e-5  # share of values out of range below which nobody speaks of saturation
WEAK_WEIGHTS_DB = 30.0  # INT8 weights per channel usually keep 38 to 44 dB
WEAK_INPUT_DB = 30.0


@dataclass(frozen=True)
class Reason:
    """One finding about a layer: a code and what was seen, in words."""

    code: str
    text: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def weight_sqnr_db(mine: NDArray[Any] | None, other: NDArray[Any] | None) -> float | None:
    """The SQNR of the candidate's weight against the reference's, in dB; None where they cannot be compared."""
    if mine is None or other is None or mine.shape != other.shape:
        return None
    difference = other.astype(np.float64) - mine
    return decibels(float(np.square(mine, dtype=np.float64).sum()), float(np.square(difference).sum()))


def of_range(spread: Spread | None, rounding: Rounding | None, what: str) -> list[Reason]:
    """What is wrong with the range that a per-tensor activation pair was given."""
    if spread is None or rounding is None or not spread.seen.seen or spread.amax == 0.0:
        return []
    pair = rounding.pair
    found = []
    low, high = pair.reach
    reach = max(abs(low), abs(high))
    bulk = spread.magnitude(0.999)
    if reach > UNUSED * spread.amax:
        used = (spread.seen.high - spread.seen.low) / max(high - low, 1e-30)
        found.append(
            Reason(
                "few-levels", f"{what}: its range reaches {reach:.3g}, no value is above {spread.amax:.3g}: {_levels(used, pair)}"
            )
        )
    elif bulk > 0 and reach > OUTLIER * bulk:
        below, above = spread.reach(0.999)
        used = (above - below) / max(high - low, 1e-30)
        found.append(
            Reason(
                "range-outlier",
                f"{what}: its range reaches {reach:.3g}, 99.9 % of its values stay within {bulk:.3g}: {_levels(used, pair)} for them",
            )
        )
    if rounding.noise > 0 and rounding.count:
        share = rounding.outside / rounding.count
        if share > RARE and rounding.clipped > CLIPPED * rounding.noise:
            found.append(
                Reason(
                    "saturation",
                    f"{what}: {share * 100:.2g} % of its values lie outside {low:.3g} to {high:.3g} and make "
                    f"{rounding.clipped / rounding.noise * 100:.0f} % of its error",
                )
            )
    channels = spread.channel_amax
    if channels is not None and channels.size > 1 and (alive := channels[channels > 0]).size > 1:
        median = float(np.median(alive))
        if reach > UNEQUAL * median and not any(r.code in ("few-levels", "range-outlier") for r in found):
            found.append(
                Reason(
                    "unequal-channels",
                    f"{what}: one scale for {channels.size} channels, of which the median reaches {median:.3g} and the largest "
                    f"{float(alive.max()):.3g}: {_levels(2 * median / max(high - low, 1e-30), pair)} for the median",
                )
            )
    return found


def of_weights(layer: Layer, other: Layer | None, sqnr_db: float | None) -> list[Reason]:
    """What is wrong with how the weights became integers."""
    if other is None or other.weight_pair is None or other.weight is None:
        return []
    found = []
    amax = _channel_amax(other.weight, layer.axis)
    if other.weight_pair.per_tensor and amax.size > 1 and (alive := amax[amax > 0]).size > 1:
        median = float(np.median(alive))
        if alive.max() > UNEQUAL_WEIGHTS * median:
            found.append(
                Reason(
                    "per-tensor-weights",
                    f"weights: one scale for {amax.size} channels, of which the median reaches {median:.3g} and the largest "
                    f"{alive.max():.3g}: quantize them per channel",
                )
            )
    if sqnr_db is not None and sqnr_db < WEAK_WEIGHTS_DB and not found:
        found.append(Reason("weight-rounding", f"weights: {sqnr_db:.1f} dB are left of them after rounding to integers"))
    return found


def of_channels(layer: Layer, spread: Spread | None) -> list[Reason]:
    """Output channels that carry nothing: weights all zero, or one value on all samples."""
    if layer.weight is not None and (zero := int((_channel_amax(layer.weight, layer.axis) == 0).sum())):
        whole = layer.weight.shape[layer.axis]
        return [Reason("dead-channels", f"{zero} of {whole} output channels have weights of zero")]
    if spread is None or spread.low is None or spread.high is None or spread.low.size < 2:
        return []
    still = int((spread.low == spread.high).sum())
    if not still:
        return []
    return [Reason("dead-channels", f"{still} of {spread.low.size} output channels never vary on these samples")]


def of_error(local_db: float | None, sqnr_db: float | None, quantized: bool) -> list[Reason]:
    """Whether what is seen at the layer's output came from the layers before it (10 dB above its own part)."""
    if sqnr_db is None:
        return []
    if not quantized:
        return [Reason("inherited", "it runs in float: its error is that of the layers before it")]
    if local_db is not None and local_db > sqnr_db + 10.0:
        return [
            Reason("inherited", f"its own rounding leaves {local_db:.1f} dB: most of the error comes from the layers before it")
        ]
    return []


def of_cost(local_db: float | None, own_db: float | None, least_db: float | None) -> list[Reason]:
    """Whether a layer is among those that cost the output most (within 6 dB of the worst, half the amplitude) though its
    own rounding is fine (10 dB above): the layers after it enlarge the error."""
    if local_db is None or own_db is None or least_db is None or own_db > least_db + 6.0 or local_db < own_db + 10.0:
        return []
    return [
        Reason(
            "amplified",
            f"its own rounding leaves {local_db:.1f} dB, of which the layers after it make {own_db:.1f} dB at the output",
        )
    ]


def together(*parts: float | None) -> float | None:
    """The SQNR of several independent roundings, -10 log10(sum of 10^(-dB / 10)); None where none is known."""
    known = [part for part in parts if part is not None]
    return -10.0 * float(np.log10(sum(10.0 ** (-part / 10.0) for part in known))) if known else None


def _channel_amax(weight: NDArray[Any], axis: int) -> NDArray[Any]:
    return np.asarray(np.abs(weight).max(axis=tuple(a for a in range(weight.ndim) if a != axis % weight.ndim), initial=0.0))


def _levels(share: float, pair: Pair) -> str:
    low, high = pair.levels
    whole = high - low + 1
    return f"{max(1, min(whole, round(share * whole)))} of {whole} levels"
