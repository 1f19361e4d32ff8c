"""One engine, a few images: its most likely classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit import artifact as artifacts
from deploykit import backends, children, data, hosted, preprocess
from deploykit.artifact import Artifact
from deploykit.errors import InputError, MissingBackend
from deploykit.pipeline import engines, single
from deploykit.pipeline.shares import class_names
from deploykit.session import OpenRequest
from deploykit.signature import Feeds, Outputs


def opened_as(path: Path) -> tuple[str, Artifact, dict[str, Any]]:
    """The backend, artifact and facts (preprocess, classes) to open the engine or .onnx file at `path` with."""
    found = engines.find(path)
    if len(found) > 1:
        raise InputError(f"{path} holds {len(found)} engines", f"name one, e.g. {found[0].path}")
    if found:
        engine = found[0]
        return str(engine.options["backend"]), engine, dict(engine.facts)
    model = single.open_model(path)
    return "onnxruntime", model.artifact, dict(model.artifact.facts)


class Runner:
    """An engine in a child process of its own, at one batch. A context manager."""

    def __init__(self, path: Path, batch: int, *, threads: int | None = None) -> None:
        backend_name, self.engine, self.facts = opened_as(path)
        backend = backends.get(backend_name)
        missing = backend.cannot_run()
        if missing is not None:
            raise MissingBackend(f"{path} cannot run here: {missing.why}", missing.remedy)
        self.signature = self.engine.signature
        self.batch = self.signature.fixed_batch or batch
        count = threads or children.available_threads()
        self._child = children.Child(path.name, threads=count)
        try:
            bare = not artifacts.manifest_path(self.engine.path).is_file()
            request = OpenRequest(self.engine.precision, self.batch, count)
            self._child.call(
                hosted.open_bare if bare else hosted.open_engine, backend_name, self.engine if bare else self.engine.path, request
            )
        except BaseException:
            self.close()
            raise

    def infer(self, feeds: Feeds) -> Outputs:
        """Finished outputs by name for one batch. Raises InputError for feeds that do not fit."""
        return self._child.call(hosted.infer, feeds)

    def close(self) -> None:
        """Ends the child process."""
        self._child.kill()
        self._child.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def predict(path: Path, image: str, preprocess_text: str | None, classes: Path | None, top: int) -> list[dict[str, Any]]:
    """For each sample of DATA (or one image file): the `top` classes with their softmax share."""
    with Runner(path, 1) as runner:
        own = preprocess.chosen(preprocess_text, runner.facts.get("preprocess"))
        names = class_names(classes) or runner.facts.get("classes")
        samples = data.open(image, runner.signature, preprocess=own)
        found: list[dict[str, Any]] = []
        for feeds, count in samples.batches(runner.batch, pad=True):
            outputs = runner.infer(feeds)
            name, logits = next(iter(outputs.items()))
            if logits.ndim != 2:
                raise InputError(
                    f"output '{name}' has shape {logits.shape}, which is no list of classes",
                    "use deploykit.open(engine).infer from Python",
                )
            for row in logits[:count]:
                found.append({"sample": f"{image}#{len(found)}" if len(samples) > 1 else image, "top": _top(row, names, top)})
        return found


def _top(logits: np.ndarray[Any, Any], names: Sequence[str] | None, top: int) -> list[dict[str, Any]]:
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares)[:top]
    return [
        {"index": int(i), "class": names[i] if names and i < len(names) else f"class {i}", "share": float(shares[i])}
        for i in best
    ]
