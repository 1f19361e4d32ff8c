"""deploykit.yaml: the options of `deploykit run` in a file, each under its own name, and limits of single rows.

    source: resnet18
    weights: none
    data: digits
    backend: [onnxruntime, openvino]
    batch: [1, 8]
    out: report
    max-drop: 0.5pp
    limits:
      - {backend: openvino, precision: int8, max-drop: 1pp, max-slowdown: 5%}

Options on the command line stand over the file's. Paths are relative to the folder the command is run in.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.cli.config_schema import LIMITS, REPEATED, UNITS, Key, file_model, rule_model
from deploykit.errors import InputError, UnknownName

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from deploykit.stages.gate import Rule

_WANTED = {
    "flag": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "text": "a text, a number or a list of them",
}


_BRIEF = reprlib.Repr()  # aliases can make a few lines stand for more than memory holds
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 120, 120


def is_config(text: str) -> bool:
    """Whether a SOURCE is a pipeline file."""
    return text.endswith((".yaml", ".yml"))


def arguments(path: Path, known: Mapping[str, Key]) -> list[str]:
    """The command line that the file stands for.

    Raises InputError with the line number for what is no YAML mapping, an unknown key, and a value of the wrong kind or unit.
    """
    doc, root = _read(path)
    if "source" not in doc:
        raise InputError(f"{path} names no source", "add a line such as: source: resnet18")
    _validate(path, file_model(known), doc, root, known)
    found = [str(doc["source"])]
    for key, value in doc.items():
        if key in ("source", "limits"):
            continue
        if known[key].kind == "flag":
            found += [f"--{key}"] if value else [known[key].off] if known[key].off else []
        elif isinstance(value, list):
            items = [str(item) for item in value]
            found += [x for item in items for x in (f"--{key}", item)] if key in REPEATED else [f"--{key}", ",".join(items)]
        else:
            found += [f"--{key}", str(value)]
    return [*found, "--limits", str(path)] if "limits" in doc else found


def rules(path: Path) -> tuple[Rule, ...]:
    """The limits of single rows in a deploykit.yaml, or in a file of `limits` alone. Raises InputError with the line number."""
    from deploykit import backends
    from deploykit.session import PRECISIONS
    from deploykit.stages import gate

    doc, root = _read(path)
    listed = doc.get("limits")
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{path} holds no list of limits", "example: limits: [{backend: openvino, max-drop: 0.5pp}]")
    found = []
    for number, item in enumerate(listed):
        where = f"{path}, line {_line(root, ('limits', number))}"
        if not isinstance(item, dict):
            said = f"{where}: a limit is a mapping, not {_BRIEF.repr(item)}"
            raise InputError(said, "example: {backend: openvino, max-drop: 0.5pp}")
        _validate(path, rule_model(), item, root, {}, ("limits", number))
        if not set(item) & set(LIMITS):
            raise InputError(f"{where}: it limits nothing", f"add one of {', '.join(LIMITS)}")
        chosen = {k: v for k, v in item.items() if k not in LIMITS}
        for kind, choices in (("backend", backends.MODULES), ("precision", PRECISIONS)):
            if kind in chosen and chosen[kind] not in choices:
                unknown = UnknownName(kind, str(chosen[kind]), choices)
                raise InputError(f"{where}: {unknown.message}", unknown.remedy)
        values = {k.replace("-", "_"): _number(item[k]) / 100 for k, unit in LIMITS.items() if k in item and unit == "%"}
        values |= {f"{k.replace('-', '_')}_pp": _number(item[k]) for k, unit in LIMITS.items() if k in item and unit == "pp"}
        if values.get("max_slowdown", 0.0) >= 1:
            raise InputError(f"{where}: a max-slowdown of {item['max-slowdown']} allows any", "give less than 100%")
        found.append(gate.Rule(chosen, gate.Limits(**values)))
    return tuple(found)


def _number(text: str) -> float:
    """'5%' and '5pp' as 5.0."""
    return float(text.strip().rstrip("p%"))


def _validate(
    path: Path, model: Any, doc: Mapping[str, Any], root: Any, known: Mapping[str, Key], at: tuple[str | int, ...] = ()
) -> None:
    from pydantic import ValidationError

    try:
        model.model_validate(doc)
    except ValidationError as exc:
        first = min(exc.errors(include_url=False), key=lambda e: _line(root, (*at, *e["loc"])))
        message, remedy = _said(first, known, (*at, *first["loc"]))
        raise InputError(f"{path}, line {_line(root, (*at, *first['loc']))}: {message}", remedy) from exc


def _said(error: ErrorDetails, known: Mapping[str, Key], loc: tuple[str | int, ...]) -> tuple[str, str | None]:
    inside = loc[0] == "limits" and len(loc) > 2
    key = str(loc[2] if inside else loc[0])
    if error["type"] == "extra_forbidden":
        choices = ["name", "backend", "precision", "batch", *LIMITS] if inside else ["source", "limits", *known]
        close = difflib.get_close_matches(key, choices, n=1)
        return f"unknown key '{key}'", f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(sorted(choices))}"
    value = _BRIEF.repr(error["input"])
    if key in LIMITS:
        return f"'{key}' is {value}, not {UNITS[LIMITS[key]][1]}", f"write {key}: {UNITS[LIMITS[key]][1].split('like ')[1]}"
    if inside:
        return f"'{key}' is {value}; it needs {'a positive whole number' if key == 'batch' else 'a name'}", None
    if key == "limits":
        return f"'limits' is a list of mappings, not {value}", "example: limits: [{backend: openvino, max-drop: 0.5pp}]"
    wanted = "a text" if key == "source" else _WANTED[known[key].kind]
    return f"'{key}' is {value}; it needs {wanted}", None


def _line(node: Any, loc: tuple[str | int, ...]) -> int:
    """The line of the deepest node that `loc` leads to, counted from 1: of a mapping's item, its key's."""
    import yaml

    line = int(node.start_mark.line)
    for step in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if _dashed(k.value) == step), None)
            if pair is None:
                break
            line, node = int(pair[0].start_mark.line), pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = int(node.start_mark.line)
        else:
            break
    return line + 1


def _dashed(key: object) -> str:
    return str(key).replace("_", "-")


def _read(path: Path) -> tuple[dict[str, Any], Any]:
    """The file as values, keys with dashes, and as YAML nodes, which know their lines. Raises InputError."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"cannot read {path}: {exc}", "check the path") from exc
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        doc = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(exc, "problem", None) or "cannot be read"
        tabs = " (tabs cannot indent YAML; use spaces)" if "\\t" in str(problem) or "\t" in text else ""
        raise InputError(f"{path}{where} is not YAML: {problem}{tabs}") from exc
    if not isinstance(root, yaml.MappingNode) or not isinstance(doc, dict):
        raise InputError(f"{path} is no mapping of option names to values", "example line: source: resnet18")
    _no_twins(path, root, {})
    plain = {_dashed(k): v for k, v in doc.items()}
    for key, value in plain.items():
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"{path}, line {_line(root, (key,))}: '{key}' needs a value, not {value!r}", "or leave the line out")
    listed = plain.get("limits")
    if isinstance(listed, list):
        plain["limits"] = [{_dashed(k): v for k, v in x.items()} if isinstance(x, dict) else x for x in listed]
    return plain, root


def _no_twins(path: Path, node: Any, known: dict[int, Any]) -> None:
    """Raises InputError for a mapping with one key twice, at any depth, and for an alias to what it stands in. known: the nodes
    looked at already, None while they are: aliases make one node stand in many places."""
    import yaml

    if id(node) in known:
        if known[id(node)] is None:
            raise InputError(f"{path}, line {node.start_mark.line + 1}: a value holds itself (an alias to its own anchor)")
        return
    known[id(node)] = None
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _no_twins(path, item, known)
    elif isinstance(node, yaml.MappingNode):
        _no_twin_keys(path, node, known)
    known[id(node)] = node


def _no_twin_keys(path: Path, node: Any, known: dict[int, Any]) -> None:
    seen: set[str] = set()
    for key, value in node.value:
        name = _dashed(key.value)
        if name in seen:
            raise InputError(f"{path}, line {key.start_mark.line + 1}: the key '{key.value}' stands twice", "keep one")
        seen.add(name)
        _no_twins(path, value, known)
