"""Options declared once: a dataclass among a command's parameters stands for its fields."""

from __future__ import annotations

import inspect

import pytest

from deploykit.cli import line_commands
from deploykit.cli.line_options import LineOptions
from deploykit.cli.options import spread
from deploykit.errors import InputError


def test_a_dataclass_parameter_becomes_its_fields() -> None:
    seen: list[object] = []

    def command(name: str, options: LineOptions, last: int = 3) -> int:
        seen.extend((name, options, last))
        return 7

    made = spread(command)
    names = list(inspect.signature(made).parameters)
    assert names[0] == "name"
    assert names[-1] == "last"
    assert {"data", "batch", "store"} <= set(names)
    assert "options" not in names
    given = {n: p.default for n, p in inspect.signature(made).parameters.items() if n != "name"} | {"batch": "4"}
    assert made(name="m", **given) == 7
    assert seen == ["m", LineOptions(batch="4"), 3]


def test_run_and_bench_share_every_option_of_the_line() -> None:
    shared = set(LineOptions.__dataclass_fields__)
    for command in (line_commands.run, line_commands.bench):
        assert shared <= set(inspect.signature(spread(command)).parameters)


def test_the_options_become_one_request() -> None:
    request = LineOptions(batch="1,4", precision="fp32,mixed", backend="openvino").request((), max_drop="0.5pp", remeasure=True)
    assert request.rows.batches == (1, 4)
    assert request.rows.precisions == ("fp32", "mixed")
    assert request.rows.remeasure
    assert request.data.budget is not None
    assert LineOptions(precision="fp32").request((), max_drop="0.5pp").data.budget is None
    with pytest.raises(InputError, match="--limit 0"):
        LineOptions(limit=0).request(())
