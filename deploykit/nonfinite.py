"""Where a float model stops giving numbers: the first node whose result is NaN or infinite, on a sample where one comes out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploykit import graph, observation
from deploykit.activations import open_model
from deploykit.children import available_threads, report_progress
from deploykit.samples import Samples

SEARCHED = 512  # samples at most that `in_outputs` looks through


@dataclass(frozen=True)
class Origin:
    """The node that first gave `kind` ('NaN' | 'Inf') on a sample, called by its number in the data."""

    node: str
    op: str
    tensor: str
    kind: str
    sample: int

    def __str__(self) -> str:
        return (
            f"node '{self.node}' ({self.op}) is the first to give {self.kind}, in tensor '{self.tensor}' on sample {self.sample}"
        )


def first(path: Path, samples: Samples, position: int, kind: str) -> Origin | None:
    """The first node, in the graph's order, whose result holds `kind` on the sample at that position; None where none does:
    kernels that fuse otherwise may round otherwise.

    Raises what opening and running the model raise.
    """
    model = graph.load(path)
    made_by = {name: node for node in model.graph.node for name in node.output}
    one = samples.take([position], samples.role)
    opened = open_model(model, path.name, observation.computed(model), one, batch=1, threads=available_threads())
    feeds = next(one.batches(opened.batch, pad=True))[0]
    for name, values in opened.run(feeds).items():
        node = made_by.get(name)
        bad = np.isnan(values) if kind == "NaN" else np.isinf(values)
        if node is not None and bad.any():
            return Origin(node.name or name, node.op_type, name, kind, one.indices[0])
    return None


def in_outputs(path: Path, samples: Samples) -> Origin | None:
    """The first node that gives NaN on the first sample for which an output of the model does; None where none does.

    Runs in a child process. Raises what opening and running the model raise.
    """
    model = graph.load(path)
    outputs = [value.name for value in model.graph.output]
    few = samples.take(range(min(len(samples), SEARCHED)), samples.role)
    opened = open_model(model, path.name, outputs, few, batch=1, threads=available_threads())
    for position, (feeds, _) in enumerate(few.batches(opened.batch, pad=True)):
        report_progress("looking for NaN", position * opened.batch / len(few))
        if any(np.isnan(values).any() for values in opened.run(feeds).values()):
            for inner in range(position * opened.batch, min((position + 1) * opened.batch, len(few))):
                found = first(path, few, inner, "NaN")
                if found is not None:
                    return found
    return None
