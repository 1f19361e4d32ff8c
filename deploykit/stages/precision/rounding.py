"""Rounding learnt on samples: each weight's rounding error is made up for by the weights of its channel not yet rounded.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv:2210.17323),
algorithm 1, on the patches of a convolution. The second moments are the centred ones: what the mean of the input does to the
output is bias correction's part (`bias.py`), so only the varying part of the error is to be made small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit.graph import attribute

if TYPE_CHECKING:
    import onnx

DAMPING = 0.01  # of the mean second moment, as in the paper's section 3.3
LARGEST = 4608  # inputs of one output (512 channels of 3x3): the Cholesky factor of more takes tens of seconds
_LEAST_ROWS, _MOST_ROWS = 4096, 12288
_BLOCK = 128
_MOST_DAMPING = 20  # powers of ten
_CHUNK_BYTES = 64 << 20


def can_round(node: onnx.NodeProto, weight: NDArray[Any]) -> bool:
    """Whether this module serves the node: a 2-d Conv with explicit padding and one group, or a Gemm that does not transpose A.

    Depthwise convolutions are left out: their own error halved, and the network's grew (EfficientNet-Lite0's output SQNR fell
    from 22.2 to 20.0 dB with theirs rounded so, and rose to 22.7 dB with the others').
    """
    if node.op_type == "Gemm":
        return not attribute(node, "transA", 0) and max(weight.shape) <= LARGEST
    if attribute(node, "group", 1) != 1:
        return False
    explicit = attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    return node.op_type == "Conv" and weight.ndim == 4 and explicit and int(np.prod(weight.shape[1:])) <= LARGEST


def learnt(
    node: onnx.NodeProto, weight: NDArray[Any], scale: NDArray[np.float32], levels: int, inputs: Iterable[NDArray[Any]]
) -> NDArray[np.int8]:
    """Integers in the weight's shape, within [-levels, levels], whose products with `inputs` stay closest to the float ones.

    weight: of a node that `can_round` takes; scale: one for each output channel [O]; inputs: batches of the node's input.
    """
    batches = list(inputs)
    if node.op_type == "Gemm":
        turned = bool(attribute(node, "transB", 0))
        rows = np.asarray(weight if turned else weight.T, np.float64)[None]
        moments, count = _moments((b.reshape(b.shape[0], 1, -1) for b in batches), 1, rows.shape[2])
        found = _rounded(rows, scale.reshape(1, -1), levels, moments, count)[0]
        return np.ascontiguousarray(found if turned else found.T)
    group = attribute(node, "group", 1)
    rows = weight.reshape(group, weight.shape[0] // group, -1).astype(np.float64)
    moments, count = _moments(_patches(node, weight.shape, group, batches), group, rows.shape[2])
    return _rounded(rows, scale.reshape(group, -1), levels, moments, count).reshape(weight.shape)


def _patches(
    node: onnx.NodeProto, shape: tuple[int, ...], group: int, batches: list[NDArray[Any]]
) -> Iterator[NDArray[np.float32]]:
    """What the convolution's outputs see, at places drawn at random: [places, group, inputs of one output], a chunk at a time."""
    channels, height, width = shape[1:]
    strides = attribute(node, "strides", [1, 1])
    dilations = attribute(node, "dilations", [1, 1])
    pads = attribute(node, "pads", [0, 0, 0, 0])
    size = channels * height * width
    wanted = int(np.clip(4 * size, _LEAST_ROWS, _MOST_ROWS))
    each = -(-wanted // len(batches))
    step = max(1, _CHUNK_BYTES // (4 * size * group))
    rng = np.random.default_rng(0)
    for batch in batches:
        padded = np.pad(batch, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
        tall = (padded.shape[2] - dilations[0] * (height - 1) - 1) // strides[0] + 1
        wide = (padded.shape[3] - dilations[1] * (width - 1) - 1) // strides[1] + 1
        places = rng.permutation(batch.shape[0] * tall * wide)[:each]
        for start in range(0, places.size, step):
            n, y, x = np.unravel_index(places[start : start + step], (batch.shape[0], tall, wide))
            seen = [
                padded[n, :, y * strides[0] + i * dilations[0], x * strides[1] + j * dilations[1]]
                for i in range(height)
                for j in range(width)
            ]
            yield np.stack(seen, axis=2).reshape(n.size, group, size)


def _moments(chunks: Iterable[NDArray[Any]], group: int, size: int) -> tuple[NDArray[np.float64], int]:
    """Covariance of the inputs of one output, [group, size, size], and over how many places."""
    total = np.zeros((group, size, size))
    sums = np.zeros((group, size))
    count = 0
    near: NDArray[np.float32] | None = None
    for chunk in chunks:
        part = np.ascontiguousarray(chunk.transpose(1, 0, 2), dtype=np.float32)
        if near is None:  # moments about a value near the mean: those about zero lose a small variance beside a large mean
            near = part.mean(axis=1, keepdims=True)
        part = part - near
        total += part.transpose(0, 2, 1) @ part
        sums += part.sum(axis=1, dtype=np.float64)
        count += part.shape[1]
    mean = sums / count
    return total / count - mean[:, :, None] * mean[:, None, :], count


def _rounded(
    rows: NDArray[np.float64], scale: NDArray[np.float32], levels: int, moments: NDArray[np.float64], count: int
) -> NDArray[np.int8]:
    """Algorithm 1: rows [group, O, size], scale [group, O], moments [group, size, size] -> integers like rows.

    Inputs are taken in order of falling variance ("act-order" of the paper's reference code). With fewer places than inputs the
    covariance is poorly known, and is damped the more.
    """
    group, _, size = rows.shape
    variance = np.maximum(np.einsum("gii->gi", moments), 0.0)
    order = np.argsort(-variance, axis=1, kind="stable")
    moments = np.take_along_axis(np.take_along_axis(moments, order[:, :, None], 1), order[:, None, :], 2)
    left = np.take_along_axis(rows, np.broadcast_to(order[:, None, :], rows.shape), 2)
    damping = max(DAMPING, 0.1 * size / count)
    factor = _inverse_factor(moments, np.maximum(damping * variance.mean(axis=1), 1e-12))
    step = scale.astype(np.float64)[:, :, None]
    chosen = np.zeros(rows.shape)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        errors = np.zeros((group, rows.shape[1], end - start))
        for j in range(start, end):
            column = left[:, :, j : j + 1]
            chosen[:, :, j : j + 1] = np.clip(np.rint(column / step), -levels, levels)
            error = (column - chosen[:, :, j : j + 1] * step) / factor[:, j, j][:, None, None]
            left[:, :, j:end] -= error * factor[:, None, j, j:end]
            errors[:, :, j - start] = error[:, :, 0]
        left[:, :, end:] -= errors @ factor[:, start:end, end:]
    found = np.empty(rows.shape)
    np.put_along_axis(found, np.broadcast_to(order[:, None, :], rows.shape), chosen, 2)
    return found.astype(np.int8)


def _inverse_factor(moments: NDArray[np.float64], damping: NDArray[np.float64]) -> NDArray[np.float64]:
    """The upper triangular R with R'R = inverse(moments + damping I): with that sum = UU', U upper triangular, R is U's inverse.

    damping: [group], what is added at least. Sums of float32 products can leave a covariance of values that hardly vary with
    eigenvalues a little below zero: it is damped ten times more until it has a factor.
    """
    for power in range(_MOST_DAMPING):
        whole = moments + np.eye(moments.shape[-1]) * (damping * 10.0**power)[:, None, None]
        try:
            lower = np.linalg.cholesky(whole[:, ::-1, ::-1])
            break
        except np.linalg.LinAlgError:
            if power == _MOST_DAMPING - 1:
                raise
    return np.asarray(np.triu(np.linalg.inv(lower[:, ::-1, ::-1])))
