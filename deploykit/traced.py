"""What an ExportedProgram was traced for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploykit.signature import Signature

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def batch_limits(program: ExportedProgram, signature: Signature, most: int) -> tuple[int, int]:
    """The smallest and the largest batch that a program with a free batch takes, the largest `most` at most: what the ranges of all
    its inputs have in common (without a range, from 1). The largest may be below the smallest: `most` is too small then."""
    low, high = 1, most
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    for spec in signature.inputs:
        axis, value = signature.batch_axis(spec), values.get(spec.name)
        if axis is None or value is None:
            continue
        limits = program.range_constraints.get(value.shape[axis].node.expr)
        if limits is not None:
            low = max(low, int(limits.lower))
            high = int(limits.upper) if limits.upper < high else high  # unbounded, upper is no int
    return low, high
