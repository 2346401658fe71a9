#!/bin/sh
# The paper's Figure 5: quality against the number of calibration prompts, with timestep adjustment and rectification.
# MODEL=full PROMPTS=coco.txt CALIBRATION=other.txt COUNTS=20,30,1000: the real checkpoint (needs a GPU).
set -eu
cd -- "$(dirname -- "$0")/../.."
MODEL=${MODEL:-demo}          # demo, or full
PROMPTS=${PROMPTS:-}          # prompts to measure on, one per line; empty: COUNT held-out captions of the demo
CHECKPOINTS=${CHECKPOINTS:-}  # of MODEL=full: a folder that holds them (FLUX.1-dev/, …); empty: from the Hub
CALIBRATION=${CALIBRATION:-}  # other prompts to calibrate on; empty: captions of the demo's training part
COUNT=${COUNT:-32}
COUNTS=${COUNTS:-2,4,8,16}    # calibration prompts
FOLDER=${FOLDER:-ERTACache4FLUX}
CLIP=${CLIP:-}                # hub id or directory of a CLIP model, for the CLIP score; empty: none
OUT=${OUT:-runs/reproduce/figure5-$MODEL}
[ "$MODEL" != full ] || [ -n "$PROMPTS" ] || { echo "error: MODEL=full needs PROMPTS=FILE" >&2; exit 2; }
sh scripts/setup.sh report
[ -z "$CLIP" ] || set -- --clip "$CLIP" "$@"
[ -z "$PROMPTS" ] || set -- --prompts "$PROMPTS" "$@"
[ -z "$CALIBRATION" ] || set -- --calibration-prompts "$CALIBRATION" "$@"
[ -z "$CHECKPOINTS" ] || set -- --checkpoints "$CHECKPOINTS" "$@"
exec .venv/bin/python scripts/reproduce/figures.py figure5 --model "$MODEL" --folders "$FOLDER" --count "$COUNT" \
    --counts "$COUNTS" --out "$OUT" "$@"
