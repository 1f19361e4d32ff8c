"""An engine that was given and none of whose rows ran is not passed over."""

from __future__ import annotations

import pytest
from report_rows import an_ok_row

from deploykit.pipeline.assemble import exit_code_of_engines

UNMEASURED = {"images_per_s": None, "speedup": None, "top1_drop_pp": None}


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ([], 0),
        (["ok"], 0),
        (["built"], 0),
        (["failed", "ok"], 0),
        (["failed"], 4),
        (["failed", "skipped"], 4),
        (["skipped"], 3),
    ],
)
def test_exit_code(statuses: list[str], code: int) -> None:
    assert exit_code_of_engines([an_ok_row(status=s, **({} if s == "ok" else UNMEASURED)) for s in statuses]) == code
