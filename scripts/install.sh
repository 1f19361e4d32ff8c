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
extras="cpu,torch,timm,openvino,rtx,digits,dev"
"$VENV/bin/python" -m pip install --quiet --no-compile --upgrade-strategy only-if-needed \
    -c constraints.txt -e ".[$extras]"
"$VENV/bin/deploykit" --version
