"""The training recipe: a classifier trained or fine-tuned on a share of the data, written as .safetensors with what it saw."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.artifact import manifest_path, write_atomically
from deploykit.children import report_progress
from deploykit.errors import DataError, InputError, ModelError
from deploykit.samples import Samples
from deploykit.source_spec import SourceSpec
from deploykit.stages.source import Source, load

if TYPE_CHECKING:
    import torch

_CACHED_BYTES = 1 << 30  # samples that need less are read once, not once an epoch
_PLAN_AFTER = 8  # steps whose duration decides how many fit in the time given; the first two warm up
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Recipe:
    """How to train. lr: of the layers before the head, the head's is lr * head_lr_factor; warmup: share of all steps with a
    rising rate; clip: largest gradient norm (0: none); freeze_epochs: epochs over which the network is unfrozen, head first,
    then block by block from the end (0: all at once)."""

    epochs: int
    batch: int
    lr: float
    seed: int
    optimizer: str
    schedule: str
    warmup: float
    label_smoothing: float
    clip: float
    freeze_epochs: int
    head_lr_factor: float

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", ("adamw", "sgd")), ("schedule", ("cosine", "step"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} '{getattr(self, name)}' is not known", f"choose from: {', '.join(choices)}")
        if self.epochs < 1 or self.batch < 2 or not self.lr > 0:
            raise InputError(
                f"cannot train {self.epochs} epochs at batch {self.batch} and rate {self.lr}", "epochs >= 1, batch >= 2, lr > 0"
            )

    def rate(self, step: int, steps: int) -> float:
        """The factor on the learning rate at a step: linear warm-up, then half a cosine to 0 (Loshchilov and Hutter 2017,
        arXiv:1608.03983), or a tenth after 60 % and a hundredth after 85 % of the steps."""
        rising = max(1, round(self.warmup * steps))
        if step < rising:
            return (step + 1) / rising
        share = (step - rising) / max(1, steps - rising)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return 1.0 if share < 0.6 else 0.1 if share < 0.85 else 0.01


def train(
    spec: SourceSpec,
    samples: Samples,
    out: Path,
    *,
    epochs: int = 6,
    seconds: float | None = None,
    batch: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    warmup: float = 0.1,
    label_smoothing: float = 0.05,
    clip: float = 1.0,
    freeze_epochs: int = 0,
    head_lr_factor: float = 1.0,
) -> dict[str, Any]:
    """Trains on `samples`, writes `out` (.safetensors) and `<out>.manifest.json`; returns that record (JSON values): steps,
    epochs, seconds, loss and accuracy over the last epoch's steps (training mode), trained_on {content, indices, n}.

    `seconds`: no step starts after it; when the first steps show that `epochs` will not fit, fewer steps are planned, so that
    the rate still falls to zero. Where time does not bind, the same seed, data and thread count give the same bytes.
    Raises DataError for samples without labels or with labels the model has no class for, InputError for a source that
    cannot be trained, ModelError when the loss becomes NaN. Written whole or not at all.
    """
    import torch

    recipe = Recipe(epochs, batch, lr, seed, optimizer, schedule, warmup, label_smoothing, clip, freeze_epochs, head_lr_factor)
    if out.suffix != ".safetensors":
        raise InputError(f"{out.name}: trained weights are written as .safetensors", "example: -o model.safetensors")
    if spec.kind not in ("torchvision", "timm", "factory"):
        raise InputError(f"a .{spec.kind} file cannot be trained", "name the model itself and --weights")
    source = load(spec, fresh_head=True)
    labels = _labels(samples, source)
    settings: Any = torch.utils.deterministic  # untyped
    before, filling = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False  # ResNet-18 at 32x32: 0.28 instead of 0.40 CPU s a step
        try:
            figures = _fit(source, _Inputs(samples), labels, recipe, seconds)
        finally:
            torch.use_deterministic_algorithms(before)
            settings.fill_uninitialized_memory = filling
    return _write(spec, source, samples, out, recipe, figures)


def _labels(samples: Samples, source: Source) -> torch.Tensor:
    import torch

    labels = samples.label_array()
    if labels is None or len(samples) == 0:
        raise DataError(
            f"{samples.spec} has no labelled samples to train on", "give a folder with one sub-folder a class, or labels"
        )
    if len(samples) < 2:
        raise DataError("one sample is not enough to train on")
    logits = source.signature.outputs[0]
    if len(logits.shape) != 2 or not isinstance(logits.shape[1], int):
        raise InputError(
            f"the recipe trains classifiers; the model's first output is {logits}", "give a model that returns logits"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(
            f"labels go from {labels.min()} to {labels.max()}, the model has {logits.shape[1]} classes",
            f"make the model with --num-classes {labels.max() + 1}",
        )
    return torch.from_numpy(labels)


class _Inputs:
    """Feeds for chosen positions of a share, kept in memory when they are small."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._kept: dict[str, np.ndarray[Any, Any]] | None = None
        self._axes = {s.name: samples.signature.batch_axis(s) for s in samples.signature.inputs}
        first = samples.reader.read([samples.indices[0]])
        if sum(a.nbytes for a in first.values()) * len(samples) <= _CACHED_BYTES:
            parts = [samples.reader.read(list(samples.indices[i : i + 256])) for i in range(0, len(samples), 256)]
            self._kept = {
                name: parts[0][name] if axis is None else np.concatenate([p[name] for p in parts], axis)
                for name, axis in self._axes.items()
            }

    def take(self, positions: list[int]) -> dict[str, torch.Tensor]:
        import torch

        if self._kept is None:
            found = self._samples.reader.read([self._samples.indices[p] for p in positions])
        else:
            found = {n: a if self._axes[n] is None else np.take(a, positions, self._axes[n]) for n, a in self._kept.items()}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in found.items()}


def _positions(n: int, recipe: Recipe) -> Iterator[tuple[int, list[int]]]:
    """(epoch, positions of a batch), shuffled anew each epoch; a short last batch is left out (BatchNorm needs two)."""
    import torch

    generator = torch.Generator().manual_seed(recipe.seed)
    for epoch in range(recipe.epochs):
        order = torch.randperm(n, generator=generator).tolist()
        stop = n - n % recipe.batch if n >= recipe.batch else n
        for start in range(0, stop, recipe.batch):
            yield epoch, order[start : start + recipe.batch]


def _fit(source: Source, inputs: _Inputs, labels: torch.Tensor, recipe: Recipe, seconds: float | None) -> dict[str, Any]:
    import torch

    module = source.module.train()
    groups = _groups(module, recipe)
    if recipe.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    per_epoch = max(1, len(labels) // recipe.batch)
    steps = planned = per_epoch * recipe.epochs
    name = source.signature.outputs[0].name
    start = planned_from = time.monotonic()
    seen: list[tuple[float, float]] = []
    for step, (epoch, positions) in enumerate(_positions(len(labels), recipe)):
        now = time.monotonic()
        if step == 2:
            planned_from = now
        if seconds is not None and step == _PLAN_AFTER:
            left = seconds - (now - start)
            fitting = step + int(0.95 * left / ((now - planned_from) / (step - 2)))
            steps = max(step + 1, min(planned, fitting))
        if step >= steps or (seconds is not None and now - start >= seconds):
            break
        if step % per_epoch == 0:
            _unfreeze(module, epoch, recipe)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * recipe.rate(step, steps)
        logits = _logits(source, inputs.take(positions), name)
        wanted = labels[positions]
        loss = loss_of(logits, wanted)
        if not torch.isfinite(loss):
            raise ModelError(
                f"the loss became {float(loss)} at step {step}: training diverged", f"lower --lr (it was {recipe.lr:g})"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
        optimizer.step()
        seen.append((float(loss.detach()), float((logits.detach().argmax(1) == wanted).float().mean())))
        report_progress(f"epoch {epoch + 1}: loss {seen[-1][0]:.3f}", (step + 1) / steps)
    module.eval()
    last = np.array(seen[-per_epoch:])
    return {
        "steps": len(seen),
        "planned_steps": planned,
        "epochs": round(len(seen) / per_epoch, 2),
        "cut_by_time": len(seen) < planned,
        "seconds": round(time.monotonic() - start, 3),
        "loss": float(last[:, 0].mean()) if len(last) else None,
        "accuracy": float(last[:, 1].mean()) if len(last) else None,
    }


def _logits(source: Source, feeds: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    from deploykit.stages.source import named_outputs

    return named_outputs(source.module(**feeds), tuple(feeds), source.output_names)[name]


def _head(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters of the last module that holds a weight matrix: the classifier."""
    import torch

    linear = [m for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    return list(linear[-1].parameters()) if linear else []


def _groups(module: torch.nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Head and rest by rate; weight decay on matrices only, not on biases and norms."""
    head = {id(p) for p in _head(module)}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in module.parameters():
        groups.setdefault((id(parameter) in head, parameter.ndim > 1), []).append(parameter)
    decay = WEIGHT_DECAY if recipe.optimizer == "adamw" else 5e-4
    return [
        {
            "params": found,
            "lr": recipe.lr * (recipe.head_lr_factor if is_head else 1.0),
            "weight_decay": decay if is_matrix else 0.0,
        }
        for (is_head, is_matrix), found in groups.items()
    ]


def _unfreeze(module: torch.nn.Module, epoch: int, recipe: Recipe) -> None:
    """Sets which blocks train in this epoch. A frozen block keeps its BatchNorm statistics too."""
    if not recipe.freeze_epochs or epoch > recipe.freeze_epochs:
        return
    blocks = [child for child in module.children() if next(child.parameters(), None) is not None]
    free = round(len(blocks) * min(1.0, epoch / recipe.freeze_epochs))
    for position, block in enumerate(blocks):
        trains = position >= len(blocks) - free
        block.train(trains)
        block.requires_grad_(trains)
    for parameter in _head(module):
        parameter.requires_grad_(True)


def _write(
    spec: SourceSpec, source: Source, samples: Samples, out: Path, recipe: Recipe, figures: dict[str, Any]
) -> dict[str, Any]:
    from safetensors.torch import save

    # Tied weights share memory, which safetensors refuses: each name gets its own copy.
    data = save({name: tensor.detach().clone().contiguous() for name, tensor in source.module.state_dict().items()})
    record: dict[str, Any] = {
        "file": out.name,
        "stage": "finetune",
        "sha256": hashlib.sha256(data).hexdigest(),
        "source": replace(spec, weights=Path(spec.weights).name if spec.checkpoint else spec.weights).to_json(),
        "source_digest": spec.digest(),
        "recipe": asdict(recipe),
        "trained_on": {
            "data": samples.spec,
            "content": samples.content,
            "indices": list(samples.indices),
            "n": len(samples),
            "preprocess": samples.preprocess.to_json() if samples.preprocess else None,
        },
        **figures,
    }
    manifest_path(out).unlink(missing_ok=True)  # never an old record beside new weights
    write_atomically(out, data)
    write_atomically(manifest_path(out), json.dumps(record, indent=1, sort_keys=True).encode())
    return record


def trained_on(weights: Path) -> dict[str, Any] | None:
    """What a checkpoint was trained on ({content, indices, ...}), or None when no record of this recipe lies beside it.
    Raises InputError for a record of other bytes."""
    from deploykit.artifact import sha256_of

    side = manifest_path(weights)
    try:
        doc = json.loads(side.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(doc, dict) or "trained_on" not in doc:
        return None
    if doc.get("sha256") != sha256_of(weights):
        raise InputError(f"{side.name} describes other weights than {weights.name}", "train again, or remove that record")
    found: dict[str, Any] = doc["trained_on"]
    return found
