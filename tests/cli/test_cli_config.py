"""deploykit.yaml: the command line it stands for, limits of single rows, and what is wrong with one, by line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploykit.cli import config, config_schema
from deploykit.cli.config_schema import Key
from deploykit.cli.main import config_keys
from deploykit.errors import InputError
from deploykit.stages.gate import Limits

DOCS = Path(__file__).parent.parent.parent / "docs"
KNOWN = {
    "backend": Key(),
    "batch": Key(),
    "threads": Key("integer"),
    "min-sqnr": Key("number"),
    "remeasure": Key("flag"),
    "bias-correct": Key("flag", off="--no-bias-correct"),
    "input": Key(),
    "json": Key(),
    "max-drop": Key(),
    "max-slowdown": Key(),
}


def written(folder: Path, text: str) -> Path:
    file = folder / "deploykit.yaml"
    file.write_text(text)
    return file


def test_a_pipeline_file_is_the_command_line_it_stands_for(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "source: m.onnx\nbackend: [onnxruntime, openvino]\nbatch: 4\nremeasure: true\ninput: ['a:float32:1x3', 'b:int64:1']\n"
        "max_drop: 0.5pp\nbias-correct: false\nmin-sqnr: 25\n",
    )
    assert config.arguments(file, KNOWN) == [
        "m.onnx", "--backend", "onnxruntime,openvino", "--batch", "4", "--remeasure", "--input", "a:float32:1x3", "--input", "b:int64:1",
        "--max-drop", "0.5pp", "--no-bias-correct", "--min-sqnr", "25",
    ]  # fmt: skip


def test_a_flag_that_is_off_is_left_out(tmp_path: Path) -> None:
    assert config.arguments(written(tmp_path, "source: m.onnx\nremeasure: false\n"), KNOWN) == ["m.onnx"]


def test_limits_become_the_option_that_reads_them(tmp_path: Path) -> None:
    file = written(tmp_path, "source: m.onnx\nlimits: [{backend: openvino, max-drop: 1pp}]\n")
    assert config.arguments(file, KNOWN) == ["m.onnx", "--limits", str(file)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source: m.onnx\nbacken: x\n", "line 2: unknown key 'backen'\n.*did you mean 'backend'"),
        ("source: m.onnx\nbackend: {a: 1}\n", "line 2: 'backend'"),
        ("source: m.onnx\nbackend: [a, {b: 1}]\n", "line 2: 'backend'"),
        ("source: m.onnx\nremeasure: maybe\n", "line 2: 'remeasure' is 'maybe'; it needs true or false"),
        ("source: m.onnx\nthreads: two\n", "line 2: 'threads' is 'two'; it needs a whole number"),
        ("source: m.onnx\nthreads: true\n", "line 2: 'threads'"),
        ("source: m.onnx\nbatch:\n", "line 2: 'batch' needs a value"),
        ("source: m.onnx\nbatch: no\n", "line 2: 'batch' is False"),
        ("source: m.onnx\nbatch: 2020-01-01\n", "line 2: 'batch'"),
        ("source: m.onnx\nmin-sqnr: .nan\n", "line 2: 'min-sqnr' needs a value"),
        ("source: m.onnx\nbatch:\n\t- 1\n", "tabs"),
        ("source: m.onnx\n\tbatch: 1\n", "tabs"),
        ("source: 5\n", "line 1: 'source' is 5; it needs a text"),
        ("- a\n- b\n", "no mapping"),
        ("", "no mapping"),
        ("batch: 1\n", "names no source"),
        ("source: m.onnx\nbatch: 1\nbatch: 2\n", "line 3: the key 'batch' stands twice"),
        ("source: m.onnx\nmax-drop: 1pp\nmax_drop: 2pp\n", "line 3: the key 'max_drop' stands twice"),
        ("source: [", "not YAML"),
        ("source: !!python/object:os.system x\n", "not YAML"),
        ("source: m.onnx\nmax-drop: 0.5%\n", "line 2: 'max-drop' is '0.5%', not percentage points, like 0.5pp"),
        ("source: m.onnx\nmax-slowdown: 0.05\n", "line 2: 'max-slowdown' is 0.05, not a percentage, like 5%"),
        ("source: m.onnx\nlimits: 5\n", "line 2: 'limits' is a list of mappings"),
        ("source: m.onnx\nlimits:\n  - backend: openvino\n    max-dorp: 1pp\n", "line 4: unknown key 'max-dorp'\n.*'max-drop'"),
        ("source: m.onnx\nlimits:\n  - backend: openvino\n    max-drop: 1\n", "line 4: 'max-drop' is 1, not percentage points"),
        ("source: m.onnx\nlimits:\n  - {batch: 0, max-drop: 1pp}\n", "line 3: 'batch' is 0; it needs a positive whole number"),
        ("source: m.onnx\nbackend: &a [*a]\n", "line 2: a value holds itself"),
        ("source: m.onnx\nlimits: &a\n  - {backend: *a}\n", "a value holds itself"),
    ],
)
def test_a_bad_pipeline_file_is_refused_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        config.arguments(written(tmp_path, text), KNOWN)
    import re

    assert re.search(said, str(caught.value)), str(caught.value)


def test_a_few_lines_that_stand_for_billions_are_refused_at_once(tmp_path: Path) -> None:
    levels = [f"  - &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 14)]
    file = written(tmp_path, "\n".join(["source: m.onnx", "backend:", "  - &l0 x", *levels, ""]))
    with pytest.raises(InputError, match="'backend' is ") as caught:
        config.arguments(file, KNOWN)
    assert len(str(caught.value)) < 3000


def test_an_anchor_may_be_used_twice(tmp_path: Path) -> None:
    file = written(tmp_path, "source: m.onnx\nbatch: &b [1, 8]\nbackend: &n [openvino]\ninput: *n\n")
    assert config.arguments(file, KNOWN)[-2:] == ["--input", "openvino"]


def test_limits_of_single_rows(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "limits:\n  - {backend: openvino, precision: int8, max_drop: 0.5pp, max_slowdown: 5%}\n  - {batch: 8, max-size-growth: 10 %}\n",
    )
    first, second = config.rules(file)
    assert first.where == {"backend": "openvino", "precision": "int8"}
    assert first.limits == Limits(max_drop_pp=0.5, max_slowdown=0.05)
    assert second.limits == Limits(max_size_growth=0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source: x\n", "no list of limits"),
        ("limits: []\n", "no list of limits"),
        ("limits:\n  - {backend: openvino}\n", "line 2: it limits nothing"),
        ("limits:\n  - {backend: opnvino, max-drop: 1pp}\n", "line 2: unknown backend 'opnvino'\n.*openvino"),
        ("limits:\n  - {precision: int9, max-drop: 1pp}\n", "line 2: unknown precision 'int9'"),
        ("limits:\n  - 5\n", "line 2: a limit is a mapping"),
        ("limits:\n  - {max-slowdown: 100%}\n", "line 2: .*allows any"),
    ],
)
def test_bad_limits_are_refused_with_their_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        config.rules(written(tmp_path, text))


def test_the_published_schema_is_the_codes() -> None:
    kept = json.loads((DOCS / "deploykit-schema.json").read_text())
    assert kept == config_schema.schema(config_keys()), "make docs/deploykit-schema.json anew: python scripts/schemas.py"


def test_the_schema_takes_what_the_code_takes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    doc = config_schema.schema(config_keys())
    good = {"source": "resnet18", "batch": [1, 8], "max_drop": "0.5pp", "limits": [{"backend": "openvino", "max-slowdown": "5%"}]}
    jsonschema.validate(good, doc)
    for bad in ({"source": "x", "bach": 1}, {"source": "x", "max-drop": "1%"}, {"batch": 1}, {"source": "x", "threads": "two"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, doc)


def test_run_reads_the_file_and_names_the_line(tmp_path: Path) -> None:
    written(tmp_path, "source: m.onnx\nout: out\nduratoin: quick\n")
    command = [sys.executable, "-m", "deploykit", "run", "deploykit.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "deploykit.yaml, line 3: unknown key 'duratoin'" in done.stderr
    assert "did you mean 'duration'?" in done.stderr


@pytest.mark.parametrize("before", [["--aa"], ["--limits", "limits.yaml"], ["--duration=smoke"], []])
def test_the_pipeline_file_is_found_behind_other_options(before: list[str], tmp_path: Path) -> None:
    from deploykit.cli import main

    file = written(tmp_path, "source: m.onnx\nout: out\n")
    found = main._with_config(["run", *before, str(file)])
    assert found == ["run", "m.onnx", "--out", "out", *before]


def test_an_option_s_own_yaml_is_no_pipeline_file() -> None:
    from deploykit.cli import main

    for given in (["run", "m.onnx", "--limits", "limits.yaml"], ["run", "m.onnx", "--limits=limits.yaml", "-o", "out"]):
        assert main._with_config(given) == given
