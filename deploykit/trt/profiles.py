"""Optimization profiles: the shapes a plan takes, checked here because TensorRT takes wrong ones without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploykit.errors import InputError
from deploykit.signature import ShapeRange, Signature, TensorSpec

Profile = dict[str, ShapeRange]


def for_batches(
    signature: Signature, batches: Sequence[int], shapes: Mapping[str, ShapeRange] | None = None, *, each: bool = False
) -> tuple[Profile, ...]:
    """The profiles for a model: none where every input is static, else one over all the batches.

    Batch: min 1, opt the middle one asked for, max the largest. With `each`, one profile a batch, at exactly that batch.
    Other dynamic axes take `shapes`. Raises InputError for a batch below 1, a name that is no input, a range that is not
    min <= opt <= max or has another rank, and for a dynamic axis without a range.
    """
    shapes = shapes or {}
    for name in shapes:
        signature.input(name)
    if not batches or min(batches) < 1:
        raise InputError(f"batches must be 1 or more, not {list(batches)}", "for example --batch 1,8,32")
    dynamic = [spec for spec in signature.inputs if any(isinstance(dim, str) for dim in spec.shape)]
    fixed = signature.fixed_batch
    if fixed is not None and fixed not in batches:
        raise InputError(
            f"the graph has batch {fixed} baked in and cannot be built for batch {', '.join(map(str, sorted(set(batches))))}",
            "export it with a dynamic batch axis, or ask for that batch",
        )
    if not dynamic:
        return ()
    asked = sorted(set(batches))
    trios = [(b, b, b) for b in asked] if each else [(1, asked[len(asked) // 2], asked[-1])]
    return tuple({spec.name: _range(signature, spec, trio, shapes.get(spec.name)) for spec in dynamic} for trio in trios)


def _range(signature: Signature, spec: TensorSpec, batch: tuple[int, int, int], known: ShapeRange | None) -> ShapeRange:
    if known is not None:
        for sizes in (known.min, known.opt, known.max):
            if len(sizes) != len(spec.shape):
                raise InputError(f"--shapes gives input '{spec.name}' rank {len(sizes)}, but the model has {spec}")
        for axis, dim in enumerate(spec.shape):
            low, best, high = known.min[axis], known.opt[axis], known.max[axis]
            if dim != signature.batch_symbol and not 1 <= low <= best <= high:
                raise InputError(
                    f"--shapes of input '{spec.name}': axis {axis} has min {low}, opt {best}, max {high}",
                    "they must be positive and min <= opt <= max",
                )
            if isinstance(dim, int) and (low, high) != (dim, dim):
                raise InputError(f"--shapes of input '{spec.name}': axis {axis} is always {dim} in the model", f"it is {spec}")
    trios: list[tuple[int, int, int]] = []
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, int):
            trios.append((dim, dim, dim))
        elif dim == signature.batch_symbol:
            trios.append(batch)
        elif known is not None:
            trios.append((known.min[axis], known.opt[axis], known.max[axis]))
        else:
            # `shapes` raises with the option to give; its own example fits this input
            signature.shapes(signature.fixed_batch or 1)
            raise AssertionError("a free axis without a range passed Signature.shapes")
    return ShapeRange(tuple(t[0] for t in trios), tuple(t[1] for t in trios), tuple(t[2] for t in trios))


def to_json(profiles: Sequence[Profile]) -> list[dict[str, dict[str, list[int]]]]:
    """The profiles as the manifest holds them: [{'x': {'min': [...], 'opt': [...], 'max': [...]}}]."""
    return [{n: {"min": list(r.min), "opt": list(r.opt), "max": list(r.max)} for n, r in p.items()} for p in profiles]


def from_json(doc: Sequence[Mapping[str, Mapping[str, Sequence[int]]]]) -> tuple[Profile, ...]:
    """The profiles that `to_json` wrote."""
    return tuple({n: ShapeRange(tuple(r["min"]), tuple(r["opt"]), tuple(r["max"])) for n, r in p.items()} for p in doc)
