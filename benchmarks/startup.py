"""What deploykit itself costs: `--help`, and a `run` in which nothing has changed.

    .venv/bin/python benchmarks/startup.py

Goals (of issue 2): `deploykit --help` under 0.2 s; an unchanged `run` under 2 s (its measurements are shown again).
The peer in the same run: a bare `python -c pass`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
COMMAND = str(Path(sys.executable).with_name("deploykit"))


def _median_s(command: list[str], turns: int) -> float:
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measures, prints, keeps."""
    figures = {
        "python -c pass": _median_s([sys.executable, "-c", "pass"], 11),
        "deploykit --help": _median_s([COMMAND, "--help"], 11),
    }
    with tempfile.TemporaryDirectory() as scratch:
        run = [COMMAND, "run", "resnet18", "--weights", "none", "--num-classes", "10", "--input", "x:float32:batchx3x32x32"]
        run += [
            "--data",
            "digits",
            "--batch",
            "1",
            "--duration",
            "smoke",
            "-o",
            f"{scratch}/out",
            "--store",
            f"{scratch}/engines",
        ]
        _median_s(run, 1)
        figures["deploykit run, nothing changed"] = _median_s(run, 5)
    for name, seconds in figures.items():
        print(f"{name}: {seconds:.3f} s")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "startup.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
