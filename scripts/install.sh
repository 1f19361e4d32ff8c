#!/usr/bin/env bash
# A virtual environment with every backend this machine can hold. VENV and PYTHON come from the Makefile.
set -euo pipefail
: "${VENV:=.venv}" "${PYTHON:=python3}"

"$PYTHON" - <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"deploykit needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11 install")
PY
if ! "$PYTHON" -m venv "$VENV"; then
    echo "could not make a virtual environment; on Debian: apt-get install python3-venv" >&2
    exit 1
fi
extras="all,dev"
# uv resolves, fetches and unpacks on all cores (40 s where pip takes 150 s); with pip's own settings, so that it looks where pip looks.
# Its byte code is left to the lines below.
python="$VENV/bin/python"
install_with_pip() {
    "$python" -m pip install --quiet --no-compile --upgrade-strategy only-if-needed -c constraints.txt -e ".[$extras]"
}
if "$python" -m pip install --quiet --no-compile -c constraints.txt uv 2>/dev/null; then
    settings="$("$python" scripts/pip_to_uv.py)"
    if ! (eval "$settings"; "$VENV/bin/uv" pip install --quiet --python "$python" -c constraints.txt -e ".[$extras]"); then
        echo "uv could not install the packages (see above); trying again with pip, which takes longer" >&2
        install_with_pip
    fi
else
    echo "uv is not to be had here; installing with pip, which takes longer" >&2
    install_with_pip
fi
# Byte code for what the child processes import, on all cores. Without it each of them compiles PyTorch anew where
# PYTHONDONTWRITEBYTECODE is set. Left out: tests, and packages that no backend imports when it opens an engine.
skip='/(tests?|examples)/|/site-packages/(mypy|mypyc|pip|nvidia|hypothesis|pygments|transformers|pandas|coremltools|narwhals'
skip+='|huggingface_hub|kagglehub|kagglesdk|tokenizers|timm)/|/executorch/backends/(qualcomm|vulkan|apple|arm|cadence|mediatek|nxp'
skip+='|samsung|cortex_m|aoti|webgpu)/'
"$VENV/bin/python" -m compileall -j 0 -q -x "$skip" "$VENV"/lib/python3*/site-packages deploykit > /dev/null 2>&1 || true
"$VENV/bin/deploykit" --version
