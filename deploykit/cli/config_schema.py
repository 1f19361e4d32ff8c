"""What a deploykit.yaml may hold, as a pydantic model made from the options of `deploykit run`, and its JSON schema.

The published schema is docs/deploykit-schema.json; a test holds it against `schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

if TYPE_CHECKING:
    from pydantic import BaseModel

REPEATED = ("input", "shapes")  # one option for each item; the others join their items with commas
_NUMBER = r"(\d+(\.\d*)?|\.\d+)"
# unit -> (pattern, how to say it)
UNITS: Mapping[str, tuple[str, str]] = {
    "pp": (rf"^\s*{_NUMBER}\s*pp\s*$", "percentage points, like 0.5pp"),
    "%": (rf"^\s*{_NUMBER}\s*%\s*$", "a percentage, like 5%"),
}
LIMITS: Mapping[str, str] = {
    "max-drop": "pp",
    "max-slowdown": "%",
    "max-size-growth": "%",
    "max-memory-growth": "%",
    "max-startup-growth": "%",
    "max-disagreement": "pp",
}
_WHERE = {
    "name": "rows of this model only",
    "backend": "rows of this backend only",
    "precision": "rows of this precision only",
    "batch": "rows of this batch only",
}


@dataclass(frozen=True)
class Key:
    """An option of `run` as a key of the file: kind 'flag' | 'integer' | 'number' | 'text'; off: the option that turns a flag
    off, where there is one."""

    kind: str = "text"
    help: str = ""
    off: str = ""


def keys(command: Any, function: Callable[..., object]) -> dict[str, Key]:
    """The keys that the options of a command stand for, by name without dashes in front; their kinds are those of the function
    it was made from."""
    hints = get_type_hints(function)
    found: dict[str, Key] = {}
    for parameter in command.params:
        names = [opt for opt in parameter.opts if opt.startswith("--") and opt != "--help"]
        off = next(iter(getattr(parameter, "secondary_opts", ())), "")
        hint = hints.get(parameter.name, str)
        kinds = [k for k in getattr(hint, "__args__", (hint,)) if k is not type(None)]
        kind = {bool: "flag", int: "integer", float: "number"}.get(kinds[0], "text")
        found.update({name.removeprefix("--"): Key(kind, getattr(parameter, "help", "") or "", off) for name in names})
    return found


def rule_model() -> type[BaseModel]:
    """One item of `limits`: which rows, and what they may lose."""
    from pydantic import ConfigDict, Field, create_model

    fields: dict[str, Any] = {}
    for name, said in _WHERE.items():
        kind = Annotated[int, Field(ge=1)] if name == "batch" else Annotated[str, Field(min_length=1)]
        fields[name] = (kind | None, Field(default=None, description=said))
    for name, unit in LIMITS.items():
        fields[name.replace("-", "_")] = (_unit(unit) | None, Field(default=None, alias=name, description=UNITS[unit][1]))
    config = ConfigDict(extra="forbid", strict=True, validate_by_alias=True, title="Limits of some rows")
    return cast("type[BaseModel]", create_model("Rule", __config__=config, **fields))


def file_model(known: Mapping[str, Key]) -> type[BaseModel]:
    """The whole file."""
    from pydantic import ConfigDict, Field, create_model

    kinds: dict[str, Any] = {
        "flag": bool,
        "integer": int,
        "number": float | int,
        "text": str | int | float | list[str | int | float],
    }
    fields: dict[str, Any] = {"source": (str, Field(description="the model: resnet18, timm:NAME, file.py:factory, .onnx, .pt2"))}
    for name, key in known.items():
        kind: Any = _unit(LIMITS[name]) if name in LIMITS else kinds[key.kind]
        # not under its own name: pydantic keeps some (json, copy) for itself
        fields[f"key_{name.replace('-', '_')}"] = (kind | None, Field(default=None, alias=name, description=key.help))
    rules: Any = list[rule_model()]  # type: ignore[misc]  # made from the options, not written down
    fields["key_limits"] = (
        rules | None,
        Field(default=None, alias="limits", description="limits of single rows; the last one that covers a row stands"),
    )
    config = ConfigDict(extra="forbid", strict=True, validate_by_alias=True)
    return cast("type[BaseModel]", create_model("Pipeline", __config__=config, **fields))


def _unit(unit: str) -> Any:
    from pydantic import Field

    return Annotated[str, Field(pattern=UNITS[unit][0])]


def schema(known: Mapping[str, Key]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of deploykit.yaml. A key may be written with underscores, too."""
    doc = file_model(known).model_json_schema(by_alias=True)
    doc["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    doc["title"] = "deploykit.yaml"
    doc["description"] = "The options of `deploykit run`, each under its own name, and limits of single rows for the gate."
    for part in (doc, *doc.get("$defs", {}).values()):
        properties = {}
        for name, value in part["properties"].items():
            bare = _without_null(value)
            properties[name] = bare
            if "-" in name:
                properties[name.replace("-", "_")] = bare
        part["properties"] = properties
    return doc


def _without_null(value: dict[str, Any]) -> dict[str, Any]:
    """A key is left out or has a value: null is none."""
    found = {k: v for k, v in value.items() if k not in ("default", "title", "anyOf")}
    kinds = [kind for kind in value.get("anyOf", []) if kind != {"type": "null"}]
    return {**found, **kinds[0]} if len(kinds) == 1 else {**found, "anyOf": kinds} if kinds else found
