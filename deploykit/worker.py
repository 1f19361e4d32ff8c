"""The child's side: reads calls, runs them, answers. Started as `python -m deploykit.worker PARENT_PID`."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from deploykit import children
from deploykit.children import Answer, read_message, write_message
from deploykit.errors import BackendFailed, DeploykitError, OutOfSpace


def _die_with(parent: int) -> None:
    """Asks Linux to kill this process when its parent dies, so that kill -9 of a run leaves no orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _full_disks(args: tuple[object, ...]) -> str:
    """Which of the folders that a call may have written to have no room, in words."""
    folders = [Path(tempfile.gettempdir()), *(path.parent for path in args if isinstance(path, Path))]
    full = [folder for folder in folders if folder.is_dir() and shutil.disk_usage(folder).free < 64 << 10]
    named = [str(folder.parent if folder.name.startswith(".making-") else folder) for folder in full]
    return f" of {', '.join(named)}" if named else ""


def main() -> None:
    """Serves calls until the parent closes the pipe. Whatever native code prints to standard output goes to the log."""
    _die_with(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    calls = sys.stdin.buffer

    def progress(what: str, share: float) -> None:
        write_message(answers, Answer("progress", (what, share)))

    while True:
        try:
            name, args = read_message(calls)
        except EOFError:
            return
        try:
            module, _, attribute = name.partition(":")
            function = getattr(importlib.import_module(module), attribute)
            with children.reporting(progress):
                answer = Answer("value", function(*args))
        except DeploykitError as exc:
            answer = Answer("error", exc)
        except MemoryError:
            answer = Answer("error", BackendFailed("out of memory", "use a smaller batch or a machine with more memory"))
        except OSError as exc:
            full = exc.errno == 28
            answer = (
                Answer("error", OutOfSpace(f"no space left on the disk{_full_disks(args)}", "free some space and run it again"))
                if full
                else Answer("bug", traceback.format_exc())
            )
        except Exception:
            answer = Answer("bug", traceback.format_exc())
        write_message(answers, answer)


if __name__ == "__main__":
    main()
