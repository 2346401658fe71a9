#!/bin/sh
# All that was never run on CUDA, in under nine minutes of one GPU (gpu_day.py says what); writes OUT/gpu-day.json, .log.
# It needs an environment with PyTorch for CUDA and the packages of pyproject.toml; nothing is downloaded. Either
#   PYTHON=/path/to/python sh scripts/bench/gpu_day.sh       an environment that has them all, or
#   WHEELS=folder sh scripts/bench/gpu_day.sh                wheels brought along, for use with the machine's PyTorch.
# To bring them, on a machine with a network, the same Python and this project's .venv:
#   .venv/bin/python -m pip freeze --exclude-editable --exclude torch >list.txt
#   pip download --no-deps -d folder -r list.txt torchao      and without what is on the machine already
set -eu
cd -- "$(dirname -- "$0")/../.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-}            # a folder of wheels; empty: none are needed
OUT=${OUT:-runs/gpu-day}
mkdir -p "$OUT"
OUT=$(cd -- "$OUT" && pwd)
PYTHONPATH=common:ERTACache4OpenSora1.2${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$WHEELS" ]; then     # a folder of packages that Python searches before those of the environment
    [ -d "$OUT/site" ] || "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$OUT/site" \
        "$WHEELS"/*.whl >&2
    PYTHONPATH=$OUT/site:$PYTHONPATH
fi
export PYTHONPATH
exec "$PYTHON" scripts/bench/gpu_day.py --out "$OUT" "$@"
