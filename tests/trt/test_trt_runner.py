"""The runner over a GPU in memory: order, sizes, streams, lifetimes. What only a GPU can show is marked `gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cuda_double
import numpy as np
import pytest
from cuda_double import Double, Module, RtxModule

from deploykit.artifact import Artifact
from deploykit.errors import BackendFailed, InputError, MissingBackend, UnknownName
from deploykit.session import OpenRequest
from deploykit.signature import Signature, TensorSpec
from deploykit.trt import device, gpu, timing
from deploykit.trt.runner import EngineSession

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 3, 4)),), (TensorSpec("y", "float32", ("batch", 3)),))
PROFILES = [(1, 1, 1), (1, 8, 32)]


def _open(
    folder: Path,
    board: Double,
    batch: int = 2,
    *,
    data: bytes = b"plan",
    rtx: bool = False,
    precision: str = "fp16",
    facts: dict[str, object] | None = None,
    options: dict[str, object] | None = None,
) -> EngineSession:
    path = folder / "model.engine"
    path.write_bytes(data)
    made = Artifact(path, "tensorrt", precision, SIGNATURE, "build", facts=facts or {})
    trt = (RtxModule if rtx else Module)(board, PROFILES)
    return EngineSession(trt, board, made, OpenRequest(precision, batch, 1, options=options or {}), "a GPU in memory")


def _feeds(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(batch, 3, 4)).astype(np.float32)}


def _expected(feeds: dict[str, np.ndarray]) -> np.ndarray:
    return (2 * feeds["x"].sum(axis=-1)).astype(np.float32)


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("rtx", [True, False])
def test_outputs_are_right_and_nothing_is_left_behind(tmp_path: Path, captures: bool, rtx: bool) -> None:
    board = Double(captures=captures)
    session = _open(tmp_path, board, rtx=rtx)
    pool = [_feeds(2, seed) for seed in range(3)]
    calls = [session.bind(feeds) for feeds in pool]
    for call in calls * 2:
        call()
    kept = [session.infer(feeds)["y"] for feeds in pool]
    for feeds, outputs in zip(pool, kept, strict=True):
        np.testing.assert_array_equal(outputs, _expected(feeds))
    session.close()
    session.close()
    assert board.leaks == {}


def test_a_bound_call_brings_its_own_outputs_to_the_host(tmp_path: Path) -> None:
    session = _open(tmp_path, Double())
    feeds = _feeds(2, 5)
    call = session.bind(feeds)
    other = session.bind(_feeds(2, 6))
    other()
    targets = call()
    np.testing.assert_array_equal(targets["y"].view(np.float32).reshape(2, 3), _expected(feeds))  # type: ignore[index]


def test_the_order_is_profile_shape_addresses_one_run_then_capture(tmp_path: Path) -> None:
    board = Double()
    session = _open(tmp_path, board)
    log = board.log
    steps = ["profile 1", "shape", "address x", "enqueue", "capture", "h2d", "launch", "d2h"]
    assert [log.index(step) for step in steps] == sorted(log.index(step) for step in steps)
    start = len(log)
    session.bind(_feeds(2))()
    assert log[start:] == ["h2d", "launch", "d2h", "sync"]
    assert "CUDA graph: on" in session.notes


def test_the_profile_nearest_to_the_batch_is_chosen(tmp_path: Path) -> None:
    for batch, profile in ((1, 0), (2, 1), (32, 1)):
        board = Double()
        _open(tmp_path, board, batch)
        assert f"profile {profile}" in board.log


def test_a_batch_outside_every_profile_is_refused_with_what_is_taken(tmp_path: Path) -> None:
    board = Double()
    with pytest.raises(InputError, match=r"no profile .* \(33, 3, 4\)") as caught:
        _open(tmp_path, board, 33)
    assert "(1, 3, 4) to (32, 3, 4)" in str(caught.value)
    assert board.leaks == {}


def test_a_plan_that_does_not_load_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    board = Double()
    with pytest.raises(BackendFailed, match="magic tag does not match"):
        _open(tmp_path, board, data=b"nonsense")
    assert board.leaks == {}


def test_a_manifest_of_another_engine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_double.Engine, "output_name", "z")
    board = Double()
    with pytest.raises(InputError, match="manifest belongs to another"):
        _open(tmp_path, board)
    assert board.leaks == {}


def test_a_tensor_type_that_numpy_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_double.Engine, "output_dtype", "bf16")
    with pytest.raises(BackendFailed, match="'y' has a type that numpy lacks"):
        _open(tmp_path, Double())


def test_a_capture_that_fails_falls_back_and_says_so(tmp_path: Path) -> None:
    session = _open(tmp_path, Double(capture_fails=True))
    assert any(note.startswith("CUDA graph: off (capture failed") for note in session.notes)
    feeds = _feeds(2)
    np.testing.assert_array_equal(session.infer(feeds)["y"], _expected(feeds))


def test_feeds_of_another_batch_and_a_closed_session_are_refused(tmp_path: Path) -> None:
    session = _open(tmp_path, Double())
    with pytest.raises(InputError, match="opened at"):
        session.infer(_feeds(3))
    session.close()
    with pytest.raises(BackendFailed, match="closed"):
        session.infer(_feeds(2))


def test_the_split_is_the_events_and_warns_of_transfers(tmp_path: Path) -> None:
    session = _open(tmp_path, Double(compute_s=2e-3, copy_s=5e-4))
    middle = timing.median(session.split(_feeds(2), 5))
    assert (middle.h2d_s, middle.compute_s, middle.d2h_s) == pytest.approx((5e-4, 2e-3, 5e-4))
    assert middle.latency_s == pytest.approx(3e-3)
    assert not any("transfer-bound" in note for note in session.notes)
    slow = _open(tmp_path, Double(compute_s=2e-3, copy_s=5e-3))
    assert any("transfer-bound" in note for note in slow.notes)


def test_enqueue_bound_is_warned_of_above_four_fifths_of_compute() -> None:
    assert timing.warnings(timing.Split(0, 1e-3, 0, 0.79e-3), captured=False) == ()
    (line,) = timing.warnings(timing.Split(0, 1e-3, 0, 0.81e-3), captured=False)
    assert "enqueue-bound" in line


def test_rtx_captures_by_itself_and_keeps_its_cache(tmp_path: Path) -> None:
    cache = tmp_path / "kernels.cache"
    for found, said in ((None, False), (b"cache of kernels", False), (b"cache of fewer", False), (b"of another driver", True)):
        if found is not None:
            cache.write_bytes(found)
        board = Double()
        session = _open(tmp_path, board, rtx=True, options={"runtime_cache": str(cache)})
        (config,) = session._plan._trt.configs
        assert (config.cuda_graph_strategy, config.dynamic_shapes_kernel_specialization_strategy) == ("whole", "eager")
        assert config.cache is not None
        assert config.cache.loaded == (found or b"")
        assert cache.read_bytes() == b"cache of kernels"
        assert "capture" not in board.log
        (ready,) = [note for note in session.notes if note.startswith("ready after")]
        assert ("taken from the runtime cache" in ready) is (found == b"cache of kernels")
        assert any("made anew" in note for note in session.notes) is said


def test_a_cache_that_cannot_be_written_costs_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    session = _open(tmp_path, Double(), rtx=True, options={"runtime_cache": str(tmp_path / "file" / "kernels")})
    assert any(note.startswith("runtime cache: not kept") for note in session.notes)
    np.testing.assert_array_equal(session.infer(_feeds(2))["y"], _expected(_feeds(2)))


def test_rtx_says_when_it_cannot_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(note.startswith("CUDA graph: on") for note in _open(tmp_path, Double(), rtx=True).notes)
    monkeypatch.setattr(cuda_double.RtxContext, "capturable", False)
    session = _open(tmp_path, Double(), rtx=True)
    assert any(note.startswith("CUDA graph: off") for note in session.notes)
    assert not session._plan.captured


def test_a_static_engine_takes_its_own_shape_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PROFILES", [])
    session = _open(tmp_path, Double(), 2)
    np.testing.assert_array_equal(session.infer(_feeds(2))["y"], _expected(_feeds(2)))
    with pytest.raises(InputError, match=r"it takes x \(2, 3, 4\)"):
        _open(tmp_path, Double(), 3)


def test_integer_inputs_start_from_zeros_and_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 8.6 takes int64 as int32, and answers in int32; what the manifest says comes back."""
    signature = Signature((TensorSpec("x", "int64", ("batch", 3, 4)),), (TensorSpec("y", "int64", ("batch", 3)),))
    monkeypatch.setitem(globals(), "SIGNATURE", signature)
    monkeypatch.setattr(cuda_double.Engine, "input_dtype", "int32")
    monkeypatch.setattr(cuda_double.Engine, "output_dtype", "int32")
    session = _open(tmp_path, Double())  # its first run would read wild indices from memory as it comes
    feeds = {"x": np.arange(24).reshape(2, 3, 4)}
    outputs = session.infer(feeds)
    assert outputs["y"].dtype == np.int64
    np.testing.assert_array_equal(outputs["y"], 2 * feeds["x"].sum(axis=-1))
    with pytest.raises(InputError, match="takes it as int32"):
        session.infer({"x": feeds["x"] + 2**33})


def test_half_outputs_come_back_as_the_manifest_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_double.Engine, "output_dtype", "float16")
    found = _open(tmp_path, Double()).infer(_feeds(2))["y"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, _expected(_feeds(2)), rtol=2e-3, atol=2e-3)


def test_the_context_goes_before_the_stream(tmp_path: Path) -> None:
    """The double refuses a stream destroyed under a living context."""
    board = Double()
    stream = board.create_stream()
    kept = cuda_double.Context(cuda_double.Engine(Module(board, PROFILES)))
    with pytest.raises(AssertionError, match="before the context"):
        board.destroy_stream(stream)
    del kept
    board.destroy_stream(stream)
    session = _open(tmp_path, board)
    session.close()
    assert board.leaks == {}


def test_precision_is_what_the_layers_run_in(tmp_path: Path) -> None:
    row = {"node": "conv0", "op": "Conv", "actual": "Half"}
    requested = {"Conv": {"Int8": 2}}
    for fallback, convolutions, expected in (
        ([], {"Int8": 2}, "int8"),
        ([row], {"Half": 1, "Int8": 1}, "int8"),
        ([row, row], {"Half": 2}, "fp16"),
        ([{**row, "actual": "Float"}] * 2, {"Float": 2}, "fp32"),
    ):
        facts = {"fallback": fallback, "requested": requested, "layers": {"convolution": convolutions}}
        session = _open(tmp_path, Double(), precision="int8", facts=facts)
        assert session.precision == expected
        assert any("asked for INT8 run in" in note for note in session.notes) is bool(fallback)


def test_the_double_punishes_memory_given_back_too_early() -> None:
    board = Double()
    stream, address, memory = board.create_stream(), board.allocate(4), board.pin(4)
    board.copy_in(address, memory, stream)
    with pytest.raises(AssertionError, match="given back while"):
        board.free(address)
    board.synchronize(stream)
    board.free(address)


def test_adapters_are_named_and_a_machine_without_a_driver_is_told() -> None:
    with pytest.raises(UnknownName, match="cuda-pyton"):
        device.open_device("cuda-pyton")
    if not gpu.found():
        with pytest.raises(MissingBackend):
            device.open_device()


def test_pycudas_context_is_taken_off_its_stack_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """pycuda aborts the process where a context is left."""
    stack: list[str] = []
    at_exit: list[object] = []
    context = SimpleNamespace(push=lambda: stack.append("primary"), pop=stack.pop)
    driver = ModuleType("pycuda.driver")
    driver.__dict__.update(
        init=lambda: None, Error=RuntimeError, Device=lambda _: SimpleNamespace(retain_primary_context=lambda: context)
    )
    package = ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    monkeypatch.setattr(device.atexit, "register", at_exit.append)
    device.PyCuda()
    assert stack == ["primary"]
    for call in at_exit:
        call()  # type: ignore[operator]
    assert stack == []


def test_every_cuda_function_the_adapter_calls_exists_in_cuda_python() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    import inspect
    import re

    source = inspect.getsource(device.CudaPython)
    called = set(re.findall(r'_call\("(\w+)"', source))
    assert len(called) >= 16
    assert [name for name in called if not hasattr(runtime, name)] == []
    for enum, members in (
        ("cudaMemcpyKind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"]),
        ("cudaStreamCaptureMode", ["cudaStreamCaptureModeThreadLocal"]),
        ("cudaError_t", ["cudaSuccess", "cudaErrorMemoryAllocation"]),
    ):
        assert all(hasattr(getattr(runtime, enum), member) for member in members)


ARGUMENTS = """
import json
import numpy as np
from cuda.bindings import runtime
from deploykit.errors import BackendFailed
from deploykit.trt.device import CudaPython
board = CudaPython.__new__(CudaPython)
board._cuda, board._pinned = runtime, {}
memory = np.zeros(16, np.uint8)
board._pinned[memory.ctypes.data] = memory.ctypes.data
calls = {
    "allocate": (16,), "free": (4096,), "pin": (16,), "unpin": (memory,), "clear": (4096, 16, 64), "copy_in": (4096, memory, 64),
    "copy_out": (memory, 4096, 64), "create_stream": (), "destroy_stream": (64,), "synchronize": (64,), "create_event": (),
    "destroy_event": (64,), "record": (64, 128), "elapsed_s": (64, 128), "capture": (lambda: None, 64), "launch": (64, 128),
    "destroy_graph": (64,),
}
said = {}
for name, arguments in calls.items():
    try:
        getattr(board, name)(*arguments)
        said[name] = "ok"
    except BackendFailed as exc:
        said[name] = exc.message
print(json.dumps(said))
"""


@pytest.mark.skipif(bool(gpu.found()), reason="made-up addresses must not reach a driver")
def test_cuda_python_takes_our_argument_types() -> None:
    """Without a driver every call converts its arguments first, then answers CUDA's own error."""
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    done = subprocess.run([sys.executable, "-c", ARGUMENTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
    said = json.loads(done.stdout)
    protocol = {name for name in vars(device.Device) if not name.startswith("_") and callable(getattr(device.Device, name))}
    assert set(said) == protocol
    assert all("driver" in words for words in said.values()), said
