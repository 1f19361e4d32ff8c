"""Explained: the smallest part of a graph that a builder still fails on in the same way, written out as a model of its own.

Delta debugging over the nodes in order (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002):
first the shortest beginning that fails, then its shortest end, then whatever else can go. What a part reads from outside
becomes its input, with the type and shape that ONNX's shape inference finds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit import graph
from deploykit.errors import ChildDied, DeploykitError, InputError
from deploykit.trt import parser_graph

if TYPE_CHECKING:
    import onnx

DEFAULT_LIMIT = 120


@dataclass(frozen=True)
class Failure:
    """How a build failed: 'crash' (its process died) or 'refusal', and in whose words."""

    kind: str
    message: str

    @property
    def likeness(self) -> str:
        """What two failures of the same cause share: names in quotes, node lists and numbers are left out."""
        signal = re.search(r"killed by (SIG\w+)", self.message)
        if self.kind == "crash":
            return f"crash {signal[1] if signal else ''}"
        return re.sub(r"\s+", " ", re.sub(r"'[^']*'|\d+", "_", self.message))


@dataclass(frozen=True)
class Explained:
    """The part that still fails: its file, its nodes (name, operator) in order, how it fails, and the builds it took.

    complete: whether no single node can be taken away any more; False where the limit of builds came first.
    """

    path: Path
    nodes: tuple[tuple[str, str], ...]
    failure: Failure
    builds: int
    complete: bool

    def __str__(self) -> str:
        shown = ", ".join(f"{op} '{name}'" for name, op in self.nodes[:6])
        more = f" and {len(self.nodes) - 6} more" if len(self.nodes) > 6 else ""
        size = "smallest" if self.complete else "smallest found so far"
        return f"the {size} part that still fails has {len(self.nodes)} node(s): {shown}{more}; written to {self.path}"


def outcome(build: Callable[[], object]) -> Failure | None:
    """How `build` failed, or None when it did not. Raises what is no failure of the builder: the user's input, a missing
    backend."""
    try:
        build()
    except ChildDied as exc:
        return Failure("crash", exc.message)
    except DeploykitError as exc:
        if exc.exit_code == 4 or isinstance(exc, InputError):
            return Failure("refusal", exc.message)
        raise
    return None


def smallest_failing(
    path: Path,
    attempt: Callable[[Path], Failure | None],
    out: Path,
    *,
    limit: int = DEFAULT_LIMIT,
    scratch: Path | None = None,
) -> Explained | None:
    """The smallest part of the model at `path` that `attempt` still fails on as it does on the whole; None when the whole
    builds. `attempt` builds a file in a child process; the part is written to `out`. At most `limit` builds; the files they
    take lie in the folder `scratch` (beside `out` where none is given).

    Raises ModelError for a model that cannot be read.
    """
    model = _with_shapes(parser_graph.load(path, guard=False))
    trial = (scratch or out.parent) / f".{out.name}.attempt.onnx"
    everything = tuple(range(len(model.graph.node)))
    builds = 0
    last: Failure | None = None

    def failing(nodes: Sequence[int]) -> bool:
        nonlocal builds, last
        part = _of(model, nodes)
        if part is None:
            return False
        if builds >= limit:
            raise _LimitReached
        builds += 1
        graph.save(part, trial)
        failure = attempt(trial)
        same = failure is not None and (last is None or failure.likeness == last.likeness)
        if same:
            last = failure
        return same

    found, complete = everything, False
    try:
        if not failing(everything):
            return None
        for found in _shrinking(everything, failing):  # noqa: B007 - the last one is kept when the limit comes
            pass
        complete = True
    except _LimitReached:
        pass
    finally:
        for left in (trial, trial.with_name(trial.name + ".data")):
            left.unlink(missing_ok=True)
    part = _of(model, found)
    assert part is not None
    assert last is not None
    graph.save(part, out)
    return Explained(out, tuple((n.name, n.op_type) for n in part.graph.node), last, builds, complete)


class _LimitReached(Exception):
    pass


def _shrinking(nodes: tuple[int, ...], failing: Callable[[Sequence[int]], bool]) -> Iterator[tuple[int, ...]]:
    """Ever smaller failing sets of nodes; after the last, no single node can be taken away."""
    nodes = nodes[: _least(len(nodes), lambda count: failing(nodes[:count]))]
    yield nodes
    nodes = nodes[len(nodes) - _least(len(nodes), lambda count: failing(nodes[-count:])) :]
    yield nodes
    size = max(len(nodes) // 2, 1)
    while True:
        start, smaller = 0, False
        while start < len(nodes) > 1:
            rest = nodes[:start] + nodes[start + size :]
            if rest and failing(rest):
                nodes, smaller = rest, True
                yield nodes
            else:
                start += size
        if size == 1 and not smaller:
            return
        size = max(size // 2, 1)


def _least(count: int, failing: Callable[[int], bool]) -> int:
    """The least number of nodes at one end that fails, where all `count` do. A part may build though a longer and a
    shorter one fail; then what is found still fails, and is only not the least."""
    low, high = 1, count
    while low < high:
        middle = (low + high) // 2
        if failing(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the types and shapes of what flows between its nodes."""
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return model  # only parts whose inputs are known already can be cut out


def _of(model: onnx.ModelProto, nodes: Sequence[int]) -> onnx.ModelProto | None:
    """The model itself for all its nodes: its inputs and outputs need no shape that inference finds. Else `_part`."""
    return model if len(nodes) == len(model.graph.node) else _part(model, nodes)


def _part(model: onnx.ModelProto, nodes: Sequence[int]) -> onnx.ModelProto | None:
    """A model of those nodes alone; None where something it reads, or gives, has no known type and shape."""
    import onnx

    chosen = [model.graph.node[i] for i in nodes]
    kept = set(nodes)
    values = {v.name: v for v in [*model.graph.value_info, *model.graph.input, *model.graph.output]}
    stored = {t.name: t for t in model.graph.initializer}
    made = {name for node in chosen for name in node.output if name}
    read = list(dict.fromkeys(name for node in chosen for name in parser_graph.reads(node) if name and name not in made))
    outside = {n for i, node in enumerate(model.graph.node) if i not in kept for n in parser_graph.reads(node)}
    outside |= {v.name for v in model.graph.output}
    inside = {name for node in chosen for name in parser_graph.reads(node)}
    given = [name for node in chosen for name in node.output if name and (name in outside or name not in inside)]
    inputs = [name for name in read if name not in stored]
    if not given or not inputs or any(not _known(values.get(name)) for name in [*inputs, *given]):
        return None
    part = onnx.helper.make_graph(
        chosen,
        "part",
        [values[name] for name in inputs],
        [values[name] for name in given],
        [stored[name] for name in read if name in stored],
    )
    return onnx.helper.make_model(
        part, opset_imports=list(model.opset_import), ir_version=model.ir_version, functions=list(model.functions)
    )


def _known(value: onnx.ValueInfoProto | None) -> bool:
    if value is None or not value.type.HasField("tensor_type") or not value.type.tensor_type.elem_type:
        return False
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(d.HasField("dim_value") or d.dim_param for d in tensor.shape.dim)
