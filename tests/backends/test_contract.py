"""Every backend that is here keeps the contract of session.py, on the same models. A new backend is picked up by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import engine_cases as cases
import numpy as np
import pytest

from deploykit import artifact as artifacts
from deploykit import backends
from deploykit.artifact import Artifact
from deploykit.errors import DeploykitError, InputError
from deploykit.session import PRECISIONS, OpenRequest

# torch-compile takes ten seconds a model and batch, LiteRT's converter ten a model: the rest of theirs is slow.
HERE = [name for name in backends.names() if backends.get(name).missing() is None]
RUN_HERE = [name for name in HERE if backends.get(name).cannot_run() is None]
QUICK = {
    "torch-compile": (),
    "litert": (("fp32", "conv_net"), ("int8", "conv_net"), ("int8-dynamic", "conv_net")),
    "tvm": (("fp32", "conv_net"),),
}


def _marks(name: str, precision: str, model: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if name in QUICK and (precision, model) not in QUICK[name] else []


CASES = [
    pytest.param(name, precision, model, id=f"{name}-{precision}-{model}", marks=_marks(name, precision, model))
    for name in RUN_HERE
    for precision in backends.get(name).precisions()
    for model in cases.MODELS
    # nothing to quantize in two_inputs for PyTorch's quantizers (no Linear layer); their own tests have that refusal
    if not (name in ("torch", "executorch") and (precision, model) == ("int8-dynamic", "two_inputs"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


_made: dict[tuple[str, ...], Artifact] = {}


def _engine(backend: str, precision: str, model: str, folder: Path) -> tuple[Artifact, Artifact]:
    fp32 = _made.get((model,)) or _made.setdefault((model,), cases.model(model, folder))
    key = (backend, precision, model)
    if key not in _made:
        base = _engine(backend, "fp32", model, folder)[1] if backends.from_fp32(backend, precision) else None
        batches = (1,) if backend == "torch-compile" else (1, 8)  # each takes it ten seconds
        _made[key] = cases.engine(backends.get(backend), fp32, precision, folder, base, batches)
    return fp32, _made[key]


@pytest.mark.parametrize("name", backends.names())
def test_describes_itself_without_importing_an_engine(name: str) -> None:
    backend = backends.get(name)
    assert backend.name == name
    assert backend.extra
    missing = backend.missing()
    assert missing is None or (missing.why and missing.remedy)
    assert set(backend.precisions()) <= set(PRECISIONS)
    assert set(backend.targets()) <= set(backend.all_targets())
    assert missing is not None or backend.versions()
    for precision in PRECISIONS:
        answers = [backend.unsupported(precision, target) for target in backend.targets()]
        assert all(refused is None or (refused.why and refused.remedy) for refused in answers)
        if precision in backend.precisions():
            assert None in answers, "offered by default, and on no target"


@pytest.mark.parametrize(("name", "precision", "model"), CASES)
def test_outputs_are_the_models_at_every_batch(name: str, precision: str, model: str, folder: Path) -> None:
    backend = backends.get(name)
    fp32, engine = _engine(name, precision, model, folder)
    for batch in (1, 2, 7):
        session = backend.open(artifacts.load(engine.path), OpenRequest(precision, batch, 2))
        assert session.device == "cpu"
        assert session.threads == 2
        for seed in (1, 2):  # twice: a session must not answer with the first inputs' outputs
            inputs = cases.feeds(fp32.signature, batch, seed)
            outputs, wanted = session.infer(inputs), cases.expected(backend, precision, fp32, folder, inputs)
            assert list(outputs) == [s.name for s in fp32.signature.outputs]
            for spec in fp32.signature.outputs:
                assert outputs[spec.name].dtype.name == spec.dtype
                assert outputs[spec.name].shape == wanted[spec.name].shape
                assert cases.distance(outputs[spec.name], wanted[spec.name]) <= cases.tolerance(backend, precision)
        before = {k: v.copy() for k, v in outputs.items()}
        for run in [session.bind(cases.feeds(fp32.signature, batch, seed)) for seed in (3, 4)]:
            run()
        assert all(np.array_equal(before[k], outputs[k]) for k in before), "outputs handed out were overwritten by a later run"
        session.close()
        session.close()


@pytest.mark.parametrize("name", [n for n in RUN_HERE if n != "torch-compile"])
def test_feeds_that_do_not_fit_are_the_users_error(name: str, folder: Path) -> None:
    fp32, engine = _engine(name, "fp32", "conv_net", folder)
    session = backends.get(name).open(engine, OpenRequest("fp32", 2, 1))
    good = cases.feeds(fp32.signature, 2)["x"]
    bad = {
        "dtype": {"x": good.astype(np.float64)},
        "name": {"y": good},
        "batch": {"x": np.concatenate([good, good])},
        "rank": {"x": good[0]},
        "size": {"x": good[:, :, :, :7]},
        "extra": {"x": good, "y": good},
    }
    for feeds in bad.values():
        with pytest.raises(InputError):
            session.infer(feeds)
        with pytest.raises(InputError):
            session.bind(feeds)
    assert session.infer({"x": good[:, :, ::-1, ::-1][:, :, ::-1, ::-1]})["logits"].shape == (2, 4)
    session.close()
    with pytest.raises(DeploykitError):
        session.infer({"x": good})


@pytest.mark.parametrize("name", RUN_HERE)
def test_a_batch_the_graph_cannot_take_is_the_users_error(name: str, folder: Path) -> None:
    _, engine = _engine(name, "fp32", "conv_net", folder)
    for batch in (0, -1):
        with pytest.raises(InputError):
            backends.get(name).open(engine, OpenRequest("fp32", batch, 1))


@pytest.mark.parametrize("name", RUN_HERE)
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_truncated_engine_is_one_error(name: str, keep: float, folder: Path, tmp_path: Path) -> None:
    _, engine = _engine(name, "fp32", "conv_net", folder)
    for broken in (engine.path.name, *engine.companions):
        place = tmp_path / f"{broken}-broken"
        place.mkdir()
        for file in (engine.path, *(engine.path.parent / c for c in engine.companions)):
            data = file.read_bytes()
            (place / file.name).write_bytes(data[: int(len(data) * keep)] if file.name == broken else data)
        hurt = replace(engine, path=place / engine.path.name)
        with pytest.raises(DeploykitError):  # also past the manifest's hash
            backends.get(name).open(hurt, OpenRequest("fp32", 1, 1))


@pytest.mark.parametrize("name", [n for n in HERE if n not in RUN_HERE])
def test_an_engine_for_other_hardware_is_built_and_not_opened(name: str, folder: Path) -> None:
    backend = backends.get(name)
    precision = backend.precisions()[0]
    _, engine = _engine(name, precision, "conv_net", folder)
    assert engine.size_bytes > 1000
    assert artifacts.load(engine.path).sha256 == engine.sha256
    with pytest.raises(DeploykitError):
        backend.open(engine, OpenRequest(precision, 1, 1))
