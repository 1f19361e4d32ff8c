"""The HTML page: escapes, asks for nothing from the network, and a real browser shows it without complaint."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_rows import a_report, an_ok_row

from deploykit.report_document import Report, row_id
from deploykit.stages.report import html_page, plots
from deploykit.verdict import Finding, Reason, Verdict

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> &amp; </style></title>"


def large_report(rows: int = 40) -> Report:
    """A report of that many measured rows with raw seconds, a verdict, findings and nasty text everywhere."""
    rng = np.random.default_rng(0)
    reference = a_report().rows[0]
    found = [reference]
    for i in range(rows - 1):
        rate = 100 * float(np.exp(rng.normal(1, 0.8)))
        drop = float(abs(rng.normal(0, 1)))
        found.append(
            an_ok_row(backend=f"backend{i % 7}", precision=("fp32", "bf16", "int8")[i % 3], batch=1 + 7 * (i // 21), images_per_s=rate,
                      speedup=rate / 100, p50_s=1 / rate, p90_s=1.1 / rate, p99_s=1.4 / rate, top1=0.971 - drop / 100, top1_drop_pp=drop,
                      notes=NASTY if i % 5 == 0 else "")
        )  # fmt: skip
    raw: dict[str, Any] = {}
    for row in found:
        windows = [{"seconds": list((row.p50_s or 1) * np.exp(rng.gamma(2, 0.03, 500))), "wall_s": 1.0} for _ in range(4)]
        raw[row_id(row)] = {"launches": [windows] * 3}
    return a_report(
        rows=tuple(found),
        measurements=raw,
        model={"name": NASTY, "summary": {"nodes": 3, "x": [{"y": NASTY}]}},
        command=("deploykit", "run", NASTY),
        notes=(NASTY,),
        findings=(Finding("DK001", "warning", NASTY, NASTY, NASTY),),
        verdict=Verdict("inconclusive", (Reason(NASTY, NASTY, "inconclusive", NASTY),), (NASTY,)),
        drifts={row_id(found[1]): {"n": 360, "kl": 0.1}},
        environment={"cpu": NASTY, "features": ["avx2"], "memory_bytes": 8 << 30},
    )


class Tags(HTMLParser):
    """Collects tags, and whether they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.urls += [v or "" for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


@pytest.mark.parametrize("report", [large_report(), a_report(), a_report(rows=(), reference={}, samples={}, model={})])
def test_the_page_is_well_formed_and_self_contained(report: Report) -> None:
    page = html_page.text(report)
    tags = parsed(page)
    assert not {"script", "img", "iframe", "object"} & set(tags.tags)
    assert all(url.startswith(("#", "data:")) for url in tags.urls)
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(", page)


def test_forty_rows_stay_under_three_megabytes() -> None:
    assert len(html_page.text(large_report(40)).encode()) < 3_000_000


def test_every_row_stands_in_the_page() -> None:
    page = html_page.text(a_report())
    assert len(re.findall(r"<tr class='", page)) == len(a_report().rows)
    for said in ("needs an NVIDIA GPU", "killed by SIGSEGV", "UNSTABLE", "360 of digits", "deploykit run tiny --data digits"):
        assert said in page


def test_drawings_leave_out_what_was_not_measured() -> None:
    silent = tuple(replace(r, status="skipped", images_per_s=None, p50_s=None) for r in a_report().rows)
    assert plots.trade_off(a_report(rows=silent)) == plots.latencies(a_report(rows=silent)) == ""
    bare = tuple(replace(r, top1=None, top1_drop_pp=None, agreement=None) for r in a_report().rows)
    assert "p50 latency" in plots.trade_off(a_report(rows=bare))
    agreeing = tuple(replace(r, top1=None, top1_drop_pp=None) for r in a_report().rows)
    assert "another top-1" in plots.trade_off(a_report(rows=agreeing))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(-5, 100)), min_size=1, max_size=30))
def test_no_point_beats_one_of_the_front(points: list[tuple[float, float]]) -> None:
    front = plots.pareto_front(points)
    assert front
    for i in front:
        assert not any(a >= points[i][0] and b <= points[i][1] and (a, b) != points[i] for a, b in points)
    for i, (a, b) in enumerate(points):
        assert i in front or any(points[j][0] >= a and points[j][1] <= b for j in front)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 1e6), st.floats(-100, 100), st.floats(1e-6, 100)), min_size=2, max_size=6))
def test_drawings_stay_inside_their_box(rows: list[tuple[float, float, float]]) -> None:
    made = tuple(
        an_ok_row(
            backend=f"b{i}", images_per_s=r, top1_drop_pp=d, top1_drop_low=-100.0, top1_drop_high=100.0, p50_s=s, p90_s=s, p99_s=s
        )
        for i, (r, d, s) in enumerate(rows)
    )
    for svg in (plots.trade_off(a_report(rows=made)), plots.latencies(a_report(rows=made))):
        assert "nan" not in svg
        for x in re.findall(r'(?:cx|x1|x2)="([-\d.]+)"', svg):
            assert -1 <= float(x) <= plots.WIDTH + 1


def browse(page: Path, tmp_path: Path, width: int, *more: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [CHROMIUM, *flags, f"--window-size={width},1200", *more, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to look at the page with")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_the_page_without_complaint_and_without_sideways_scrolling(tmp_path: Path, width: int) -> None:
    text = html_page.text(large_report(12))
    page = tmp_path / "report.html"
    page.write_text(text, encoding="utf-8")
    shot = tmp_path / "shot.png"
    done = browse(page, tmp_path, width, f"--screenshot={shot}")
    assert "CONSOLE" not in done.stderr
    assert shot.stat().st_size > 10_000
    # the same page in a frame of exactly that width, with a probe (which its own policy would forbid)
    probe = "<script>document.title='width '+innerWidth+' scrolls '+document.documentElement.scrollWidth;parent.postMessage(document.title,'*')</script>"
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", probe + "</body>")
    (tmp_path / "inner.html").write_text(open_page, encoding="utf-8")
    frame = tmp_path / "frame.html"
    listen = "<script>addEventListener('message',e=>{document.body.dataset.found=e.data})</script>"
    frame.write_text(
        f"<!doctype html>{listen}<body style='margin:0'><iframe src='inner.html' style='width:{width}px;height:900px;border:0'>"
    )
    dom = browse(frame, tmp_path, 1300, "--dump-dom", "--virtual-time-budget=2000").stdout
    found = re.search(r"width (\d+) scrolls (\d+)", dom)
    assert found is not None
    inner, scrolls = map(int, found.groups())
    assert inner == width
    assert scrolls <= inner


@pytest.mark.parametrize(
    "edit",
    [
        {"rows": tuple(replace(r, p50_s=0.0, p90_s=0.0) if r.status == "ok" else r for r in a_report().rows)},
        {"rows": tuple(replace(r, images_per_s=0.0, top1_drop_pp=None, agreement=None) for r in a_report().rows)},
        {"explanations": {"x": {"verdict": 5, "findings": ["a", 5, {"share": 0.5}]}}},
        {"explanations": {"x": {"findings": 5}}},
        {"layer_drifts": {"x": {"rows": 5, "notes": 5}}},
        {"measurements": {row_id(a_report().rows[0]): {"launches": 5}}},
    ],
)
def test_a_report_edited_by_hand_still_has_a_page(edit: dict[str, Any]) -> None:
    assert "</html>" in html_page.text(a_report(**edit))
