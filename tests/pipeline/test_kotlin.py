"""The Kotlin files of an Android package: compiled against the runtimes' API as tests/kotlin declares it, and run on a JVM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from deploykit.pipeline import packaging
from deploykit.pipeline.platforms import RUNTIMES

STUBS = Path(__file__).parent.parent / "kotlin"
KOTLINC = os.environ.get("KOTLINC") or shutil.which("kotlinc")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KOTLINC, reason="no Kotlin compiler: npm install -g kotlin-compiler (or KOTLINC=path/to/kotlinc)"),
    pytest.mark.skipif(not shutil.which("java"), reason="no Java: apt-get install default-jre-headless"),
]
ANDROID = [name for name, runtime in RUNTIMES.items() if "android" in runtime.platforms]
SHAPE = (1, 3, 4, 4)


@pytest.fixture(scope="module", params=ANDROID)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the compiled example, an app's folder with a package of a model that hands its input back)."""
    backend = request.param
    folder = tmp_path_factory.mktemp(backend)
    assets = folder / "assets"
    (assets / "model").mkdir(parents=True)
    values = {"x": np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)}
    packaging._write_example(backend, "android", assets, values, values)
    port = [{"name": "x", "dtype": "float32", "shape": list(SHAPE)}]
    facts = {"file": "model.bin", "batch": 1, "cases": 2, "tolerance": 1e-3, "inputs": port, "outputs": port}
    (assets / "model" / "model.json").write_text(json.dumps(facts))
    (assets / "model" / "model.bin").write_bytes(b"engine")
    how = {"resize": None, "crop": 4, "mean": [0.5], "std": [0.25], "scale": 1 / 255, "layout": "nchw", "channels": 3}
    (assets / "model" / "preprocess.json").write_text(json.dumps({**how, "height": 4, "width": 4}))
    sources = [*assets.glob("*.kt"), *(STUBS / f"{name}.kt" for name in ("android", "assets", "bitmap", "json", "run", backend))]
    jar = folder / "example.jar"
    done = subprocess.run(
        [str(KOTLINC), *map(str, sources), "-include-runtime", "-d", str(jar)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return jar, folder


def _run(jar: Path, app: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["java", "-cp", str(jar), "RunKt", str(app)], capture_output=True, text=True, check=False)


def test_the_check_passes_and_pictures_get_the_models_shape(compiled: tuple[Path, Path]) -> None:
    done = _run(*compiled)
    assert done.returncode == 0, done.stderr
    worst, values = done.stdout.strip().splitlines()
    assert float(worst) == 0.0
    at = np.arange(36).reshape(6, 6)[1:5, 1:5]
    wanted = np.stack([at, 2 * at, 255 - at]) / 255
    assert np.abs(np.array(values.split(), float).reshape(3, 4, 4) - (wanted - 0.5) / 0.25).max() < 1e-5


@pytest.mark.parametrize("wrong", [10.0, float("nan")])
def test_an_output_that_is_off_ends_the_check(wrong: float, compiled: tuple[Path, Path], tmp_path: Path) -> None:
    jar, good = compiled
    app = tmp_path / "app"
    shutil.copytree(good / "assets", app / "assets")
    case = app / "assets" / "model" / "cases" / "1.in.0.bin"
    values = np.fromfile(case, "<f4")
    values[7] = wrong
    values.tofile(case)
    done = _run(jar, app)
    assert done.returncode != 0
    assert "case 1: x differs" in done.stderr
