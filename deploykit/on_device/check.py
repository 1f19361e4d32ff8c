"""Whether this device computes what the engine computed where it was packaged:  python check.py  (exit code 0 when it does).

model/expected.npz holds inputs (in/NAME) and outputs (out/NAME), one case along axis 0. The difference of a case is the
largest absolute one over the largest absolute expected value; model/model.json says how large it may be.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MODEL = Path(__file__).parent / "model"


def main() -> int:
    """Runs every case; 0 when all are within the tolerance, else 1."""
    from engine import Engine

    facts: dict[str, Any] = json.loads((MODEL / "model.json").read_text())
    engine = Engine(MODEL, facts)
    worst, seconds = 0.0, []
    with np.load(MODEL / "expected.npz") as cases:
        inputs = {spec["name"]: cases[f"in/{spec['name']}"] for spec in facts["inputs"]}
        expected = {spec["name"]: cases[f"out/{spec['name']}"] for spec in facts["outputs"]}
    for case in range(facts["cases"]):
        start = time.perf_counter()
        found = engine.infer({name: array[case] for name, array in inputs.items()})
        seconds.append(time.perf_counter() - start)
        for name, array in expected.items():
            wanted, got = array[case].astype(np.float64), np.asarray(found[name], dtype=np.float64)
            if got.shape != wanted.shape:
                sys.stdout.write(f"case {case}: {name} has shape {got.shape}, expected {wanted.shape}\n")
                return 1
            apart = float(np.abs(got - wanted).max(initial=0.0) / max(float(np.abs(wanted).max(initial=0.0)), 1e-12))
            worst = apart if not apart <= worst else worst  # a NaN stays
            sys.stdout.write(f"case {case}: {name} differs by {apart:.2e} of its largest value\n")
    passed = worst <= facts["tolerance"]
    sys.stdout.write(f"{'passed' if passed else 'FAILED'}: {worst:.2e}, allowed {facts['tolerance']:.0e}; ")
    sys.stdout.write(f"fastest run {min(seconds) * 1e3:.2f} ms at batch {facts['batch']}\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
