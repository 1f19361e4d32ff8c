from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import conv_net

from deploykit.errors import InputError, MissingBackend, UnknownName
from deploykit.pipeline import building, trt
from deploykit.pipeline.request import DataRequest


class _Quiet:
    def step(self, what: str) -> None: ...
    def progress(self, what: str, share: float) -> None: ...


def _request(path: Path, backend: str, mode: str) -> trt.TrtRequest:
    return trt.TrtRequest(path, ("int8",), ("sm75",), (1,), backend, True, {}, int8_mode=mode)


@pytest.mark.parametrize(
    ("backend", "mode", "calib", "error", "said"),
    [
        ("rtx", "implicit", "c.cache", InputError, "no INT8 calibrators"),
        ("rtx", "implied", None, UnknownName, "implied"),
    ],
)
def test_a_mode_that_cannot_be_is_refused(
    tmp_path: Path, backend: str, mode: str, calib: str | None, error: type[Exception], said: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = conv_net(tmp_path / "m.onnx")
    data = DataRequest(calib_table=tmp_path / calib if calib else None)
    with pytest.raises(error, match=said):
        trt.build(_request(path, backend, mode), data, tmp_path / "out", _Quiet())  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_full_tensorrt_takes_the_float_graph_and_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit import backends

    full = type(backends.get("tensorrt"))
    monkeypatch.setattr(full, "missing", lambda _: None)
    seen: list[Any] = []

    def build_engine(*args: Any, **named: Any) -> None:
        seen.append(args)
        raise MissingBackend("stop here")

    monkeypatch.setattr(building, "build_engine", build_engine)
    path, cache = conv_net(tmp_path / "m.onnx"), tmp_path / "c.cache"
    with pytest.raises(InputError, match="reads a calibration cache"):
        trt.build(_request(path, "tensorrt", "implicit"), DataRequest(), tmp_path, _Quiet())  # type: ignore[arg-type]
    with pytest.raises(MissingBackend, match="stop here"):
        trt.build(_request(path, "tensorrt", "implicit"), DataRequest(calib_table=cache), tmp_path, _Quiet())  # type: ignore[arg-type]
    graph, _, _, wanted = seen[0][:4]
    assert wanted.options["calibration"] == str(cache)
    assert graph.path == path
