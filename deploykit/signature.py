"""TensorSpec and Signature: what goes into a model and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import InputError

Feeds = Mapping[str, NDArray[Any]]
Outputs = dict[str, NDArray[Any]]
Dim = int | str
BATCH_NAMES = ("batch", "batch_size", "batchsize", "n", "bs", "b")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, numpy dtype name and shape; a str in the shape is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}:{self.dtype}:{'x'.join(map(str, self.shape)) or 'scalar'}"


@dataclass(frozen=True)
class ShapeRange:
    """min, opt and max shape of one input with dynamic axes beside the batch (`--shapes NAME=min:opt:max`)."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a model, in order.

    The batch axis of an input is the axis that carries the batch's symbol, at whichever position; an input without it
    is constant: fed as it is with every sample.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_symbol: str | None = field(default=None)

    def __post_init__(self) -> None:
        if self.batch_symbol is None:
            object.__setattr__(self, "batch_symbol", _find_batch_symbol(self.inputs))

    @property
    def fixed_batch(self) -> int | None:
        """The batch a model without a batch symbol runs at: axis 0 of its first input; None when the batch is free.

        An input of rank 3 or less whose axis 0 no output shares has no batch (a picture as [3, h, w]): one item a run.
        """
        if self.batch_symbol is not None:
            return None
        for spec in self.inputs:
            if spec.shape and isinstance(spec.shape[0], int):
                size = spec.shape[0]
                shared = not self.outputs or any(o.shape and o.shape[0] in (size, *_symbols(o)) for o in self.outputs)
                return size if len(spec.shape) > 3 or shared else 1
        return 1

    def input(self, name: str) -> TensorSpec:
        """The input of that name. Raises InputError naming the inputs there are."""
        for spec in self.inputs:
            if spec.name == name:
                return spec
        names = ", ".join(spec.name for spec in self.inputs)
        raise InputError(f"the model has no input '{name}'", f"its inputs are: {names}")

    def batch_axis(self, spec: TensorSpec) -> int | None:
        """The axis of `spec` that counts samples, or None when it is constant.

        In a model with a fixed batch N, axis 0 of every input whose axis 0 is N.
        """
        if self.batch_symbol is not None:
            return spec.shape.index(self.batch_symbol) if self.batch_symbol in spec.shape else None
        return 0 if spec.shape and spec.shape[0] == self.fixed_batch else None

    def free_axes(self, spec: TensorSpec) -> tuple[str, ...]:
        """The symbols of `spec` other than the batch's."""
        return tuple(d for d in _symbols(spec) if d != self.batch_symbol)

    def shapes(self, batch: int, ranges: Mapping[str, ShapeRange] | None = None) -> dict[str, tuple[int, ...]]:
        """Concrete input shapes at `batch`, other dynamic axes taken from the `opt` of `ranges`.

        Raises InputError for a batch that the graph cannot take, a range that its fixed axes contradict, and a dynamic axis
        without a range.
        """
        if self.fixed_batch is not None and batch != self.fixed_batch:
            raise InputError(
                f"the graph has batch {self.fixed_batch} baked in and cannot run at batch {batch}",
                "export it with a dynamic batch axis, or ask for that batch",
            )
        result: dict[str, tuple[int, ...]] = {}
        for spec in self.inputs:
            known = (ranges or {}).get(spec.name)
            if known is not None and len(known.opt) != len(spec.shape):
                raise InputError(
                    f"--shapes gives input '{spec.name}' rank {len(known.opt)}, but the model has {spec}",
                    "give one size for each axis",
                )
            sizes = []
            for axis, dim in enumerate(spec.shape):
                if isinstance(dim, int):
                    if known is not None and axis != self.batch_axis(spec) and (known.min[axis], known.max[axis]) != (dim, dim):
                        raise InputError(
                            f"--shapes of input '{spec.name}': axis {axis} is always {dim} in the model", f"it is {spec}"
                        )
                    sizes.append(dim)
                elif dim == self.batch_symbol:
                    sizes.append(batch)
                elif known is not None:
                    sizes.append(known.opt[axis])
                else:
                    example = "x".join(
                        str(d) if isinstance(d, int) else "1" if d == self.batch_symbol else "224" for d in spec.shape
                    )
                    raise InputError(
                        f"input {spec} has a dynamic axis '{dim}' beside the batch, and nothing says how large it is",
                        f"give data with --data, or --shapes {spec.name}={example}:{example}:{example} (min:opt:max)",
                    )
            result[spec.name] = tuple(sizes)
        return result

    def check(self, feeds: Feeds) -> None:
        """Raises InputError unless `feeds` has just the inputs' names, dtypes, ranks and fixed sizes, and one batch."""
        names = [spec.name for spec in self.inputs]
        missing = [n for n in names if n not in feeds]
        extra = [n for n in feeds if n not in names]
        if missing or extra:
            raise InputError(
                f"the model takes the inputs {names}; missing: {missing or 'none'}, not known: {extra or 'none'}",
                "name the arrays after the model's inputs",
            )
        seen: dict[str, int] = {}
        for spec in self.inputs:
            array = np.asarray(feeds[spec.name])
            if array.dtype.name != spec.dtype:
                raise InputError(
                    f"input '{spec.name}' is {array.dtype.name}, the model takes {spec.dtype}", "convert the array first"
                )
            if array.ndim != len(spec.shape):
                raise InputError(f"input '{spec.name}' has shape {array.shape}, the model takes {spec}")
            for size, dim in zip(array.shape, spec.shape, strict=True):
                if isinstance(dim, int) and size != dim:
                    raise InputError(f"input '{spec.name}' has shape {array.shape}, the model takes {spec}")
                if isinstance(dim, str) and seen.setdefault(dim, size) != size:
                    raise InputError(f"axis '{dim}' is {seen[dim]} in one input and {size} in '{spec.name}'")

    def to_json(self) -> dict[str, Any]:
        """A JSON document that `from_json` reads back."""

        def rows(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
            return [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in specs]

        return {"inputs": rows(self.inputs), "outputs": rows(self.outputs), "batch_symbol": self.batch_symbol}

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> Signature:
        """The signature that `to_json` wrote."""

        def specs(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(r["name"], r["dtype"], tuple(r["shape"])) for r in rows)

        return cls(specs(doc["inputs"]), specs(doc["outputs"]), doc.get("batch_symbol"))


def with_one_batch(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The specs with one symbol for the batch, where inputs name it differently ('batch' here, 'N' there).

    What counts as another name of it: the symbol on axis 0 of an input that has not the batch's own, when it is called as
    batches are, or by torch's exporter ('<input>_dynamic_axes_1').
    """
    batch = _find_batch_symbol(inputs)
    firsts = [spec.shape[0] for spec in inputs if spec.shape and batch not in spec.shape]
    others = {d for d in firsts if isinstance(d, str) and _names_a_batch(d)}
    if batch is None or not others or not any(spec.shape and spec.shape[0] == batch for spec in inputs):
        return inputs, outputs

    def renamed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(s, shape=tuple(batch if d in others else d for d in s.shape)) for s in specs)

    return renamed(inputs), renamed(outputs)


def _names_a_batch(symbol: str) -> bool:
    name = symbol.lower()
    return name in BATCH_NAMES or name.startswith("batch") or name.endswith("batch") or "_dynamic_axes_" in name


def _symbols(spec: TensorSpec) -> tuple[str, ...]:
    return tuple(d for d in spec.shape if isinstance(d, str))


def _find_batch_symbol(inputs: tuple[TensorSpec, ...]) -> str | None:
    symbols = [d for spec in inputs for d in spec.shape if isinstance(d, str)]
    for name in BATCH_NAMES:
        for symbol in symbols:
            if symbol.lower() == name:
                return symbol
    for spec in inputs:
        if spec.shape and isinstance(spec.shape[0], str):
            return spec.shape[0]
    return None
