#!/bin/sh
# Run the fast tests on the lowest versions that pyproject.toml allows, in a virtual environment of their own.
# torch stays as in constraints.txt: `TORCH=2.6.0 sh scripts/lowest.sh` takes another. Further words go to pytest.
set -eu
cd -- "$(dirname -- "$0")/.."
venv=${VENV:-.venv-lowest}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" - "${TORCH:-}" >"$venv/lowest.txt" <<'PYTHON'
import re
import sys
from pathlib import Path

text = Path("pyproject.toml").read_text("utf-8")
text = text[text.index("dependencies = [") : text.index("[project.scripts]")]
torch = sys.argv[1] or re.search(r"^torch==(.*)$", Path("constraints.txt").read_text("utf-8"), re.M)[1]
for name, version in re.findall(r'"([\w-]+)>=([\w.]+)"', text):
    print(f"{name}=={torch if name == 'torch' else version}")
PYTHON
"$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$venv/lowest.txt" -e . pytest pytest-xdist \
    hypothesis psutil >&2
exec "$venv/bin/python" -m pytest -m "not slow" "$@"
