"""Fine-tuning as a step of its own: trains on the share of the data that neither calibrates nor judges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import children, data, preprocess
from deploykit.errors import InputError
from deploykit.pipeline.request import DataRequest, Narrator, SourceRequest
from deploykit.samples import Samples
from deploykit.signature import Signature
from deploykit.source_spec import SourceSpec
from deploykit.source_spec import parse as parse_source


@dataclass(frozen=True)
class TrainingRequest:
    """What is trained, on what, and for how long."""

    source: SourceRequest
    data: DataRequest
    out: Path
    epochs: int
    seconds: float | None
    lr: float
    batch_size: int
    seed: int


def finetune(request: TrainingRequest, narrator: Narrator) -> list[str]:
    """Trains, writes the weights and the record of what they were trained on; returns lines that say how it went."""
    if request.out.suffix != ".safetensors":
        raise InputError(f"-o {request.out} should end in .safetensors", "example: -o digits.safetensors")
    source = request.source
    spec = parse_source(source.text, weights=source.weights, num_classes=source.num_classes, inputs=source.inputs)
    assert request.data.data is not None
    narrator.step(f"train {spec.name} on {request.data.data}")
    signature: Signature = children.run("source", _signature, spec)
    own = preprocess.parse(request.data.preprocess) if request.data.preprocess else None
    samples = data.open(request.data.data, signature, preprocess=own)
    share = data.train_share(samples)
    held_out = data.held_out(samples, exclude=share.indices)
    request.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = children.run(
        "finetune", _train, spec, share, request, threads=children.available_threads(), progress=narrator.progress
    )
    return [
        f"{request.out}: trained on {len(share)} of {len(samples)} samples ({len(held_out)} held out), "
        f"{found.get('epochs', '?')} epochs, {found.get('seconds', 0.0):.0f} s, "
        f"training accuracy {100 * float(found.get('accuracy', 0.0)):.1f} %"
    ]


def _signature(spec: SourceSpec) -> Signature:
    from deploykit.stages import source

    return source.load(spec, fresh_head=True).signature


def _train(spec: SourceSpec, share: Samples, request: TrainingRequest) -> dict[str, Any]:
    from deploykit.stages import finetune as recipe

    return recipe.train(
        spec,
        share,
        request.out,
        epochs=request.epochs,
        seconds=request.seconds,
        batch=request.batch_size,
        lr=request.lr,
        seed=request.seed,
    )
