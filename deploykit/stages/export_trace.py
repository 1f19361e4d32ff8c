"""A source traced by torch.export with its dynamic axes; a batch that the code fixes is found, with the line that does it."""

from __future__ import annotations

import logging
import re
import traceback
from typing import TYPE_CHECKING, Any

from deploykit import trace_error
from deploykit.errors import ModelError
from deploykit.stages.source import Source, user_frame, where
from deploykit.traced import batch_limits

if TYPE_CHECKING:
    import torch

_GUARD = re.compile(r"eval (.+?) \[guard added\]")
_CREATED = re.compile(r"create_symbol (\w+) = \S+ for L\['(\w+)'\]\.size\(\)\[(\d+)\]")


def trace(source: Source, batches: tuple[int, ...], name: str) -> tuple[torch.export.ExportedProgram, tuple[int, ...]]:
    """(the program, the batches it can be proven at). A .pt2 keeps its own program and takes the batches in its range.

    Raises ModelError naming file and line where the batch, or another dynamic axis, became a constant.
    """

    if source.program is not None:
        return source.program, _within_range(source, batches)
    shapes = _dynamic_shapes(source, max(batches))
    try:
        program = _export(source, shapes)
    except Exception as exc:
        raise _explained(exc, source, shapes, name) from exc
    _require_batch(program, source, name)
    return program, batches


def _export(source: Source, shapes: dict[str, Any]) -> torch.export.ExportedProgram:
    """The program of the module, or where it returns more than tensors (None, numbers), of one that leaves those out."""
    import torch
    from torch.utils import _pytree as pytree

    names = tuple(source.example)
    with torch.no_grad():
        leaves = pytree.tree_leaves(source.module(**source.example))
        if all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            return torch.export.export(source.module, (), dict(source.example), dynamic_shapes=shapes)

        class TensorsOnly(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = source.module

            def forward(self, *tensors: torch.Tensor) -> Any:  # **feeds: torch 2.14 writes guards it cannot convert
                found = pytree.tree_leaves(self.inner(**dict(zip(names, tensors, strict=True))))
                return tuple(leaf for leaf in found if isinstance(leaf, torch.Tensor))

        inner = {"tensors": tuple(shapes[name] for name in names)}
        return torch.export.export(TensorsOnly(), tuple(source.example.values()), dynamic_shapes=inner)


def _dynamic_shapes(source: Source, most: int) -> dict[str, Any]:
    import torch

    batch = torch.export.Dim("batch", min=1, max=most)
    result: dict[str, Any] = {}
    for spec in source.signature.inputs:
        axes: dict[int, Any] = {}
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                # Other axes take the range that the code allows: a convolution stack needs more than one pixel.
                axes[axis] = batch if dim == source.signature.batch_symbol else torch.export.Dim.DYNAMIC
        result[spec.name] = axes or None
    return result


class _Guards(logging.Handler):
    """Notes, while torch.export runs, each guard put on a dynamic axis and the user's line that asked for it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.symbols: dict[str, str] = {}
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        created = _CREATED.search(text)
        if created:
            self.symbols[created[1]] = f"axis {created[3]} of '{created[2]}'"
        guard = _GUARD.search(text)
        if guard:
            frame = user_frame(traceback.extract_stack())
            if frame:
                self.lines.append((guard[1], frame))


def _explained(exc: Exception, source: Source, shapes: dict[str, Any], name: str) -> ModelError:
    """The error of a failed trace, with the line that fixed an axis: found by tracing again and watching the guards.

    torch 2.14 names the axis but not the line ('You marked batch as dynamic but your code specialized it').
    """

    text = str(exc)
    if "onstraints violated" not in text and "pecializ" not in text:
        place = trace_error.place(exc)
        if trace_error.asks_for_values(exc):
            return ModelError(
                f"{name} branches on the values of a tensor{place}, which a graph cannot hold",
                "use torch.where or torch.cond instead of if, or leave that part out of the model",
            )
        return ModelError(
            f"torch.export cannot trace {name}{place}: {where(exc)}", "rewrite that part of the model, or export a part of it"
        )
    guards = _Guards()
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = (logger.handlers, logger.level, logger.propagate)
    logger.handlers, logger.propagate = [guards], False
    logger.setLevel(logging.INFO)
    try:
        _export(source, shapes)
    except Exception:  # it failed before, and fails again: the guards on the way there are what is wanted
        pass
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
    reason = next((line.strip(" -") for line in text.splitlines() if line.strip().startswith("- ")), "")
    # Where two axes must be equal, no size is fixed: a state and its input share the batch.
    lines = [(guard, frame) for guard, frame in dict.fromkeys(guards.lines) if not re.fullmatch(r"Eq\(s\d+, s\d+\)", guard)]
    places = [f"{_readable(guard, guards.symbols)} at {frame}" for guard, frame in lines]
    shown = "; ".join(places[:3]) or reason.split(". If you're")[0]
    return ModelError(
        f"{name} fixes the size of an axis that ought to be dynamic: {shown}",
        "take sizes from the input (x.shape[0]) and keep them symbolic: no int(), no loop over samples, no tensor made for one batch; "
        "give an axis other than the batch a number in --input (recurrent layers are unrolled over theirs)",
    )


def _readable(guard: str, symbols: dict[str, str]) -> str:
    match = re.fullmatch(r"Eq\((\w+), (\d+)\)", guard)
    if match and match[1] in symbols:
        return f"{symbols[match[1]]} must be {match[2]}"
    for symbol, label in symbols.items():
        guard = re.sub(rf"\b{symbol}\b", f"({label})", guard)
    return f"needs {guard}"


def _require_batch(program: torch.export.ExportedProgram, source: Source, name: str) -> None:
    """Raises ModelError when no output has the batch on an axis: its samples could not be told apart."""
    symbol = source.signature.batch_symbol
    if symbol is None:
        return
    for spec in source.signature.outputs:
        if symbol in spec.shape or (spec.shape and isinstance(spec.shape[0], str)):
            return
    shown = ", ".join(map(str, source.signature.outputs))
    raise ModelError(
        f"no output of {name} keeps the batch: {shown}{_where_lost(program)}",
        "keep the batch as an axis of its own: x.flatten(1) instead of x.view(2, -1)",
    )


def _where_lost(program: torch.export.ExportedProgram) -> str:
    """' (file:line ...)' of the first operation that takes a tensor with a symbolic axis 0 and returns one without."""
    import torch

    def leads(node: Any) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.ndim > 0 and not isinstance(value.shape[0], int)

    for node in program.graph.nodes:
        value = node.meta.get("val")
        if (
            node.op == "call_function"
            and isinstance(value, torch.Tensor)
            and any(map(leads, node.all_input_nodes))
            and not leads(node)
        ):
            found = re.findall(r'File "([^"]+)", line (\d+), in (\w+)\n\s*(.+)', node.meta.get("stack_trace") or "")
            if found:
                file, line, function, code = found[-1]
                return f" (lost at {file}:{line} in {function}: {code.strip()})"
    return ""


def _within_range(source: Source, batches: tuple[int, ...]) -> tuple[int, ...]:
    fixed = source.signature.fixed_batch
    if fixed is not None:
        return (fixed,)
    assert source.program is not None
    low, high = batch_limits(source.program, source.signature, max(batches))
    return tuple(b for b in batches if low <= b <= high) or (low,)
