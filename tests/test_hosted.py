"""hosted: several requests at once, in a real OpenVINO session; the same outputs, and a window that counts all of them."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tiny_models

from deploykit import backends, graph, hosted
from deploykit.artifact import Artifact
from deploykit.children import Child
from deploykit.errors import BackendFailed
from deploykit.session import BuildRequest, OpenRequest
from deploykit.signature import Feeds


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("hosted")
    path = tiny_models.conv_net(folder / "model.onnx")
    model = Artifact(path, "onnx", "fp32", graph.signature(graph.load(path)), "export")
    return backends.get("openvino").build(model, BuildRequest("fp32"), folder).save()


def _pool(n: int = 3) -> list[Feeds]:
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(n)]


def test_a_window_of_two_streams_counts_the_runs_of_both(engine: Artifact) -> None:
    with Child("streams", threads=2) as child:
        opened = child.call(hosted.open_engine, "openvino", engine.path, OpenRequest("fp32", 1, 2, options={"streams": 2}))
        assert opened.streams == 2
        assert any("2 requests at once" in note for note in opened.notes)
        child.call(hosted.bind_inputs, _pool())
        window = child.call(hosted.window, 0.2)
    assert window.wall_s >= 0.2
    assert len(window.seconds) > 10
    # two lanes: together their runs took longer than the wall clock
    assert sum(window.seconds) > window.wall_s


def test_one_stream_is_the_default(engine: Artifact) -> None:
    with Child("streams", threads=1) as child:
        opened = child.call(hosted.open_engine, "openvino", engine.path, OpenRequest("fp32", 1, 1))
        assert opened.streams == 1
        child.call(hosted.bind_briefly, _pool())
        window = child.call(hosted.window, 0.05)
    assert sum(window.seconds) <= window.wall_s


def test_requests_at_once_give_what_one_at_a_time_gives(engine: Artifact) -> None:
    backend = backends.get("openvino")
    alone = backend.open(engine, OpenRequest("fp32", 1, 2))
    together = backend.open(engine, OpenRequest("fp32", 1, 2, options={"streams": 2}))
    pool = _pool(8)
    wanted = [alone.infer(feeds) for feeds in pool]
    wrong: list[int] = []

    def work(start: int) -> None:
        for i in range(start, len(pool) * 10, 2):
            found = together.infer(pool[i % len(pool)])
            if any(not np.allclose(found[k], v, atol=1e-5) for k, v in wanted[i % len(pool)].items()):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone.close()
    together.close()
    assert wrong == []
    with pytest.raises(BackendFailed, match="closed"):
        together.infer(pool[0])


def test_a_lane_that_fails_is_the_window_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))

    def breaks() -> None:
        if next(calls) > 50:
            raise BackendFailed("broke")

    monkeypatch.setattr(hosted, "_lanes", [[breaks], [breaks]])
    monkeypatch.setattr(hosted, "_next", [0, 0])
    monkeypatch.setattr(hosted, "SETTLE_S", 0.0)
    with pytest.raises(BackendFailed, match="broke"):
        hosted.window(5.0)


def test_only_backends_that_say_so_run_several_at_once() -> None:
    assert backends.concurrent("openvino")
    assert not backends.concurrent("torch")
