"""`sweep` and the load options as typed: bad input is one message, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models

from deploykit.cli import parsing
from deploykit.cli.main import run
from deploykit.errors import InputError
from deploykit.pipeline import sweep_bench, sweeping
from deploykit.pipeline.line import LineRequest
from deploykit.stages import bench


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-latency", "5"], "--max-latency '5' is no latency"),
        (["--max-memory", "500"], "--max-memory '500' is no amount of memory"),
        (["--max-drop", "half"], "half"),
        (["--threads", "0"], "--threads '0' is not a list"),
        (["--streams", "a,b"], "--streams 'a,b' is not a list"),
        (["--objective", "troughput"], "did you mean 'throughput'"),
        (["--budget", "soon"], "--budget 'soon' is no length of time"),
        (["--batch", "0"], "--batch '0'"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--calib-n", "-5"], "--calib-n -5 must be at least 1"),
        # an empty variable of a script is no limit left out
        (["--max-latency", ""], "--max-latency '' is no latency"),
        (["--max-drop", ""], "--max-drop ''"),
        (["--max-memory", ""], "--max-memory '' is no amount of memory"),
        (["--budget", ""], "--budget '' is no length of time"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sweep", "m.onnx", *arguments]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("command", ["bench", "run"])
def test_a_wrong_scenario_or_bound_is_one_message(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["-o", "unused"] if command == "run" else []
    assert run([command, "m.onnx", *more, "--scenario", "Sever"]) == 2
    assert "did you mean 'Server'" in capsys.readouterr().err
    assert run([command, "m.onnx", *more, "--server-latency", "fast"]) == 2
    assert "--server-latency 'fast' is no latency" in capsys.readouterr().err
    assert run([command, "m.onnx", *more, "--streams", "0"]) == 2


@pytest.mark.parametrize(("text", "found"), [("90s", 90.0), ("2m", 120.0), ("1h", 3600.0)])
def test_lengths_of_time(text: str, found: float) -> None:
    assert parsing.seconds(text, "--budget") == found


@pytest.mark.parametrize("text", ["", "s", "-1s", "nans", "10", "infh"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(InputError):
        parsing.seconds(text, "--budget")


def test_memory_is_in_powers_of_ten() -> None:
    assert parsing.memory_bytes("1.5gb", "--max-memory") == 1_500_000_000


def test_a_sweep_s_json_is_alone_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    quick = bench.Duration("test", launches=1, rounds=2, seconds=0.1, limit_s=0.1, enough_runs=1)
    monkeypatch.setattr(sweep_bench, "DURATIONS", {"look": quick, "final": quick})
    model = tiny_models.conv_net(tmp_path / "tiny.onnx")
    typed = ["sweep", str(model), "--backend", "onnxruntime", "--precision", "fp32", "--batch", "1,2", "--threads", "1"]
    assert run([*typed, "--store", str(tmp_path / "store"), "--json", "-"]) == 0
    doc = json.loads(capsys.readouterr().out)
    assert doc["recommended"]["backend"] == "onnxruntime"
    assert f"deploykit bench {model}" in doc["recommended"]["command"]
    assert len(doc["trials"]) == 2
    assert f"--store {tmp_path / 'store'}" in doc["recommended"]["command"]


def test_the_command_that_measures_again_asks_for_the_same_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[sweeping.SweepRequest] = []

    def take(request: sweeping.SweepRequest, say: object) -> sweeping.Swept:
        asked.append(request)
        raise InputError("enough")

    monkeypatch.setattr(sweeping, "take", take)
    assert run(["sweep", "m.onnx"]) == 2
    assert run(["sweep", "m.onnx", "--method", "entropy", "--calib-n", "64", "--store", "other"]) == 2
    assert asked[0].line.data == LineRequest(()).data  # as `bench` calibrates
    assert asked[0].command == ("deploykit", "bench", "m.onnx")
    assert asked[1].command[3:] == ("--calib-n", "64", "--method", "entropy", "--store", "other")
