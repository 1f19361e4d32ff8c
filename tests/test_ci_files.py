"""action.yml, the workflow and the pre-commit hook: well formed, and their commands work where no runner is needed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import yaml
from report_rows import a_report, an_ok_row

from deploykit.report_document import row_id
from deploykit.stages import report as reports

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"] if "name" in step}
needs_bash = pytest.mark.skipif(not Path("/bin/bash").exists(), reason="the action's steps are bash")


def _step(name: str, folder: Path, first: Path | None = None, **inputs: str) -> subprocess.CompletedProcess[str]:
    """One step of the action as a runner would run it, with this environment's deploykit first on the PATH."""
    env = {**os.environ, "PATH": f"{first or Path(sys.executable).parent}:{os.environ['PATH']}", **inputs}
    env |= {"GITHUB_OUTPUT": str(folder / "output"), "GITHUB_STEP_SUMMARY": str(folder / "summary")}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEPS[name]["run"]]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=env)


def _kept(folder: Path, **row: Any) -> Path:
    rows = (an_ok_row(backend="torch", precision="fp32", images_per_s=100.0, top1=0.971, top1_drop_pp=0.0), an_ok_row(**row))
    reports.write(a_report(rows=rows, measurements={row_id(r): {"launches": [[]] * 5} for r in rows}), folder)
    return folder


def test_every_input_a_step_names_is_declared_and_used() -> None:
    text = (ROOT / "action.yml").read_text()
    named = set(re.findall(r"inputs\.([a-z-]+)", text))
    assert named == set(ACTION["inputs"])
    assert all(value["description"] for value in ACTION["inputs"].values())


def test_no_input_is_pasted_into_a_shell() -> None:
    """An expression inside `run:` would let a pull request's title or branch name run as code."""
    for step in STEPS.values():
        assert "${{" not in step.get("run", "")


@needs_bash
def test_the_gate_step_says_its_verdict_and_ends_with_its_code(tmp_path: Path) -> None:
    _kept(tmp_path / "base")
    _kept(tmp_path / "same")
    _kept(tmp_path / "slow", speedup=2.0, images_per_s=200.0)
    given = {"BASELINE": "base", "GATE_ARGS": "--max-slowdown 5%", "ALLOW": "false"}
    for out, code, verdict in (("same", 0, "pass"), ("slow", 1, "fail")):
        done = _step("gate", tmp_path, OUT=out, **given)
        assert done.returncode == code, done.stdout + done.stderr
        assert (tmp_path / "output").read_text().splitlines()[-1] == f"verdict={verdict}"
        assert (tmp_path / out / "gate.xml").is_file()
    nothing = _step("gate", tmp_path, OUT="same", BASELINE="", GATE_ARGS="", ALLOW="false")
    assert nothing.returncode == 0
    assert (tmp_path / "output").read_text().splitlines()[-1] == "verdict=none"
    done = _step("summary", tmp_path, OUT="slow")
    assert done.returncode == 0
    summary = (tmp_path / "summary").read_text()
    assert "| " in summary
    assert "verdict: fail" in summary


@needs_bash
def test_inconclusive_is_allowed_only_where_asked_for(tmp_path: Path) -> None:
    _kept(tmp_path / "base")
    _kept(tmp_path / "wide", speedup=4.9, speedup_low=4.0, speedup_high=6.0, images_per_s=490.0)
    given = {"OUT": "wide", "BASELINE": "base", "GATE_ARGS": "--max-slowdown 5%"}
    assert _step("gate", tmp_path, ALLOW="false", **given).returncode == 5
    allowed = _step("gate", tmp_path, ALLOW="true", **given)
    assert allowed.returncode == 0
    assert "::warning" in allowed.stdout
    assert _step("gate", tmp_path, ALLOW="true", **{**given, "OUT": "nowhere"}).returncode == 2


@needs_bash
@pytest.mark.parametrize(
    ("code", "allow", "ends", "verdict"),
    [(0, "false", 0, "none"), (1, "true", 1, "fail"), (5, "false", 5, "inconclusive"), (5, "true", 0, "inconclusive")],
)
def test_gates_of_the_run_itself_are_the_verdict(code: int, allow: str, ends: int, verdict: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "deploykit"
    command.write_text(f"#!/bin/sh\nexit {code}\n")
    command.chmod(0o755)
    given = {"SOURCE": "m.onnx", "ARGS": "", "OUT": "out"}
    ran = _step("run", tmp_path, first=tmp_path / "bin", **given)
    assert ran.returncode == 0
    assert (tmp_path / "output").read_text() == f"code={code}\n"
    done = _step("gate", tmp_path, OUT="out", BASELINE="", GATE_ARGS="", ALLOW=allow, RUN_CODE=str(code))
    assert done.returncode == ends, done.stdout + done.stderr
    assert (tmp_path / "output").read_text().splitlines()[-1] == f"verdict={verdict}"
    command.write_text("#!/bin/sh\nexit 4\n")
    assert _step("run", tmp_path, first=tmp_path / "bin", **given).returncode == 4


def test_the_workflow_uses_the_action_with_inputs_it_has() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "deploykit.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    ours = [step for step in steps if step.get("uses") == "./"]
    assert ours and all(set(step["with"]) <= set(ACTION["inputs"]) for step in ours)
    assert any(step.get("run") == "make test" for step in steps)
    from deploykit.cli.main import config_keys

    for step in ours:
        options = [word for word in shlex.split(step["with"]["args"]) if word.startswith("--")]
        assert {o.removeprefix("--") for o in options} <= set(config_keys())


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="the hook's entry is a shell command")
def test_the_pre_commit_hook_checks_every_file(tmp_path: Path) -> None:
    hook = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())[0]
    tiny_models.conv_net(tmp_path / "good.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(*files: str) -> int:
        command = [*shlex.split(hook["entry"]), *files]
        return subprocess.run(command, capture_output=True, check=False, cwd=tmp_path, env=env).returncode

    assert re.search(hook["files"], "models/net.onnx")
    assert run("good.onnx") == 0
    assert run("bad.onnx", "good.onnx") == 2


@needs_bash
def test_words_of_the_arguments_are_no_file_patterns(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "1,8").write_text("")
    command = tmp_path / "bin" / "deploykit"
    command.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done > said\n')
    command.chmod(0o755)
    _step("run", tmp_path, first=tmp_path / "bin", SOURCE="m.onnx", ARGS="--batch [1],8 --data *", OUT="out")
    assert (tmp_path / "said").read_text().split() == ["run", "m.onnx", "--batch", "[1],8", "--data", "*", "-o", "out"]
