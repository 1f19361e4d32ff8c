"""What a person sees while it works: progress on standard error, gone when that is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """A narrator that shows the step at hand with a progress bar, and each finished step with its seconds."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._text = ""
        self._since = time.monotonic()

    def __enter__(self) -> Bar:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[what]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._finish(done=kind is None)
            self._progress.stop()

    def step(self, text: str) -> None:
        """Begins a new step; the one before is finished."""
        if self._progress is None:
            return
        self._finish(done=True)
        self._text, self._since = text, time.monotonic()
        self._task = self._progress.add_task(text, total=None, what="")

    def progress(self, what: str, share: float) -> None:
        """Moves the bar of the step at hand."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=1.0, completed=share, what=what)

    def _finish(self, *, done: bool) -> None:
        if self._progress is None or self._task is None:
            return
        self._progress.remove_task(self._task)
        self._task = None
        if done:
            self._progress.console.print(
                f"[green]✓[/] {self._text} [dim]{time.monotonic() - self._since:.1f} s[/]", highlight=False
            )
