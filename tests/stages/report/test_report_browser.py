"""A 40-row report in a real browser, in its light and its dark dress: no complaint in the console, and the colours change."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from report_rows import a_report, an_ok_row

from deploykit.stages.report import html_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _look(page: Path, folder: Path, *more: str) -> tuple[str, int]:
    """(what the console said, how light the page's corner is: 0 to 255)."""
    from PIL import Image

    assert CHROMIUM is not None
    shot = folder / "shot.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--window-size=500,1200", *more]
    done = subprocess.run(
        [*command, f"--screenshot={shot}", page.as_uri()], capture_output=True, text=True, timeout=240, check=True
    )
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    pixel = Image.open(shot).convert("L").getpixel((2, 2))
    assert isinstance(pixel, int)
    return console, pixel


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to look at the page with")
def test_forty_rows_in_light_and_dark(tmp_path: Path) -> None:
    rows = [an_ok_row(backend=b, precision=p, batch=n) for b in "abcde" for p in ("fp32", "bf16") for n in (1, 2, 4, 8)]
    text = html_page.text(a_report(rows=tuple(rows)))
    assert len(rows) == 40
    assert len(text.encode()) < 3_000_000
    page = tmp_path / "report.html"
    page.write_text(text, encoding="utf-8")
    light = _look(page, tmp_path)
    dark = _look(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert light[0] == dark[0] == ""
    assert light[1] > 200 > 60 > dark[1]
