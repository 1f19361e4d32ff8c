"""The training recipe: learns, repeats itself, keeps to its time, and says what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from deploykit.artifact import manifest_path
from deploykit.errors import DataError, InputError
from deploykit.samples import Samples
from deploykit.signature import Outputs
from deploykit.source_spec import parse
from deploykit.stages import finetune
from deploykit.stages.source import load

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_factory.py"
SPEC = parse(f"{EXAMPLE}:make", num_classes=4)


@dataclass(frozen=True)
class Colours:
    """Noise whose class shows in the mean of a channel: sample i has class i % 4."""

    def read(self, indices: Sequence[int]) -> Outputs:
        pictures = []
        for index in indices:
            picture = np.random.default_rng(index).normal(0, 0.5, (3, 32, 32)).astype(np.float32)
            picture[index % 4 % 3] += 1.0 if index % 4 < 3 else -1.0
            pictures.append(picture)
        return {"x": np.stack(pictures)}


@pytest.fixture(scope="module")
def samples() -> Samples:
    n = 192
    return Samples(
        "colours", "c" * 64, Colours(), load(SPEC).signature, None, tuple(range(n)), tuple(i % 4 for i in range(n)), role="train"
    )


def test_it_learns_and_records_what_it_saw(tmp_path: Path, samples: Samples) -> None:
    out = tmp_path / "tiny.safetensors"
    found = finetune.train(SPEC, samples, out, epochs=12, lr=1e-2, batch=32)
    assert found["accuracy"] > 0.9
    record = json.loads(manifest_path(out).read_text())
    assert record["trained_on"]["indices"] == list(samples.indices)
    assert finetune.trained_on(out) == record["trained_on"]
    trained = load(replace(SPEC, weights=str(out)))
    import torch

    feeds = Colours().read(range(1000, 1064))
    answer = trained.run({"x": torch.from_numpy(feeds["x"])})["logits"].argmax(1).numpy()
    assert (answer == np.arange(1000, 1064) % 4).mean() > 0.9
    out.write_bytes(out.read_bytes() + b" ")
    with pytest.raises(InputError, match="other weights"):
        finetune.trained_on(out)


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "schedule": "step", "freeze_epochs": 1, "head_lr_factor": 5.0}])
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, samples: Samples, options: dict[str, object]) -> None:
    runs = [
        finetune.train(SPEC, samples, tmp_path / f"{i}.safetensors", epochs=2, batch=32, seed=seed, **options)  # type: ignore[arg-type]
        for i, seed in enumerate((1, 1, 2))
    ]
    assert runs[0]["sha256"] == runs[1]["sha256"] != runs[2]["sha256"]


def test_frozen_blocks_stay_as_they_were(tmp_path: Path, samples: Samples) -> None:
    before = load(SPEC).module.state_dict()
    out = tmp_path / "t.safetensors"
    finetune.train(SPEC, samples, out, epochs=1, batch=32, freeze_epochs=5)
    after = load(replace(SPEC, weights=str(out))).module.state_dict()
    assert bool((before["body.0.weight"] == after["body.0.weight"]).all())
    assert not bool((before["head.weight"] == after["head.weight"]).all())


def test_no_time_means_few_steps(tmp_path: Path, samples: Samples) -> None:
    found = finetune.train(SPEC, samples, tmp_path / "t.safetensors", epochs=10_000, seconds=1.0, batch=32)
    assert found["cut_by_time"]
    assert found["steps"] < 60_000


def test_what_cannot_be_trained_is_refused(tmp_path: Path, samples: Samples) -> None:
    out = tmp_path / "t.safetensors"
    with pytest.raises(DataError, match="labelled"):
        finetune.train(SPEC, replace(samples, labels=None), out)
    with pytest.raises(DataError) as caught:
        finetune.train(SPEC, replace(samples, labels=(9,) * len(samples)), out)
    assert "--num-classes 10" in str(caught.value)
    with pytest.raises(InputError, match="optimizer"):
        finetune.train(SPEC, samples, out, optimizer="adam")
    with pytest.raises(InputError, match="safetensors"):
        finetune.train(SPEC, samples, tmp_path / "t.pt")
    assert not list(tmp_path.iterdir())
