"""deploykit.yaml: the options of `deploykit run` in a file, each under its own name.

    source: resnet18
    weights: none
    data: digits
    backend: [onnxruntime, openvino]
    batch: [1, 8]
    max-drop: 0.5pp
    out: report

Options on the command line stand over the file's. Paths are relative to the folder the command is run in.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.errors import InputError

_REPEATED = ("input", "shapes")  # one option for each item; the others join their items with commas


def is_config(text: str) -> bool:
    """Whether a SOURCE is a pipeline file."""
    return text.endswith((".yaml", ".yml"))


def arguments(path: Path, known: Mapping[str, bool]) -> list[str]:
    """The command line that the file stands for. `known`: option name (without dashes) -> whether it is a flag.

    Raises InputError with the line number for what is no YAML mapping, an unknown key, and a value of the wrong kind.
    """
    found: list[str] = []
    source: str | None = None
    for key, value, line in _entries(path):
        if key == "source":
            source = _scalar(path, key, value, line)
            continue
        if key not in known:
            close = difflib.get_close_matches(key, ["source", *known], n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known keys: source, {', '.join(sorted(known))}"
            raise InputError(f"{path}, line {line}: unknown key '{key}'", hint)
        if known[key]:
            if not isinstance(value, bool):
                raise InputError(f"{path}, line {line}: '{key}' is true or false, not {value!r}")
            found += [f"--{key}"] if value else []
        elif isinstance(value, list):
            items = [_scalar(path, key, item, line) for item in value]
            found += [x for item in items for x in (f"--{key}", item)] if key in _REPEATED else [f"--{key}", ",".join(items)]
        else:
            found += [f"--{key}", _scalar(path, key, value, line)]
    if source is None:
        raise InputError(f"{path} names no source", "add a line such as: source: resnet18")
    return [source, *found]


def _entries(path: Path) -> list[tuple[str, Any, int]]:
    import yaml

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"cannot read {path}: {exc}", "check the path") from exc
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        doc = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(exc, "problem", None) or "cannot be read"
        tabs = " (tabs cannot indent YAML; use spaces)" if "\\t" in str(problem) or "\t" in text else ""
        raise InputError(f"{path}{where} is not YAML: {problem}{tabs}") from exc
    if not isinstance(root, yaml.MappingNode) or not isinstance(doc, dict):
        raise InputError(f"{path} is no mapping of option names to values", "example line: source: resnet18")
    found: list[tuple[str, Any, int]] = []
    seen: set[str] = set()
    for node, _ in root.value:
        key, line = str(node.value), node.start_mark.line + 1
        if key in seen:
            raise InputError(f"{path}, line {line}: the key '{key}' stands twice", "keep one")
        seen.add(key)
        found.append((key, doc.get(key), line))
    return found


def _scalar(path: Path, key: str, value: Any, line: int) -> str:
    if value is None or isinstance(value, (dict, list)):
        raise InputError(f"{path}, line {line}: '{key}' needs a value, not {value!r}", "a text, a number or a list of them")
    if isinstance(value, bool):
        raise InputError(f"{path}, line {line}: '{key}' is no switch", "give a text or a number")
    return str(value)
