#!/bin/sh
# All that was never run on CUDA, in under nine minutes of one GPU (gpu_day.py says what); writes OUT/gpu-day.json, .log.
# It needs an environment with PyTorch for CUDA and the packages of pyproject.toml; nothing is downloaded. Either
#   PYTHON=/path/to/python sh scripts/bench/gpu_day.sh       an environment that has them all, or
#   WHEELS=folder sh scripts/bench/gpu_day.sh                wheels brought along, for use with the machine's PyTorch.
# To bring them, on a machine with a network and the same Python:
#   grep -v '^torch==' constraints.txt >others.txt
#   pip download -d folder -c others.txt diffusers transformers accelerate einops ftfy beautifulsoup4 sentencepiece \
#       protobuf imageio imageio-ffmpeg scikit-image platformdirs typer rich cache-dit torchao
# Without a PyTorch there: download torch for its CUDA version into the folder as well.
set -eu
cd -- "$(dirname -- "$0")/../.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-}            # a folder of wheels; empty: none are needed
OUT=${OUT:-runs/gpu-day}
if [ -n "$WHEELS" ]; then
    [ -x "$OUT/venv/bin/python" ] || "$PYTHON" -m venv --system-site-packages "$OUT/venv"
    PYTHON=$OUT/venv/bin/python
    "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" diffusers transformers accelerate einops ftfy \
        beautifulsoup4 sentencepiece protobuf imageio imageio-ffmpeg scikit-image platformdirs typer rich >&2
    for package in cache-dit torchao torch; do
        "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" "$package" >&2 || echo "no $package" >&2
    done
fi
PYTHONPATH=common:ERTACache4OpenSora1.2${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
exec "$PYTHON" scripts/bench/gpu_day.py --out "$OUT" "$@"
