"""What every session checks before it touches its engine: one batch, the signature's names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import InputError
from deploykit.session import OpenRequest
from deploykit.signature import Feeds, Outputs, Signature


def require_batch(signature: Signature, request: OpenRequest) -> None:
    """Raises InputError for a batch that is no batch, or that the graph cannot take."""
    if request.batch < 1 or request.threads < 1:
        raise InputError(f"batch {request.batch} on {request.threads} threads cannot be run", "both must be at least 1")
    if signature.fixed_batch is not None:
        signature.shapes(request.batch, request.shapes)


def ready(signature: Signature, request: OpenRequest, feeds: Feeds, *, static: bool = False) -> Outputs:
    """The feeds as contiguous arrays in the signature's order, once they fit the signature at the opened batch.

    `static`: the engine was made for the `opt` shapes of `request.shapes` and takes no others.
    Raises InputError for a wrong name, dtype, rank or size, and for another batch than the opened one.
    """
    signature.check(feeds)
    batch = request.batch
    for spec in signature.inputs:
        axis = signature.batch_axis(spec)
        if axis is not None and feeds[spec.name].shape[axis] != batch:
            raise InputError(
                f"input '{spec.name}' has batch {feeds[spec.name].shape[axis]} (axis {axis}), this engine was opened at {batch}",
                f"feed {batch} samples at a time, or open the engine at another batch",
            )
    for name, shape in signature.shapes(batch, request.shapes).items() if static else ():
        if feeds[name].shape != shape:
            raise InputError(
                f"input '{name}' has shape {feeds[name].shape}, this engine was opened at {shape}",
                "open it with the shape of the data as the middle one of --shapes",
            )
    # np.ascontiguousarray would make a 0-d array 1-d
    return {spec.name: np.asarray(feeds[spec.name], order="C") for spec in signature.inputs}


def by_name(signature: Signature, arrays: Mapping[str, NDArray[Any]]) -> Outputs:
    """The outputs under the signature's names, in its order."""
    return {spec.name: arrays[spec.name] for spec in signature.outputs}


def first_line(exc: BaseException) -> str:
    """What an engine's exception says, on one line of at most 300 characters."""
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text if len(text) <= 300 else text[:297] + "..."
