"""The words of a package: its README and requirements."""

from __future__ import annotations

from deploykit.artifact import Artifact
from deploykit.pipeline.platforms import Runtime

_FILES = """| file | what it is |
|---|---|
| `model/{file}` | the engine, with its manifest beside it |
| `model/model.json` | inputs, outputs, batch, the runtime's version, the check's tolerance |
{images}| `model/classes.txt` | class names in the order of the outputs, where they are known |
| `model/expected.npz` | inputs (`in/NAME`) and expected outputs (`out/NAME`) of a few cases |
"""
_IMAGES = "| `model/preprocess.json` | how a picture becomes the input: resize, crop, (pixel * scale - mean) / std |\n"
_PYTHON = """## Run it

    python3 -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python check.py          # this device against the machine that made the package; exit code 0 when they agree
{run}
`engine.py` is the whole of the runtime's API that is needed: `Engine(folder, facts).infer({{name: array}})`.
"""
_ANDROID = """## Run it

1. Copy the folder `model` into `app/src/main/assets/`, and `Engine.kt` and `OnDevice.kt` into the app's sources.
2. Add the dependency that the head of `Engine.kt` names.
3. Call `ondevice.check(context)` once, off the main thread: it runs `model/cases` and throws when an output is off.
4. `Engine(context, Facts(context)).infer(mapOf(name to {kotlin}))` gives the outputs by name.

These sources were not compiled where the package was made.
"""
_IOS = """## Run it

1. Add the folder `model` to the app's target as a folder reference, and `Engine.swift` and `OnDevice.swift` to its sources.
2. Add the package that the head of `Engine.swift` names.
3. Call `try check()` once: it runs `model/cases` and throws when an output is off.
4. `try Engine(Facts.load()).infer([name: {swift}])` gives the outputs by name.

These sources were not compiled where the package was made.
"""


def readme(engine: Artifact, backend: str, runtime: Runtime, platform: str, *, images: bool, classes: bool) -> str:
    """README.md of a package. images: whether it says how a picture becomes the input; classes: whether scores come out."""
    model = str(engine.options.get("model", engine.path.stem))
    head = f"# {model}, {engine.precision}, {runtime.title} for {platform}\n\n"
    made = ", ".join(f"{name} {version}" for name, version in engine.versions.items())
    head += f"An engine of the backend `{backend}`" + (f", made with {made}.\n\n" if made else ".\n\n")
    files = _FILES.format(file=engine.path.name, images=_IMAGES if images else "")
    if platform == "android":
        return head + files + "\n" + _ANDROID.format(kotlin="preprocess(context, bitmap)" if images else "floats")
    if platform == "ios":
        return head + files + "\n" + _IOS.format(swift="preprocess(image)" if images else "floats")
    run = "    venv/bin/python run.py photo.jpg   # its most likely classes\n" if images and classes else ""
    return head + files + "\n" + _PYTHON.format(run=run)


def requirements(engine: Artifact, runtime: Runtime, *, images: bool) -> str:
    """requirements.txt: the runtime in the release the engine was made with, NumPy, and Pillow where pictures go in."""
    lines = []
    for name in runtime.distributions:
        version = engine.versions.get(name) or engine.versions.get(f"{name}-gpu")
        lines.append(f"{name}=={version.partition('+')[0]}" if version else name)
    return "\n".join([*lines, "numpy", *(["pillow"] if images else [])]) + "\n"
